"""How the harness sums up what tasks report of each document."""

from collections.abc import Sequence


def low(accuracies: Sequence[float]) -> float:
    """Lower end of the 95% interval of the mean."""
    return _interval(accuracies)[0]


def high(accuracies: Sequence[float]) -> float:
    """Upper end of the 95% interval of the mean."""
    return _interval(accuracies)[1]


def mean_of_known(values: Sequence[float | None]) -> float | str:
    """Mean of the values that there are, the harness's ``N/A`` if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else "N/A"


def _interval(accuracies: Sequence[float]) -> tuple[float, float]:
    """Wilson's interval where each document is right or wrong, else that of the normal law.

    With repeats a document has a share of right answers; documents, not replies, are the sample. A
    single share says nothing about others.
    """
    from scipy.stats import binomtest, norm

    count = len(accuracies)
    mean = sum(accuracies) / count
    if set(accuracies) <= {0.0, 1.0}:
        interval = binomtest(round(sum(accuracies)), count).proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high)
    if count == 1:
        return 0.0, 1.0
    variance = sum((accuracy - mean) ** 2 for accuracy in accuracies) / (count - 1)
    half = float(norm.ppf(0.975)) * (variance / count) ** 0.5
    return max(0.0, mean - half), min(1.0, mean + half)
