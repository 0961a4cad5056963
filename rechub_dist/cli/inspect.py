"""What `rechub-dist data inspect` prints: the profile of a data set, and what the check for leaks has found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rechub_dist.data.tools.figures import ColumnProfile, Part, Profile, SplitProfile, Top, number_text, share_text
from rechub_dist.data.tools.leaks import LeakReport
from rechub_dist.errors import printable, shortened

WIDTH = 100
_BARS = " ▁▂▃▄▅▆▇█"
_BAR_CELLS = 12
_TOP = 3
_NONE = "-"


def show_profile(found: Profile) -> None:
    """Print a profile to stdout, in at most 100 columns."""
    console = _console()
    names = [split.name for split in found.splits]
    _line(console, Text(printable(found.path), "bold"))
    for split in found.splits:
        for line in _split_lines(split):
            _line(console, line)
    _line(console, f"taken as {_roles(found)}")
    for note in found.notes:
        _line(console, f"note: {printable(note)}")
    if found.labels:
        console.print(_labels(found, names))
    if any(found.times.values()):
        table = _table(
            f"time ({printable(str(found.roles.time))})", *(["split"] if names != [""] else []), "from", "to"
        )
        for name, ends in found.times.items():
            table.add_row(*([name] if names != [""] else []), *(ends or (_NONE, _NONE)))
        console.print(table)
    for role, overlaps in found.overlaps.items():
        column = getattr(found.roles, role)
        table = _table(
            f"{role}s ({printable(column)})", "split", "distinct", "not in train", "rows", "of these", right=True
        )
        for item in overlaps:
            table.add_row(
                item.split, f"{item.distinct:,}", share_text(item.cold), f"{item.rows:,}", share_text(item.cold_rows)
            )
        console.print(table)
    lists = [column for column in found.columns if column.kind == "list"]
    if lists:
        console.print(_lengths(lists, names))
    console.print(_columns(found, names, console.width))
    for split in found.splits:
        if split.warning is not None:
            _line(console, f"warning: {printable(split.warning)}")


def show_leaks(report: LeakReport) -> None:
    """Print what the check for leaks has found, and what it found clean."""
    console = _console()
    _line(console, Text("leaks", "bold"))
    for finding in report.findings:
        _line(console, f"found ({finding.check}): {printable(finding.text)}")
    for item in report.clean:
        _line(console, f"clean ({item.check}): {printable(item.text)}")
    for item in report.skipped:
        _line(console, f"not checked ({item.check}): {printable(item.text)}")


def bars(counts: Sequence[int]) -> str:
    """A histogram in a line of at most 12 characters: a space for no value, else a bar up to the highest."""
    width = max(1, -(-len(counts) // _BAR_CELLS))
    cells = [sum(counts[i : i + width]) for i in range(0, len(counts), width)]
    most = max(cells, default=0)
    if not most:
        return ""
    return "".join(_BARS[0 if not cell else max(1, round(cell / most * (len(_BARS) - 1)))] for cell in cells)


def _console() -> Console:
    console = Console(highlight=False)
    return Console(highlight=False, width=min(WIDTH, console.width) if console.is_terminal else WIDTH)


def _line(console: Console, text: str | Text) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _table(title: str, *headers: str, right: bool = False) -> Table:
    """A table; with `right`, all columns but the first are numbers."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=Text(title, "bold"), title_justify="left"
    )
    for place, header in enumerate(headers):
        table.add_column(Text(header), justify="right" if right and place else "left")
    return table


def _split_lines(split: SplitProfile) -> Iterable[str]:
    name = f"{split.name}: " if split.name else ""
    if not split.rows or split.row_group_rows is None or split.shuffle is None:
        yield f"{name}0 rows"
        return
    low, high = split.row_group_rows
    yield (
        f"{name}{split.rows:,} rows in {split.row_groups:,} row groups of {low:,} to {high:,} rows, "
        f"{split.files:,} file(s), {split.bytes:,} bytes"
    )
    found, run = split.shuffle, split.run
    yield (
        f"  shuffled in batches of {run.batch_size:,} on {run.ranks:,} rank(s): a batch has rows of "
        f"{found['groups_per_batch']:.0f} row groups, rank correlation of stored and read order "
        f"{found['rank_correlation']:+.3f}, {found['amplification']:.2f} rows decoded for each row read, at most "
        f"{found['peak_rows']:,} rows open on a rank"
    )


def _roles(found: Profile) -> str:
    roles = found.roles
    named = [("user", roles.user), ("item", roles.item), ("time", roles.time), *(("label", x) for x in roles.labels)]
    texts = [f"{role}: {printable(name)} ({printable(roles.why[name])})" for role, name in named if name is not None]
    missing = [f"--{role}" for role, name in named if name is None] + ([] if roles.labels else ["--label"])
    unknown = [f"nothing else; {', '.join(missing)} name columns"] if missing else []
    return "; ".join([*texts, *unknown])


def _labels(found: Profile, names: list[str]) -> Table:
    table = _table("labels", "label", "figure", *(name or "all" for name in names), right=True)
    table.columns[1].justify = "left"
    for label in found.labels:
        title = _text(label.name, 24)
        if label.positive_rate is not None:
            table.add_row(title, "positive rate", *(share_text(label.positive_rate.get(name)) for name in names))
            continue
        table.add_row(title, "mean", *(number_text(label.mean.get(name)) for name in names))
        for top in label.values or ():
            table.add_row(
                "", f"share of {number_text(top.value)}", *(share_text(top.shares.get(name)) for name in names)
            )
    return table


