"""Measurements: each script asks one question and answers it with a table and a JSON line."""

from mlx_cerebrum import cli  # noqa: F401  # first: it says what is not installed
