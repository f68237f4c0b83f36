"""The machine: what it is, whether it runs short of memory, and that it stays awake."""
