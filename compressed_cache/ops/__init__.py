"""Pure tensor operations. The letters of all shapes are in :mod:`compressed_cache.ops.eviction`."""
