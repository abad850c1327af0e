"""What keeps two caches from being compared, and can be undone for a comparison."""

CAUSES = {
    "passed on": "what goes is attended here until it is overwritten",
    "order": "its cache is unsorted after the first cut",
    "angles": "it rotates queries to positions that are not theirs",
    "ties": "equal scores: any goes there, the oldest here",
    "layers": "layers share their slots there, here only the heads of a layer",
    "rounding": "how many go is rounded for all heads at once there, for each here",
}
"""By the name under which each is undone."""

PREFILL = ("angles", "ties", "layers", "rounding")
DECODING = ("passed on", "order", "angles", "ties")
