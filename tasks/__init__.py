"""Tasks of lm-evaluation-harness: eleven reasoning benchmarks, and the shipped model's problems."""

from pathlib import Path

PATH = Path(__file__).resolve().parent
"""What ``lm_eval --include_path`` takes."""
