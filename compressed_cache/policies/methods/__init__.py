"""A file for each method."""
