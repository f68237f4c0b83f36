"""Jinja, walked: what a chat template says is done here node by node, and no code of it is run.

Read in this order: text.py (whose characters are whose, and what they cost), values.py, filters.py,
run.py (the walk). The chat template itself is ../template.py.
"""
