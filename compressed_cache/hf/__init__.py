"""Where the cache meets transformers."""
