"""Training and evaluation over a stream of tasks, in a run folder."""
