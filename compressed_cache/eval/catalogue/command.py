"""What the commands ``policies`` and ``presses`` do with their options."""

import argparse
import json
import re
import sys
from dataclasses import asdict
from typing import Any

from compressed_cache.eval.catalogue import entry, page
from compressed_cache.eval.catalogue.presses import PRESSES
from compressed_cache.wording import listing, nearest


def policies(options: argparse.Namespace) -> int:
    """Prints all policies and modifiers, one, or the parts of a combination."""
    entries = entry.read()
    parts = re.split(r"[+/]", options.name) if options.name else []
    # By its class or its press too, whose name is that of the policy without underscores.
    asked = [part.lower().removesuffix("press") for part in parts]
    chosen = [
        one
        for one in entries
        if not parts or one.name in asked or one.name.replace("_", "") in asked
    ]
    if len(chosen) < len(set(asked)):
        known = {name for one in chosen for name in (one.name, one.name.replace("_", ""))}
        stranger = next(part for part, own in zip(parts, asked, strict=True) if own not in known)
        names = [one.name for one in entries]
        return _unknown("policy or modifier", stranger, names, "presses")
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
        return _unknown("press", options.name, [row.name for row in PRESSES], "policies")
    if options.markdown:
        print(page.presses(chosen))
    elif options.json:
        print(json.dumps([row._asdict() for row in chosen], indent=1))
    else:
        print("\n\n".join(map(page.press, chosen)))
    return 0


def _unknown(what: str, name: Any, names: list[str], other: str) -> int:
    known = list(dict.fromkeys(names))
    print(
        f"unknown {what} {name!r}, expected one of {listing(known)}{nearest(name, known)} "
        f"(compressed-cache {other} has others)",
        file=sys.stderr,
    )
    return 2
