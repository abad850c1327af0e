"""Evaluation: sweeps, agreement, their results, reports, the demo and the catalogue of policies."""
