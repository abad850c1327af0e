"""Figures as SVG inside a page."""

import io
import re
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from compressed_cache.eval.report.style import DARK, RC

_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Picture:
    """A figure and what it shows in words."""

    figure: Figure
    words: str
    """Read aloud in its place."""
    title: str = ""
    """Written above, where it is one of several."""

    def svg(self, number: int) -> Markup:
        """An ``<svg>`` element whose identifiers are unique by number, in the page's colours."""
        file = io.StringIO()
        with matplotlib.rc_context(RC):
            self.figure.savefig(file, format="svg", metadata=_NO_METADATA)
        whole = file.getvalue()
        head = re.search(r"<svg [^>]*>", whole)
        size = re.search(r'viewBox="([^"]*)"', whole)
        assert head and size
        body = whole[head.end() :]
        body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
        body = re.sub(r'( id="|url\(#|href="#)', rf"\1p{number}-", body)
        for colour in DARK:
            body = body.replace(colour, f"var({variable(colour)})")
        opening = Markup('<svg role="img" aria-label="{}" viewBox="{}">')
        return opening.format(self.words, size[1]) + Markup(body)


def variable(colour: str) -> str:
    """The name by which the page knows a colour."""
    return f"--c-{colour.removeprefix('#')}"
