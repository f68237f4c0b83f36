"""What the machine can do with models, for its user and for a bug report."""
