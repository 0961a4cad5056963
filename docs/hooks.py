"""What `make docs` adds to the pages: mermaid, which draws their pictures, so that a page fetches nothing from afar.

mermaid is no Python package; mermaidx (requirements.txt) holds its file as it was released.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

SCRIPT = "assets/javascripts/mermaid-11.16.0.min.js"
SHA256 = "74d7c46dabca328c2294733910a8aa1ed0c37451776e8d5295da38a2b758fb9b"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    content = (resources.files("mermaidx") / "assets" / "mermaid.js").read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise PluginError(f"mermaidx holds another file than {SCRIPT}: see docs/hooks.py")
    files.append(File.generated(config, SCRIPT, content=content))
    return files


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """The theme asks unpkg.com for mermaid where a page has a picture, unless it is there already."""
    if 'class="mermaid"' not in html:
        return html
    return f'{html}\n<script src="{get_relative_url(SCRIPT, page.url)}"></script>'
