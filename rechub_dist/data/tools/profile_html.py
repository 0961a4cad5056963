"""The profile of a data set as one HTML page: plots as inline SVG, no scripts, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from rechub_dist.data.parquet.outputs import check_file, whole_file
from rechub_dist.data.tools.figures import ColumnProfile, Overlap, Profile, Top, number_text, share_text
from rechub_dist.data.tools.leaks import LeakReport
from rechub_dist.errors import printable, shortened

_MARK: Final = '<meta name="generator" content="rechub-dist data inspect">'
_WHAT = "a page of rechub-dist data inspect"
_W, _H = 320, 96  # of a plot, in its own units
_TOP = 6  # values that are drawn
_SELDOM = 0.001  # share of rows below which no value is called frequent
_NONE = "-"
_STYLE = """
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
summary{cursor:pointer;color:var(--dim)}
@media (max-width:600px){table{font-size:.8rem}th,td{padding-right:7px}}
.key{display:inline-block;width:.75em;height:.75em;border-radius:2px;margin-right:.35em}
.k0{background:var(--s0)}.k1{background:var(--s1)}.k2{background:var(--s2)}.k3{background:var(--s3)}
.f0{fill:var(--s0)}.f1{fill:var(--s1)}.f2{fill:var(--s2)}.f3{fill:var(--s3)}
.axis{stroke:var(--line)}
text{fill:var(--ink);font-size:11px}text.d{fill:var(--dim)}
ul{padding-left:1.2em;margin:.4em 0}li{margin:.25em 0;overflow-wrap:anywhere}
"""


def check_page(path: Path) -> None:
    """Raise UserError if `write_page` may not write a file; to find out before the work, which may be long."""
    check_file(path, _ours, _WHAT, option="--html")


def write_page(path: Path, found: Profile, leaks: LeakReport | None = None) -> None:
    """Write the page of a profile, and of what the check for leaks has found.

    Raises:
        UserError: the file exists and is not such a page, or cannot be written.
    """
    with whole_file(path, _ours, _WHAT, option="--html") as file:
        file.write_text(page(found, leaks), encoding="utf-8")


def page(found: Profile, leaks: LeakReport | None = None) -> str:
    """The page as HTML."""
    names = [split.name for split in found.splits]
    parts = [_head(found), _summary(found)]
    if leaks is not None:
        parts.append(_leaks(leaks))
    parts += [_labels(found, names), _overlaps(found), '<h2 id="columns">Columns</h2>', _legend(names)]
    cards = "".join(_card(column, names) for column in found.columns)
    return f'{"".join(parts)}<div class="grid">{cards}</div></main></body></html>\n'


def _ours(path: Path) -> bool:
    with path.open("rb") as file:
        return _MARK.encode() in file.read(2000)


def _t(value: Any, longest: int = 200) -> str:
    """Text of the data, for HTML."""
    return escape(printable(shortened(str(value), longest)))


def _head(found: Profile) -> str:
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">{_MARK}'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{_t(found.path)}</title><style>{_STYLE}</style></head><body><main><h1>{_t(found.path)}</h1>"
    )


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells."""
    head = "".join(f"<th>{header}</th>" for header in headers)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _share(value: float | None) -> str:
    return escape(share_text(value))


def _number(value: Any) -> str:
    return _t(number_text(value, 4), 40)


