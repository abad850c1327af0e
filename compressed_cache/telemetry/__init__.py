"""What a run took and what it evicted, told without a word inside a decode step."""
