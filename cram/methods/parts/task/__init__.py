"""What a method keeps per task: keys, routers, the state of a task in training."""
