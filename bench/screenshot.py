"""Takes the picture of a report that README.md shows, of the results of the demo.

    python -m bench.screenshot

Chromium must be on the PATH.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from compressed_cache.__main__ import main as command

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "pictures" / "report.png"


def main(arguments: list[str] | None = None) -> int:
    """Writes the picture."""
    argparse.ArgumentParser(
        prog="python -m bench.screenshot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(arguments)
    chromium = shutil.which("chromium")
    if chromium is None:
        print("chromium must be on the PATH", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as session:
        report = Path(folder) / "report.html"
        command(["report", str(ROOT / "bench" / "results" / "demo.json"), "--out", str(report)])
        # A sandbox of its own needs rights that a container may lack.
        browser = session.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 850})
        page.goto(report.as_uri())
        page.screenshot(path=PICTURE)
        browser.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
