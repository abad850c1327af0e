"""``compressed-cache report``: measurements as one page."""
