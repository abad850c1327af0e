"""``compressed-cache demo``."""
