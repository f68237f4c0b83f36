"""Measurements: each script asks one question and answers it with a table and a JSON line."""
