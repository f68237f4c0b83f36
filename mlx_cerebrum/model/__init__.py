"""The forward pass: start at forward.py."""
