"""What the commands ``policies`` and ``presses`` do with their options."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from compressed_cache.eval.catalogue import entry, page
from compressed_cache.eval.catalogue.presses import PRESSES
from compressed_cache.wording import listing, nearest


def policies(options: argparse.Namespace) -> int:
    """Prints all policies and modifiers, or one."""
    entries = entry.read()
    asked = options.name and options.name.lower()
    # A class by its name too, which is that of the policy without underscores.
    chosen = [one for one in entries if asked in (None, one.name, one.name.replace("_", ""))]
    if not chosen:
        return _unknown("policy or modifier", options.name, [one.name for one in entries])
    if options.markdown:
        print(page.alone(*chosen) if options.name else page.tables(entries))
    elif options.json:
        print(json.dumps([asdict(one) for one in chosen], indent=1))
    else:
        write = page.full if options.name else page.short
        print("\n\n".join(map(write, chosen)))
    return 0


def presses(options: argparse.Namespace) -> int:
    """Prints what to type here for the presses of kvpress and its forks, or for one."""
    asked = options.name and options.name.lower()
    chosen = [row for row in PRESSES if asked in (None, row.name.lower())]
    if not chosen:
        return _unknown("press", options.name, [row.name for row in PRESSES])
    if options.markdown:
        print(page.presses(chosen))
    elif options.json:
        print(json.dumps([row._asdict() for row in chosen], indent=1))
    else:
        print("\n\n".join(map(page.press, chosen)))
    return 0


def _unknown(what: str, name: Any, names: list[str]) -> int:
    known = list(dict.fromkeys(names))
    print(
        f"unknown {what} {name!r}, expected one of {listing(known)}{nearest(name, known)}",
        file=sys.stderr,
    )
    return 2
