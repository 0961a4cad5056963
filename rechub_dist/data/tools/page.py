"""What our HTML pages share: one style, light and dark, for wide and narrow windows; tables. No scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, Final

from rechub_dist.errors import printable, shortened

STYLE: Final = """
:root{color-scheme:light dark;--paper:#fbfbfa;--card:#fff;--ink:#1d1f23;--dim:#6a6f78;--line:#e2e3e6;
--s0:#3366cc;--s1:#e07b39;--s2:#2e9e6b;--s3:#a64ca6;--warn:#9a5b00;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--paper:#15171a;--card:#1d2024;--ink:#e8e9eb;--dim:#9aa0a9;--line:#33373d;
--s0:#7ea6ff;--s1:#f2a36b;--s2:#5ccf9a;--s3:#d58ad5;--warn:#f0b95a;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.45 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1240px;margin:0 auto;padding:20px 16px 60px}
h1{font-size:1.35rem;margin:.2em 0;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:1.8em 0 .6em}
h3{font-size:1rem;margin:0;overflow-wrap:anywhere}
p{margin:.4em 0}
.dim{color:var(--dim);font-size:.86rem;overflow-wrap:anywhere}
.warn{color:var(--warn)}.bad{color:var(--bad)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.88rem}
th,td{padding:3px 10px 3px 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--dim)}
th:first-child,td:first-child{text-align:left}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:14px}
.card{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;min-width:0}
.card svg{display:block;width:100%;height:auto;margin:8px 0 2px}
.card table{width:100%}.card th,.card td{padding-right:6px}
details{margin-top:12px}
summary{cursor:pointer;color:var(--dim)}
@media (max-width:600px){table{font-size:.8rem}th,td{padding-right:7px}}
.key{display:inline-block;width:.75em;height:.75em;border-radius:2px;margin-right:.35em}
.k0{background:var(--s0)}.k1{background:var(--s1)}.k2{background:var(--s2)}.k3{background:var(--s3)}
.f0{fill:var(--s0)}.f1{fill:var(--s1)}.f2{fill:var(--s2)}.f3{fill:var(--s3)}
.axis{stroke:var(--line)}
text{fill:var(--ink);font-size:11px}text.d{fill:var(--dim)}
ul{padding-left:1.2em;margin:.4em 0}li{margin:.25em 0;overflow-wrap:anywhere}
"""


def text(value: Any, longest: int = 200) -> str:
    """Text of data or of a user, for HTML."""
    return escape(printable(shortened(str(value), longest)))


def head(title: str, mark: str) -> str:
    """The begin of a page up to its heading; `mark` is a tag that says what wrote it."""
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">{mark}'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><main><h1>{text(title)}</h1>"
    )


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells."""
    first = "".join(f"<th>{header}</th>" for header in headers)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>'


def svg(content: str, label: str, width: int, height: int) -> str:
    """A plot of so many units, which `label` describes."""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label, quote=True)}">'
        f"<title>{escape(label)}</title>{content}</svg>"
    )
