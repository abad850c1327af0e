"""What the report command does with its options."""

import argparse
import sys
from pathlib import Path

from compressed_cache.eval.report import page
from compressed_cache.eval.report.inputs import read


def run(options: argparse.Namespace) -> int:
    """Reads all results and writes the page."""
    out = Path(options.out)
    if out.is_dir():
        print(f"--out must name a file, got the folder {out}", file=sys.stderr)
        return 2
    try:
        inputs = read(options.results, layers=options.layers)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    html = page.page(inputs)
    try:
        page.write(html, out)
    except OSError as error:
        print(f"--out {out}: {error.strerror}", file=sys.stderr)
        return 1
    sources = f"{len(inputs.sources)} source{'s' * (len(inputs.sources) != 1)}"
    print(f"{sources}, {len(html.encode()) // 1024} KiB: {out}")
    return 0
