"""Every Python block of README.md and docs/ runs as it stands, and prints what stands below it."""

import re
from pathlib import Path

import pytest
import torch

from compressed_cache.reasoner import MODEL_PATH

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
HUB = re.compile(r'"[\w.-]+/[\w.-]+"')
"""A name of the hub, in whose place the shipped model is taken."""
COMPILER = "CompileConfig("
"""Inductor takes a minute of which these tests learn nothing."""
PAGES = {
    str(path.relative_to(ROOT)): BLOCK.findall(path.read_text())
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
SLOW = {"README.md", "docs/index.md", "docs/compile.md", "docs/telemetry.md"}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page in SLOW else ())
        for page, blocks in PAGES.items()
        if blocks
    ],
)
def test_the_blocks_of_a_page_run_in_their_order(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "snippets"}
    for code, printed in PAGES[page]:
        capsys.readouterr()
        code = code.replace(COMPILER, f"{COMPILER}backend='eager', ")
        exec(HUB.sub(repr(str(MODEL_PATH)), code), names)
        if printed:
            assert capsys.readouterr().out == printed
    torch._dynamo.reset()


def test_no_block_is_left_out() -> None:
    for page, blocks in PAGES.items():
        assert (ROOT / page).read_text().count("```python") == len(blocks), page
    assert len([page for page, blocks in PAGES.items() if blocks]) >= 7