def _summary(found: Profile) -> str:
    rows = []
    for split in found.splits:
        ends = found.times.get(split.name)
        between = f"{_t(ends[0])} to {_t(ends[1])}" if ends else _NONE
        size = "" if split.row_group_rows is None else f"{split.row_group_rows[0]:,} to {split.row_group_rows[1]:,}"
        cells = [_t(split.name or "all"), f"{split.rows:,}", f"{split.files:,}", _bytes(split.bytes)]
        rows.append([*cells, f"{split.row_groups:,}", size, between])
    headers = ["split", "rows", "files", "size", "row groups", "rows each", "time"]
    roles = found.roles
    named = [("user", roles.user), ("item", roles.item), ("time", roles.time), *(("label", x) for x in roles.labels)]
    taken = [f"{role}: {_t(name)} ({_t(roles.why[name])})" for role, name in named if name is not None]
    parts = [_table(headers, rows), f'<p class="dim">{"; ".join(taken) or "no user, item, time or label is known"}</p>']
    parts += [f'<p class="warn">{_t(note, 500)}</p>' for note in found.notes]
    parts += [f'<p class="warn">{_t(split.warning, 500)}</p>' for split in found.splits if split.warning]
    return "".join(parts)


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def _leaks(report: LeakReport) -> str:
    items = [f'<li class="bad">{_t(x.check)}: {_t(x.text, 500)}</li>' for x in report.findings]
    parts = [f"<h2>Leaks</h2><ul>{''.join(items)}</ul>" if items else "<h2>Leaks</h2><p>None was found.</p>"]
    for title, checked in (("clean", report.clean), ("not checked", report.skipped)):
        listed = "".join(f"<li>{_t(x.check)}: {_t(x.text, 500)}</li>" for x in checked)
        if checked:
            parts.append(f"<details><summary>{title}: {len(checked)}</summary><ul>{listed}</ul></details>")
    return "".join(parts)


def _labels(found: Profile, names: Sequence[str]) -> str:
    if not found.labels:
        return ""
    rows = []
    for label in found.labels:
        if label.positive_rate is not None:
            rows.append([_t(label.name), "positive", *(_share(label.positive_rate.get(name)) for name in names)])
            continue
        rows.append([_t(label.name), "mean", *(_number(label.mean.get(name)) for name in names)])
        values = label.values or ()
        rows += [["", f"is {_number(x.value)}", *(_share(x.shares.get(name)) for name in names)] for x in values]
    return "<h2>Labels</h2>" + _table(["label", "", *(_t(name or "all") for name in names)], rows)


def _overlaps(found: Profile) -> str:
    if not found.overlaps:
        return ""
    rows = [[_t(role), *_overlap(item)] for role, overlaps in found.overlaps.items() for item in overlaps]
    headers = ["", "split", "distinct", "not in train", "rows", "of these"]
    return "<h2>Users and items that train lacks</h2>" + _table(headers, rows)


def _overlap(item: Overlap) -> list[str]:
    return [_t(item.split), f"{item.distinct:,}", _share(item.cold), f"{item.rows:,}", _share(item.cold_rows)]


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    keys = " &nbsp; ".join(f'<span class="key k{i}"></span>{_t(name)}' for i, name in enumerate(names))
    return f'<p class="dim">{keys}</p>'


def _card(column: ColumnProfile, names: Sequence[str]) -> str:
    kinds = dict.fromkeys(part.type for part in column.parts.values())
    about = ", ".join([*kinds, *column.uses])
    plot, caption = _plot(column, names)
    rows = []
    for i, name in enumerate(names):
        part = column.parts.get(name)
        if part is None:
            continue
        label = f'<span class="key k{i}"></span>{_t(name)}' if name else "all"
        missing = f"{part.nulls:,}" + (f" + {part.nans:,} NaN" if part.nans else "")
        cells = [label, missing, f"{'≈' if part.about else ''}{part.distinct:,}"]
        if any(p.mean is not None for p in column.parts.values()):
            cells.append(_number(part.mean))
        if column.kind == "list":
            at = part.lengths
            cells += [_NONE, _NONE] if at is None else [f"{at.median:,.4g}, {at.p95:,.4g}", _share(at.empty)]
        rows.append(cells)
    headers = ["", "nulls", "distinct"]
    headers += ["mean"] if any(p.mean is not None for p in column.parts.values()) else []
    headers += ["p50, p95", "empty"] if column.kind == "list" else []
    top = _frequent(column, names) if column.histogram is not None else ""
    return (
        f'<figure class="card"><h3>{_t(column.name) or "(no name)"}</h3><div class="dim">{_t(about, 120)}</div>{plot}'
        f'<figcaption class="dim">{caption}</figcaption>{_table(headers, rows)}{top}</figure>'
    )


def _frequent(column: ColumnProfile, names: Sequence[str]) -> str:
    """The most frequent values as a line of text, with their shares in the first split that has the column."""
    name = next((name for name in names if name in column.parts and column.parts[name].rows), None)
    if name is None or not any((share or 0) >= _SELDOM for top in column.top for share in top.shares.values()):
        return ""
    shown = [f"{_t(_value(top), 24)} {_share(top.shares.get(name))}" for top in column.top[:4]]
    return f'<p class="dim">{"≈ " if column.chosen_about else ""}most frequent: {"; ".join(shown)}</p>'


