"""Any source as one checkpoint, and from it a model that runs: start at opening.py."""
