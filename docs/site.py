"""What the site needs beside its pages: a hook of mkdocs that carries along the files of the repository they link to.

Pages are read on the site and in the repository. There `../examples/trainer.py` is a link to a file outside of docs/,
which a site cannot have: it is copied under `files/`, and the link leads there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add every file that a page links to outside of docs/."""
    found: set[str] = set()
    for page in files.documentation_pages():
        found.update(OUTSIDE.findall(page.content_string))
    for path in sorted(found):
        if path != "README.md":
            files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead the links there; README is what the first page says."""
    return OUTSIDE.sub(lambda link: "](" + ("index.md" if link[1] == "README.md" else f"files/{link[1]}"), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings announce a block of code with two colons; on the page it is one."""
    return html.replace("::</p>", ":</p>")
