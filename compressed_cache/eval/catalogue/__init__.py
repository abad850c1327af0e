"""``python -m compressed_cache policies`` and ``presses``."""
