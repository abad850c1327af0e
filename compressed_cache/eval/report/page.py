"""The page: one file that needs nothing else."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from compressed_cache.eval.report.figures import same_looks
from compressed_cache.eval.report.inputs import Inputs
from compressed_cache.eval.report.parts import told
from compressed_cache.eval.report.sections import Section, sections, summary
from compressed_cache.eval.report.style import DARK
from compressed_cache.eval.report.svg import variable

_PACKAGES = ("compressed-cache", "matplotlib", "numpy", "scipy")


def page(inputs: Inputs) -> str:
    """The whole page as HTML."""
    environment = Environment(
        loader=PackageLoader("compressed_cache.eval.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with same_looks():
        shown = sections(inputs)
    drawings = _drawings(shown)
    return environment.get_template("page.html").render(
        summary=summary(inputs),
        sources=[(s, told(s.configuration), told(s.versions)) for s in inputs.sources],
        sections=shown,
        drawings=lambda picture: drawings[id(picture)],
        colours={variable(light): (light, dark) for light, dark in DARK.items()},
        made_with=told(
            {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()}
        ),
    )


def write(html: str, out: Path) -> None:
    """Writes the page whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        beside.write_text(html, encoding="utf-8")
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)


def _drawings(shown: list[Section]) -> dict[int, str]:
    """The pictures' SVG by ``id``."""
    pictures = [picture for s in shown for part in s.parts for picture in part.pictures]
    return {id(picture): picture.svg(number) for number, picture in enumerate(pictures)}
