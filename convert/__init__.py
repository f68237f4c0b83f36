"""Offline conversion: a source checkpoint to a folded or unrolled directory."""
