"""The report of one run or several as one HTML page: plots as inline SVG, no scripts, nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from rechub_dist.config.strict_yaml import dump_yaml
from rechub_dist.data.parquet.outputs import check_file, whole_file
from rechub_dist.data.tools.figures import number_text
from rechub_dist.data.tools.page import head, svg, table, text
from rechub_dist.inference.report import Histogram, RunReport, Scores, differences

MOST_RUNS: Final = 4  # as many colours as the style has
_MARK: Final = '<meta name="generator" content="rechub-dist report">'
_WHAT: Final = "a page of rechub-dist report"
_W, _H = 330, 190  # of a plot, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 10, 22  # its margins
_MOST_TABLES = 24  # whose norms are drawn
_NO_METRICS = ("step", "epoch", "split", "samples_per_second", "rows_skipped")
_LINES: Final = """<style>
.l0{stroke:var(--s0)}.l1{stroke:var(--s1)}.l2{stroke:var(--s2)}.l3{stroke:var(--s3)}
polyline{fill:none;stroke-width:1.6;stroke-linejoin:round}.even{stroke:var(--dim);stroke-dasharray:3 3}
pre{overflow-x:auto;font-size:.82rem;background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:12px}
</style>"""

Line = tuple[str, Sequence[float], Sequence[float]]  # name, x, y


def check_report(path: Path) -> None:
    """Raise UserError if `write_report` may not write a file."""
    check_file(path, _ours, _WHAT)


def write_report(path: Path, runs: Sequence[RunReport]) -> None:
    """Write the page. Raises UserError if the file is there and no such page, or cannot be written."""
    with whole_file(path, _ours, _WHAT) as file:
        file.write_text(page(runs), encoding="utf-8")


def page(runs: Sequence[RunReport]) -> str:
    """The page as HTML; with several runs, of all in the same plots."""
    names = _names(runs)
    title = ", ".join(f"{run.config['model']['name']} in {name}" for run, name in zip(runs, names, strict=True))
    parts = [head(title, _MARK), _LINES]
    if len(runs) > 1:
        keys = (f'<span class="key k{i}"></span>{text(name)}' for i, name in enumerate(names))
        parts.append(f'<p class="dim">{" &nbsp; ".join(keys)}</p>')
    several = len(runs) > 1
    for run, name in zip(runs, names, strict=True):
        prefix = f"{text(name)}: " if several else ""
        parts += [f'<p class="warn">{prefix}{text(note, 500)}</p>' for note in run.notes]
    parts += [_metrics(runs, names), _curves(runs, names), _speed(runs, names)]
    for run, name in zip(runs, names, strict=True):
        of = f" of {text(name)}" if several else ""
        parts += [_scores(run, of), _norms(run, of)]
    if several:
        parts.append(_differences(runs, names))
    for run, name in zip(runs, names, strict=True):
        of = f" of {text(name)}" if several else ""
        data = run.config["data"]
        given = [f"{key}: {data[key]}" for key in ("root", "train", "valid", "test") if data.get(key)]
        parts.append(f'<h2>Configuration{of}</h2><p class="dim">{text("; ".join(given), 1000)}</p>')
        parts.append(
            f"<details><summary>all keys</summary><pre>{text(dump_yaml(run.config, 100), 200_000)}</pre></details>"
        )
    return "".join(parts) + "</main></body></html>\n"


def _ours(path: Path) -> bool:
    with path.open("rb") as file:
        return _MARK.encode() in file.read(2000)


def _names(runs: Sequence[RunReport]) -> list[str]:
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _number(value: Any) -> str:
    return text(number_text(value, 4) if isinstance(value, int | float) else value, 60)


def _metrics(runs: Sequence[RunReport], names: Sequence[str]) -> str:
    """The metrics of the best step on each split."""
    rows = []
    columns = list(
        dict.fromkeys(k for run in runs for split in ("valid", "test") for one in run.of(split)[-1:] for k in one)
    )
    columns = [name for name in columns if name not in _NO_METRICS]
    for run, name in zip(runs, names, strict=True):
        for split in ("valid", "test"):
            found = run.of(split)
            if found:
                chosen = next((one for one in found if one["step"] == run.best_step), found[-1])
                best = " (best)" if chosen["step"] == run.best_step else ""
                first = f"{text(name)}, {split}" if len(runs) > 1 else split
                rows.append(
                    [first, f"{chosen['step']:,}{best}", *(_number(chosen.get(column, "-")) for column in columns)]
                )
    if not rows:
        return '<h2>Metrics</h2><p class="dim">No evaluation has been made.</p>'
    return "<h2>Metrics</h2>" + table(["split", "step", *map(text, columns)], rows)


def _curves(runs: Sequence[RunReport], names: Sequence[str]) -> str:
    """The loss in training, and each metric on valid, by step."""
    cards = [_by_step(runs, names, "train", "loss", "training loss")]
    metrics = dict.fromkeys(key for run in runs for one in run.of("valid") for key in one if key not in _NO_METRICS)
    cards += [_by_step(runs, names, "valid", metric, f"{metric} on valid") for metric in metrics]
    cards.append(_by_step(runs, names, "train", "learning_rate", "learning rate"))
    return f'<h2>Curves</h2><div class="grid">{"".join(cards)}</div>'


def _speed(runs: Sequence[RunReport], names: Sequence[str]) -> str:
    """Samples per second, and where a step's time went."""
    card = _by_step(runs, names, "train", "samples_per_second", "samples per second in training")
    rows = []
    for run, name in zip(runs, names, strict=True):
        of = f"{text(name)}: " if len(runs) > 1 else ""
        for one in run.of("time")[-1:]:
            parts = {key: value for key, value in one.items() if key not in ("step", "epoch", "split")}
            whole = sum(parts.values()) or 1.0
            rows += [[of + text(part), f"{1e3 * x:.2f} ms", f"{x / whole:.0%}"] for part, x in parts.items()]
        saves = [one["seconds"] for one in run.of("checkpoint") if "seconds" in one]
        if saves:
            rows.append([f"{of}a checkpoint, of {len(saves)}", f"{1e3 * sum(saves) / len(saves):,.0f} ms", "-"])
    times = table(["of the last profiled step", "time", "share"], rows) if rows else ""
    return f'<h2>Speed</h2><div class="grid">{card}{times}</div>'


