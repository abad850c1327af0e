"""Made-up rows of results."""

from typing import Any

from compressed_cache.eval.results.row import Agreement, Result

_COMMON: dict[str, Any] = dict(
    model="shipped",
    task="reasoning_shipped_easy",
    policy="h2o",
    options={"interval": 1, "sinks": 0, "recent": 32, "protect_prompt": False},
    budget=64,
    seed=0,
    documents=2,
    cache_bytes=137440.0,
    seconds=2.0,
    versions={"python": "3.11"},
    machine={"device": "cpu", "threads": 1},
)


def typed(command: str, options: dict[str, str | None], **changes: str | None) -> list[str]:
    """A command with options, some of them changed; None leaves one out."""
    given = options | {name.replace("_", "-"): value for name, value in changes.items()}
    return [command, *(f"--{name}={value}" for name, value in given.items() if value is not None)]


def make_result(**changes: Any) -> Result:
    """A row of h2o at 64 slots."""
    values: dict[str, Any] = _COMMON | dict(
        accuracy=0.5,
        accuracy_low=0.1,
        accuracy_high=0.9,
        tokens=40.0,
        truncated=0.0,
        evicted_tokens=15.0,
        held_tokens=64.0,
        tokens_per_s=100.0,
        correct={"0-aa": 1.0, "1-bb": 0.0},
    )
    return Result(**values | changes)


def make_agreement(**changes: Any) -> Agreement:
    """A row of h2o at 64 slots."""
    values: dict[str, Any] = _COMMON | dict(
        weights="0123456789abcdef",
        prompt_tokens=40.0,
        text_tokens=80.0,
        late_documents=2,
        late_positions=110,
        agreement=0.85,
        agreement_se=0.05,
        divergence=0.5,
        divergence_se=0.1,
        lost=0.5,
        lost_se=0.1,
        early_agreement=1.0,
        early_divergence=0.0,
        early_lost=0.0,
        first_difference=30.0,
        first_difference_se=2.0,
        identical=0.0,
        agreements={"0-aa": 0.9, "1-bb": 0.8},
    )
    return Agreement(**values | changes)
