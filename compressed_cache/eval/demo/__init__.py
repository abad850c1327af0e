"""``python -m compressed_cache demo``."""