def _lengths(lists: Sequence[ColumnProfile], names: list[str]) -> Table:
    table = _table("lengths of lists", "column", "split", "min", "median", "p95", "max", "mean", "empty", right=True)
    table.columns[1].justify = "left"
    for column in lists:
        title: Text | str = _text(column.name, 30)
        for name in names:
            part = column.parts.get(name)
            if part is not None and part.lengths is not None:
                at = part.lengths
                figures = [number_text(x) for x in (at.low, at.median, at.p95, at.high)]
                table.add_row(title, name or "all", *figures, f"{at.mean:,.1f}", share_text(at.empty))
                title = ""
    return table


def _columns(found: Profile, names: list[str], width: int) -> Table:
    """The table of columns: a line for each split, the frequent values beside them in what is left of the width."""
    headers = ["column", *([] if names == [""] else ["split"]), "nulls", "distinct", "mean", "histogram", "top values"]
    rows = [_cells(column, names) for column in found.columns]
    widths = [len(header) for header in headers[:-1]]
    for cells in rows:
        widths = [max(wide, *(line.cell_len for line in lines)) for wide, lines in zip(widths, cells, strict=True)]
    rest = max(16, width - 2 - sum(widths) - 2 * len(widths))
    table = _table("columns")
    for header, wide in zip(headers, [*widths, rest], strict=True):
        justify: Any = "right" if header in ("nulls", "distinct", "mean") else "left"
        table.add_column(header, width=wide, no_wrap=True, justify=justify)
    for column, cells in zip(found.columns, rows, strict=True):
        top = [_top(column, item, names, rest) for item in column.top[:_TOP]]
        table.add_row(*(Text("\n").join(lines) for lines in [*cells, top]))
        table.add_row()
    return table


def _cells(column: ColumnProfile, names: list[str]) -> list[list[Text]]:
    """The lines of a column's cells, but for the frequent values."""
    parts = [column.parts.get(name) for name in names]
    first = next(part for part in parts if part is not None)
    return [
        [_text(column.name, 22), Text(shortened(_kind(column, first), 22), "dim")],
        *([] if names == [""] else [[Text(name) for name in names]]),
        [Text(_nulls(part)) for part in parts],
        [Text(_distinct(part)) for part in parts],
        [
            Text("" if part is None or part.mean is None else number_text(part.mean, 3 if abs(part.mean) < 1 else 4))
            for part in parts
        ],
        [*(Text("" if part is None else bars(part.bins), "cyan") for part in parts), *_range(column, parts)],
    ]


def _kind(column: ColumnProfile, part: Part) -> str:
    kinds = [use for use in column.uses if use != column.kind]
    short = part.type.replace("element: ", "").replace("dictionary<values=", "").partition(", indices")[0]
    return printable(" ".join([short, *(f"· {kind}" for kind in kinds)]))


def _nulls(part: Part | None) -> str:
    if part is None:
        return _NONE
    return f"{part.nulls:,}" + (f"+{part.nans:,} NaN" if part.nans else "")


def _distinct(part: Part | None) -> str:
    return _NONE if part is None else f"{'≈' if part.about else ''}{part.distinct:,}"


def _range(column: ColumnProfile, parts: Sequence[Part | None]) -> list[Text]:
    """The range of a column over all splits, and the scale of the histogram where it is not linear."""
    if column.histogram is None:
        return []
    known = [part for part in parts if part is not None and part.low is not None]
    lengths = [part.lengths for part in parts if part is not None and part.lengths is not None]
    if column.kind == "list":
        text = f"{min(at.low for at in lengths):,} to {max(at.high for at in lengths):,} long"
    elif column.kind == "time":
        text = f"{min(part.low for part in known)[:10]}..{max(part.high for part in known)[:10]}"
    else:
        ends = min((part.low for part in known), key=float), max((part.high for part in known), key=float)
        text = " to ".join(f"{x:,}" if isinstance(x, int) and abs(x) < 10**9 else f"{float(x):.3g}" for x in ends)
    return [Text(f"{text} (log)" if column.histogram.scale == "log" else text, "dim")]


def _top(column: ColumnProfile, top: Top, names: Sequence[str], width: int) -> Text:
    """A frequent value and its share in each split."""
    value = number_text(top.value) if top.original is None else f"{top.value} = {top.original}"
    about = "≈" if column.chosen_about else ""
    shares = " ".join(_percent(top.shares.get(name)) for name in names)
    return Text.assemble(about, _text(value, width - len(shares) - 3), " ", (f"{shares}%", "dim"))


def _percent(value: float | None) -> str:
    """A share in percent, without the sign, in three characters at most."""
    if value is None or not 0 < value < 0.0995:
        return "-" if value is None else f"{100 * value:.0f}"
    return "<.1" if value < 0.001 else f"{100 * value:.1f}"


def _text(value: str, width: int) -> Text:
    """A value of the data, on one line, cut."""
    text = Text(printable(value) or "''")
    text.truncate(max(6, width), overflow="ellipsis")
    return text
