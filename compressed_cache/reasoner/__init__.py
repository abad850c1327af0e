"""The small reasoning model that ships with the project, its problems and its training."""

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "model"
