"""What the compare command does with its options."""

import argparse
import sys

from compressed_cache.eval.results import comparison
from compressed_cache.eval.results.row import Result, read
from compressed_cache.policies import canonical_name
from compressed_cache.wording import markdown


def compare(options: argparse.Namespace) -> int:
    """Prints how two policies do on the same documents."""
    if len(options.policies) != 2:
        print(f"--policies must be two, got {','.join(options.policies)}", file=sys.stderr)
        return 2
    first, second = map(canonical_name, options.policies)
    try:
        rows = read(options.results)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    try:
        found = comparison.compare(rows, first, second)
    except ValueError as error:
        print(f"{options.results}: {error}", file=sys.stderr)
        return 2
    header = ["measure", "model", "task", "budget", "documents", "seeds", first, second]
    header += ["difference [95%]", f"only {first}", f"only {second}", "p"]
    print(markdown(header, [_cells(one) for one in found]))
    return 0


def _cells(one: comparison.Comparison) -> list[str]:
    low, high = one.difference_low, one.difference_high
    # A document has one answer and hundreds of tokens.
    digits = 0 if one.measure == Result.measure else 1
    return [
        one.measure,
        one.model,
        one.task,
        "-" if one.budget is None else str(one.budget),
        str(one.documents),
        str(one.seeds),
        *(f"{score:.{digits}%}" for score in one.accuracies),
        f"{one.difference * 100:+.{digits}f} [{low * 100:+.{digits}f}, {high * 100:+.{digits}f}]",
        *map(str, one.better),
        f"{one.p:.2g}",
    ]
