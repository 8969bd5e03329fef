"""Benchmarks of CRAM: one command, and cases named after real models. No figure without a correct result."""
