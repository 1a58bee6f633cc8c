"""Randomised faults on whole pipelines: `make test-faults`, or `python -m tests.faults --help`."""
