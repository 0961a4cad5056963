"""The profile of a data set as one HTML page: plots as inline SVG, no scripts, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from rechub_dist.data.parquet.outputs import check_file, whole_file
from rechub_dist.data.tools.figures import ColumnProfile, Overlap, Profile, Top, number_text, share_text
from rechub_dist.data.tools.leaks import LeakReport
from rechub_dist.data.tools.page import head, svg, table, text

_MARK: Final = '<meta name="generator" content="rechub-dist data inspect">'
_WHAT = "a page of rechub-dist data inspect"
_W, _H = 320, 96  # of a plot, in its own units
_TOP = 6  # values that are drawn
_SELDOM = 0.001  # share of rows below which no value is called frequent
_NONE = "-"


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
    parts = [head(found.path, _MARK), _summary(found)]
    if leaks is not None:
        parts.append(_leaks(leaks))
    parts += [_labels(found, names), _overlaps(found), '<h2 id="columns">Columns</h2>', _legend(names)]
    cards = "".join(_card(column, names) for column in found.columns)
    return f'{"".join(parts)}<div class="grid">{cards}</div></main></body></html>\n'


def _ours(path: Path) -> bool:
    with path.open("rb") as file:
        return _MARK.encode() in file.read(2000)


def _share(value: float | None) -> str:
    return escape(share_text(value))


def _number(value: Any) -> str:
    return text(number_text(value, 4), 40)


def _summary(found: Profile) -> str:
    rows = []
    for split in found.splits:
        ends = found.times.get(split.name)
        between = f"{text(ends[0])} to {text(ends[1])}" if ends else _NONE
        size = "" if split.row_group_rows is None else f"{split.row_group_rows[0]:,} to {split.row_group_rows[1]:,}"
        cells = [text(split.name or "all"), f"{split.rows:,}", f"{split.files:,}", _bytes(split.bytes)]
        rows.append([*cells, f"{split.row_groups:,}", size, between])
    headers = ["split", "rows", "files", "size", "row groups", "rows each", "time"]
    roles = found.roles
    named = [("user", roles.user), ("item", roles.item), ("time", roles.time), *(("label", x) for x in roles.labels)]
    taken = [f"{role}: {text(name)} ({text(roles.why[name])})" for role, name in named if name is not None]
    parts = [table(headers, rows), f'<p class="dim">{"; ".join(taken) or "no user, item, time or label is known"}</p>']
    parts += [f'<p class="warn">{text(note, 500)}</p>' for note in found.notes]
    parts += [f'<p class="warn">{text(split.warning, 500)}</p>' for split in found.splits if split.warning]
    return "".join(parts)


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def _leaks(report: LeakReport) -> str:
    items = [f'<li class="bad">{text(x.check)}: {text(x.text, 500)}</li>' for x in report.findings]
    parts = [f"<h2>Leaks</h2><ul>{''.join(items)}</ul>" if items else "<h2>Leaks</h2><p>None was found.</p>"]
    for title, checked in (("clean", report.clean), ("not checked", report.skipped)):
        listed = "".join(f"<li>{text(x.check)}: {text(x.text, 500)}</li>" for x in checked)
        if checked:
            parts.append(f"<details><summary>{title}: {len(checked)}</summary><ul>{listed}</ul></details>")
    return "".join(parts)


def _labels(found: Profile, names: Sequence[str]) -> str:
    if not found.labels:
        return ""
    rows = []
    for label in found.labels:
        if label.positive_rate is not None:
            rows.append([text(label.name), "positive", *(_share(label.positive_rate.get(name)) for name in names)])
            continue
        rows.append([text(label.name), "mean", *(_number(label.mean.get(name)) for name in names)])
        values = label.values or ()
        rows += [["", f"is {_number(x.value)}", *(_share(x.shares.get(name)) for name in names)] for x in values]
    return "<h2>Labels</h2>" + table(["label", "", *(text(name or "all") for name in names)], rows)


def _overlaps(found: Profile) -> str:
    if not found.overlaps:
        return ""
    rows = [[text(role), *_overlap(item)] for role, overlaps in found.overlaps.items() for item in overlaps]
    headers = ["", "split", "distinct", "not in train", "rows", "of these"]
    return "<h2>Users and items that train lacks</h2>" + table(headers, rows)


def _overlap(item: Overlap) -> list[str]:
    return [text(item.split), f"{item.distinct:,}", _share(item.cold), f"{item.rows:,}", _share(item.cold_rows)]


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    keys = " &nbsp; ".join(f'<span class="key k{i}"></span>{text(name)}' for i, name in enumerate(names))
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
        label = f'<span class="key k{i}"></span>{text(name)}' if name else "all"
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
    title = text(column.name) or "(no name)"
    return (
        f'<figure class="card"><h3>{title}</h3><div class="dim">{text(about, 120)}</div>{plot}'
        f'<figcaption class="dim">{caption}</figcaption>{table(headers, rows)}{top}</figure>'
    )


def _frequent(column: ColumnProfile, names: Sequence[str]) -> str:
    """The most frequent values as a line of text, with their shares in the first split that has the column."""
    name = next((name for name in names if name in column.parts and column.parts[name].rows), None)
    if name is None or not any((share or 0) >= _SELDOM for top in column.top for share in top.shares.values()):
        return ""
    shown = [f"{text(_value(top), 24)} {_share(top.shares.get(name))}" for top in column.top[:4]]
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
    return svg(f'<text x="{_W / 2}" y="50" text-anchor="middle" class="d">no values</text>', "no values", _W, _H), ""


def _ends(column: ColumnProfile) -> tuple[str, str]:
    """The ends of what a column's histogram shows, over all splits."""
    parts = list(column.parts.values())
    if column.kind == "list":
        lengths = [part.lengths for part in parts if part.lengths is not None]
        return number_text(min(at.low for at in lengths)), number_text(max(at.high for at in lengths))
    lows, highs = ([x for x in ends if x is not None] for ends in zip(*((p.low, p.high) for p in parts), strict=True))
    if column.kind == "time":
        return text(min(lows)[:19]), text(max(highs)[:19])
    return _number(min(lows, key=float)), _number(max(highs, key=float))


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
    return svg("".join(content), label, _W, _H)


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
        content.append(f'<text x="0" y="{y}">{text(_value(item), 30) or "(empty)"}</text>')
        content.append(f'<text x="{_W}" y="{y}" text-anchor="end" class="d">{shares}</text>')
        for k, (i, name) in enumerate(drawn):
            wide = (item.shares.get(name) or 0) / most * _W
            if wide:
                content.append(
                    f'<rect class="f{i}" x="0" y="{y + 3 + 5 * k}" width="{max(1.0, wide):.1f}" height="4" rx="1"/>'
                )
    return svg("".join(content), "most frequent values", _W, len(top) * row)
