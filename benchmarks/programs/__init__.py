"""The programs of `python -m benchmarks NAME`: each module has `main(argv)`."""
