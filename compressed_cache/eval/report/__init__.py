"""``python -m compressed_cache report``: measurements as one page."""