def _by_step(runs: Sequence[RunReport], names: Sequence[str], split: str, key: str, title: str) -> str:
    lines: list[Line] = []
    for run, name in zip(runs, names, strict=True):
        found = [(one["step"], one[key]) for one in run.of(split) if isinstance(one.get(key), int | float)]
        lines.append((name, [x for x, _ in found], [y for _, y in found]))
    if not any(x for _, x, _ in lines):
        return ""
    marks = [run.best_step for run in runs] if split == "valid" else [None] * len(runs)
    caption = ""
    if len(runs) == 1:
        last = lines[0][2][-1]
        best = next((y for x, y in zip(lines[0][1], lines[0][2], strict=True) if x == marks[0]), None)
        caption = f"last {number_text(last, 4)}" + (
            f"; at the best step {number_text(best, 4)}" if best is not None else ""
        )
    return _card(title, _plot(lines, f"{title} by step", marks), caption)


def _card(title: str, plot: str, caption: str) -> str:
    below = f'<figcaption class="dim">{text(caption, 400)}</figcaption>'
    return f'<figure class="card"><h3>{text(title)}</h3>{plot}{below}</figure>'


def _plot(lines: Sequence[Line], label: str, marks: Sequence[float | None] = ()) -> str:
    """Lines over a common frame; not-a-number is left out."""
    points = [
        (x, y) for _, xs, ys in lines for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)
    ]
    if not points:
        return svg(f'<text x="{_W / 2}" y="{_H / 2}" text-anchor="middle" class="d">no values</text>', label, _W, _H)
    (x0, x1), (y0, y1) = (_range([point[i] for point in points]) for i in (0, 1))

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x0) / (x1 - x0) * (_W - _LEFT - _RIGHT)
        return across, _H - _BOTTOM - (y - y0) / (y1 - y0) * (_H - _TOP - _BOTTOM)

    parts = [_frame((x0, x1), (y0, y1))]
    for number, (_, xs, ys) in enumerate(lines):
        there = [at(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in _thinned(there))
        parts.append(f'<polyline class="l{number % MOST_RUNS}" points="{drawn}"/>')
        best = marks[number] if number < len(marks) else None
        shown = (
            there
            if len(there) == 1
            else [at(x, y) for x, y in zip(xs, ys, strict=True) if x == best and math.isfinite(y)]
        )
        parts += [f'<circle class="f{number % MOST_RUNS}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in shown]
    return svg("".join(parts), label, _W, _H)


def _frame(across: tuple[float, float], up: tuple[float, float]) -> str:
    left, right, top, bottom = _LEFT, _W - _RIGHT, _TOP, _H - _BOTTOM
    middle = (top + bottom) / 2
    rules = "".join(f'<line class="axis" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>' for y in (top, middle, bottom))
    ends = zip((bottom, middle, top), _ticks((up[0], sum(up) / 2, up[1])), strict=True)
    words = "".join(f'<text class="d" x="{left - 4}" y="{y + 4}" text-anchor="end">{tick}</text>' for y, tick in ends)
    first, last = _ticks(across)
    return (
        f'{rules}{words}<text class="d" x="{left}" y="{_H - 6}">{first}</text>'
        f'<text class="d" x="{right}" y="{_H - 6}" text-anchor="end">{last}</text>'
    )


def _ticks(values: Sequence[float]) -> list[str]:
    """Short forms of an axis's values, with as many digits as tell them apart."""
    for digits in range(3, 7):
        found = [_short(value, digits) for value in values]
        if len(set(found)) == len(values):
            break
    return found


def _short(value: float, digits: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.{digits}g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05)


def _thinned(points: Sequence[tuple[float, float]], most: int = 600) -> Iterable[tuple[float, float]]:
    """At most so many points, the last among them: a curve of a million steps has no more to show."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _scores(run: RunReport, of: str) -> str:
    if not run.scores:
        return ""
    cards = []
    for label, found in run.scores.items():
        if found.calibration is not None:
            cards.append(_calibration(label, found))
        cards.append(_card(f"{label}: scores", _bars(found), _of_bars(found)))
    first = f'<h2>Scores{of}</h2><p class="dim">The best weights on {text(run.scored_on)}</p>'
    return f'{first}<div class="grid">{"".join(cards)}</div>'


def _calibration(label: str, found: Scores) -> str:
    assert found.calibration is not None
    predicted, observed, rows = found.calibration
    end = float(max(predicted.max(), observed.max()) * 1.02) or 1.0
    even = f'<polyline class="even" points="{_LEFT},{_H - _BOTTOM} {_W - _RIGHT},{_TOP}"/>'
    across, up = _W - _LEFT - _RIGHT, _H - _TOP - _BOTTOM
    there = [(_LEFT + p / end * across, _H - _BOTTOM - o / end * up) for p, o in zip(predicted, observed, strict=True)]
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in there)
    dots = "".join(f'<circle class="f0" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in there)
    plot = svg(
        f'{_frame((0, end), (0, end))}{even}<polyline class="l0" points="{drawn}"/>{dots}',
        f"{label}: calibration",
        _W,
        _H,
    )
    error = float(np.abs(predicted - observed) @ rows / rows.sum())
    caption = f"observed by predicted rate, each point of as many rows; expected calibration error {error:.4f}"
    return _card(f"{label}: calibration", plot, caption)


def _bars(found: Scores) -> str:
    """Shares of rows by bin, each class on its own."""
    shares = found.counts / np.maximum(found.counts.sum(axis=1, keepdims=True), 1e-12)
    high, bins = float(shares.max()) or 1.0, found.counts.shape[1]
    wide, up = (_W - _LEFT - _RIGHT) / bins, _H - _TOP - _BOTTOM
    each = wide / len(shares)
    bars = "".join(
        f'<rect class="f{kind}" x="{_LEFT + place * wide + kind * each:.1f}" width="{max(each - 0.6, 0.5):.1f}" '
        f'y="{_H - _BOTTOM - share / high * up:.1f}" height="{share / high * up:.1f}"/>'
        for kind, row in enumerate(shares)
        for place, share in enumerate(row)
    )
    frame = _frame((float(found.edges[0]), float(found.edges[-1])), (0, high))
    return svg(frame + bars, "scores of rows", _W, _H)


def _of_bars(found: Scores) -> str:
    if len(found.counts) == 1:
        return f"{found.counts.sum():,.0f} rows (by weight)"
    negative, positive = found.counts.sum(axis=1)
    return f"share of its class in each bin; first colour: {negative:,.0f} negatives, second: {positive:,.0f} positives"


def _norms(run: RunReport, of: str) -> str:
    """Norms of table rows: dead tables and exploding ones show at a glance."""
    if not run.norms:
        return ""
    cards = [
        _card(name, _bars(_as_scores(one)), f"step {one.step:,}")
        for name, one in list(run.norms.items())[:_MOST_TABLES]
    ]
    more = (
        "" if len(run.norms) <= _MOST_TABLES else f'<p class="dim">and {len(run.norms) - _MOST_TABLES} more tables</p>'
    )
    return (
        f'<details><summary><h2 style="display:inline">Norms of table rows{of}</h2></summary>'
        f'<p class="dim">of the first rank\'s rows</p><div class="grid">{"".join(cards)}</div>{more}</details>'
    )


def _as_scores(one: Histogram) -> Scores:
    """Its bins, made equal in width."""
    limits = np.concatenate([[0.0], one.limits])
    edges = np.linspace(0.0, float(limits[-1]) or 1.0, 31)
    done = np.concatenate([[0.0], np.cumsum(one.counts)])
    return Scores(edges, np.diff(np.interp(edges, limits, done))[None], None)


def _differences(runs: Sequence[RunReport], names: Sequence[str]) -> str:
    found: Mapping[str, list[str]] = differences(runs)
    if not found:
        return '<h2>Differences</h2><p class="dim">Their configurations differ in output_dir alone.</p>'
    rows = [[text(key), *(text(value, 120) for value in values)] for key, values in found.items()]
    return "<h2>Differences</h2>" + table(["key", *map(text, names)], rows)
