"""Benchmarks of CRAM: one command, cases named after real models, the gate before the figures."""
