"""What the commands ``policies`` and ``presses`` do with their options."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from compressed_cache.eval.catalogue import entries, page
from compressed_cache.eval.catalogue.presses import PRESSES
from compressed_cache.wording import listing, nearest


def policies(options: argparse.Namespace) -> int:
    """Prints all policies and modifiers, or one."""
    scorers, modifiers = entries.policies(), entries.modifiers()
    if options.markdown:
        print(page.tables(scorers, modifiers))
        return 0
    chosen = [e for e in (*scorers, *modifiers) if options.name in (None, e.name)]
    if not chosen:
        names = [entry.name for entry in (*scorers, *modifiers)]
        return _unknown("policy or modifier", options.name, names)
    if options.json:
        print(json.dumps([asdict(entry) for entry in chosen], indent=1))
        return 0
    write = page.full if options.name else page.short
    print("\n\n".join(map(write, chosen)))
    return 0


def presses(options: argparse.Namespace) -> int:
    """Prints what to type here for the presses of kvpress and its forks, or for one."""
    if options.markdown:
        print(page.presses(PRESSES))
        return 0
    chosen = [row for row in PRESSES if options.name in (None, row.name)]
    if not chosen:
        return _unknown("press", options.name, [row.name for row in PRESSES])
    if options.json:
        print(json.dumps([row._asdict() for row in chosen], indent=1))
        return 0
    print("\n\n".join(map(page.press, chosen)))
    return 0


def _unknown(what: str, name: Any, names: list[str]) -> int:
    known = list(dict.fromkeys(names))
    print(
        f"unknown {what} {name!r}, expected one of {listing(known)}{nearest(name, known)}",
        file=sys.stderr,
    )
    return 2