def _value(top: Top) -> str:
    value = number_text(top.value)
    return value if top.original is None else f"{value} = {top.original}"


def _plot(column: ColumnProfile, names: Sequence[str]) -> tuple[str, str]:
    """A column's plot, and its caption as HTML."""
    if column.histogram is not None and any(sum(part.bins) for part in column.parts.values()):
        low, high = _ends(column)
        what = {"lengths": "lengths", "times": "times"}.get(column.histogram.of, "values")
        scale = ", logarithmic" if column.histogram.scale == "log" else ""
        return _histogram(column, names, f"{what} from {low} to {high}"), f"{what}: {low} to {high}{scale}"
    if column.top:
        about = "≈ " if column.chosen_about else ""
        return _ranking(column, names), f"{about}most frequent values, share of rows"
    return _svg(f'<text x="{_W / 2}" y="50" text-anchor="middle" class="d">no values</text>', "no values"), ""


def _ends(column: ColumnProfile) -> tuple[str, str]:
    """The ends of what a column's histogram shows, over all splits."""
    parts = list(column.parts.values())
    if column.kind == "list":
        lengths = [part.lengths for part in parts if part.lengths is not None]
        return number_text(min(at.low for at in lengths)), number_text(max(at.high for at in lengths))
    lows, highs = ([x for x in ends if x is not None] for ends in zip(*((p.low, p.high) for p in parts), strict=True))
    if column.kind == "time":
        return _t(min(lows)[:19]), _t(max(highs)[:19])
    return _number(min(lows, key=float)), _number(max(highs, key=float))


def _svg(content: str, label: str, height: int = _H) -> str:
    return (
        f'<svg viewBox="0 0 {_W} {height}" role="img" aria-label="{escape(label, quote=True)}">'
        f"<title>{escape(label)}</title>{content}</svg>"
    )


def _histogram(column: ColumnProfile, names: Sequence[str], label: str) -> str:
    """Bars by bin: of each split beside the others, as shares of its values."""
    drawn = [(i, column.parts[name].bins) for i, name in enumerate(names) if name in column.parts]
    drawn = [(i, bins) for i, bins in drawn if sum(bins)]
    shares = [(i, [count / sum(bins) for count in bins]) for i, bins in drawn]
    most = max(max(bins) for _, bins in shares)
    number = len(shares[0][1])
    step = min(_W / number, 40.0)
    wide = step * 0.86 / len(shares)
    content = [f'<line class="axis" x1="0" x2="{_W}" y1="{_H - 1}" y2="{_H - 1}"/>']
    for k, (i, bins) in enumerate(shares):
        for j, share in enumerate(bins):
            if share:
                high = max(1.0, share / most * (_H - 4))
                x = j * step + step * 0.07 + k * wide
                content.append(
                    f'<rect class="f{i}" x="{x:.1f}" y="{_H - 1 - high:.1f}" width="{wide:.1f}" height="{high:.1f}"/>'
                )
    return _svg("".join(content), label)


def _ranking(column: ColumnProfile, names: Sequence[str]) -> str:
    """The most frequent values as bars to the right, those of the splits below each other."""
    top = column.top[:_TOP]
    drawn = [(i, name) for i, name in enumerate(names) if name in column.parts]
    most = max((top_.shares.get(name) or 0 for top_ in top for _, name in drawn), default=0) or 1
    row = 12 + 5 * len(drawn) + 5
    content = []
    for j, item in enumerate(top):
        y = j * row + 11
        shares = ", ".join(_share(item.shares.get(name)) for _, name in drawn)
        content.append(f'<text x="0" y="{y}">{_t(_value(item), 30) or "(empty)"}</text>')
        content.append(f'<text x="{_W}" y="{y}" text-anchor="end" class="d">{shares}</text>')
        for k, (i, name) in enumerate(drawn):
            wide = (item.shares.get(name) or 0) / most * _W
            if wide:
                content.append(
                    f'<rect class="f{i}" x="0" y="{y + 3 + 5 * k}" width="{max(1.0, wide):.1f}" height="4" rx="1"/>'
                )
    return _svg("".join(content), "most frequent values", len(top) * row)
