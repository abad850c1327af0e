"""What the pages link to outside ``docs/`` becomes part of the site; mkdocs calls these hooks.

On a code host such links lead to the files of the repository, and a site has none of these.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "repository"
"""Where the files are in the site, by their path in the repository."""
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(<code>)(?:~[\w.]*\.)?")
_LINK = re.compile(r"(?<=\]\()\.\./([^)#]+)")


def on_files(files: Files, *, config: Any) -> Files:
    """Adds every file that a page links to.

    Raises:
        FileNotFoundError: there is no such file.
    """
    texts = [page.content_string for page in files.documentation_pages()]
    for name in sorted({name for text in texts for name in _LINK.findall(text)}):
        path = ROOT / name
        if path.is_dir():
            content: str | bytes = "\n".join(sorted(file.name for file in path.iterdir()))
        else:
            content = path.read_bytes()
        files.append(File.generated(config, _in_site(name), content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page that links into the site only."""
    return _LINK.sub(lambda link: _in_site(link[1]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """A page whose docstrings lost what only Sphinx reads of them."""
    return _ROLE.sub(r"\1", html).replace("::</p>", ":</p>")


def _in_site(name: str) -> str:
    """Text is shown as it is, and not made a page whose own links would lead nowhere."""
    is_picture = name.endswith(".png")
    return f"{FOLDER}/{name}" if is_picture else f"{FOLDER}/{name}.txt"
