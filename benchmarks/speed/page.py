"""docs/performance.md, from records: a table a part, targets beside figures, and plots."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from speed.record import Figure, Record

BEGIN = "<!-- from here to the end mark `make bench` writes -->"
END = "<!-- end -->"
_BAR = 40


def write(document: Path, records: Sequence[Record]) -> None:
    """Put what the records say between the marks, and plots beside the page, where matplotlib is installed.

    Raises:
        ValueError: no marks in the page, or no record.
    """
    text = document.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{document} must have once each the lines\n{BEGIN}\n{END}")
    if not records:
        raise ValueError("there are no records: measure first, with the same --out")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    body = [about(records), summary(records)]
    aimed = [(record, figure) for record in records for figure in record.figures if figure.target is not None]
    if importlib.util.find_spec("matplotlib") is None:
        body.append(bars(aimed))
    elif aimed:
        from speed.plots import draw  # noqa: PLC0415 - matplotlib may not be installed

        pictures = draw(records, document.parent / "images")
        body += [f"![{title}](images/{name})" for name, title in pictures.items()]
    body += [section(record) for record in records]
    written = "\n\n".join(part for part in body if part)
    document.write_text(f"{before}{BEGIN}\n\n{written}\n\n{END}{after}", encoding="utf-8")


def about(records: Sequence[Record]) -> str:
    """Versions, hardware and commit, and which parts are of others."""
    first = records[0]
    lines = []
    if any(record.smoke for record in records):
        lines.append("**These are figures of `--smoke`, which only show that the suite works.**\n")
    lines.append(", ".join(f"{name} {value}" for name, value in first.machine.items()) + f"; commit {first.commit}.")
    for record in records[1:]:
        other = {name: value for name, value in record.machine.items() if first.machine.get(name) != value}
        if other or record.commit != first.commit:
            said = ", ".join([*(f"{name} {value}" for name, value in other.items()), f"commit {record.commit}"])
            lines.append(f"Part {record.part}: {said}.")
    return "\n".join(lines)


def summary(records: Iterable[Record]) -> str:
    """The targets, and which of them are met."""
    rows = ["| part | | median | min-max | target | |", "|---|---|---|---|---|---|"]
    for record in records:
        for figure in (one for one in record.figures if one.target is not None):
            what = f"{figure.group}: {figure.name}" if figure.group else figure.name
            rows.append(f"| {record.part} | {what} | {_cells(figure)} |")
        if record.failed is not None:
            rows.append(f"| {record.part} | failed: {_plain(record.failed)} | | | | |")
    return "## Targets\n\n" + "\n".join(rows) if len(rows) > 2 else ""


def bars(aimed: Sequence[tuple[Record, Figure]]) -> str:
    """How far each target is reached, as text: a full bar has reached it."""
    lines = []
    for record, figure in aimed:
        assert figure.target is not None
        reached = _reached(figure)
        lines.append(f"{record.part} {'█' * round(_BAR * min(reached, 1)):<{_BAR}} {reached:6.2f}  {figure.name}")
    return "```text\n" + "\n".join(lines) + "\n```" if lines else ""


def _reached(figure: Figure) -> float:
    """The median as a share of the target, or the other way round of an upper bound: from 1 up it is met."""
    assert figure.target is not None
    over, under = (figure.target, figure.median) if figure.at_most else (figure.median, figure.target)
    if under == 0:
        return 1.0
    return 0.0 if math.isnan(figure.median) else over / under


def section(record: Record) -> str:
    """A part: its tables, notes and text."""
    load = " ".join(f"{value:.1f}" for value in record.load)
    parts = [
        f"## {record.part}. {record.title}",
        f"{record.rounds} round(s), {record.seconds / 60:.0f} min, begun {record.began} at a load average of {load}; "
        f"`python benchmarks/suite.py {record.part}`.",
    ]
    for group in dict.fromkeys(figure.group for figure in record.figures):
        rows = [f"| {group} | unit | median | min-max | target | |", "|---|---|---|---|---|---|"]
        for figure in (one for one in record.figures if one.group == group):
            unit = "" if figure.unit == "ratio" else figure.unit
            rows.append(f"| {figure.name} | {unit} | {_cells(figure)} |")
        parts.append("\n".join(rows))
    parts += record.notes
    if record.text:
        parts.append("```text\n" + "\n".join(record.text) + "\n```")
    if record.failed is not None:
        parts.append(f"**Failed**: {_plain(record.failed)}")
    return "\n\n".join(parts)


def _cells(figure: Figure) -> str:
    low, high = figure.spread
    spread = f"{number(low)}-{number(high)}" if len(figure.values) > 1 else ""
    target = "" if figure.target is None else f"{'at most' if figure.at_most else 'at least'} {number(figure.target)}"
    word = {None: "", True: "met", False: "**missed**"}[figure.met]
    return f"{number(figure.median)} | {spread} | {target} | {word}"


def number(value: float) -> str:
    """With as many digits as are worth reading."""
    if math.isnan(value):
        return "none"
    if value and abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _plain(text: str) -> str:
    """Nothing that a table's cell would take for its end."""
    return text.replace("|", "/").replace("\n", " ")
