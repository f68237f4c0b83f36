"""Seeded fuzzing of everything that reads a file or a request: `python -m tests.fuzz --help`."""
