"""``compressed-cache policies`` and ``presses``."""
