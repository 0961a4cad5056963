"""Looks for leaks in a data set: what a model could learn in training that it will not know when it serves.

Checks: the times of the splits do not overlap; no row is in two splits; no feature alone predicts a label; histories
end before their row, and without its item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations, pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rechub_dist.data.tools.roles import Roles, comparable, find_roles
from rechub_dist.data.tools.tables import NUMBERS, Column, Progress, Tables, kind_of
from rechub_dist.reporting.strict_json import finite

AUC: Final = 0.99  # of one feature alone, from which it is suspect
SAMPLE_ROWS: Final = 200_000
_ROWS_PER_VALUE = 20  # with fewer, on average, the mean of a value's labels says little
_NEARLY_ALL = 0.9  # share of histories that end with the row's item from which that is no chance
_NO_FEATURE = {"weight", "weights", "times", "time"}
Floats = NDArray[np.float64]


@dataclass
class Finding:
    """A leak: `text` is one line, `figures` what it says in numbers."""

    check: str
    text: str
    figures: dict[str, Any]


@dataclass
class Checked:
    """What a check found clean, or why it could not be made."""

    check: str
    text: str


@dataclass
class LeakReport:
    """What was found; what is clean; and what was not checked, with the reason."""

    findings: list[Finding] = field(default_factory=list)
    clean: list[Checked] = field(default_factory=list)
    skipped: list[Checked] = field(default_factory=list)

    def tree(self) -> dict[str, Any]:
        """As objects of JSON."""
        return dict(finite(asdict(self)))


def check_leaks(
    path: str,
    *,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    labels: tuple[str, ...] = (),
    sample: int | None = None,
    progress: Progress | None = None,
) -> LeakReport:
    """Check a prepared folder, or other Parquet data; for the parameters see `Tables` and `find_roles`.

    Raises:
        UserError: the data cannot be read, or a column does not exist.
    """
    with Tables(path, sample=sample, progress=progress) as tables:
        return find_leaks(tables, find_roles(tables, user=user, item=item, time=time, labels=labels), progress)


def find_leaks(tables: Tables, roles: Roles, progress: Progress | None = None) -> LeakReport:
    """Check tables that are open. Raises UserError if they cannot be read."""
    report = LeakReport()
    tell = progress or (lambda *_: None)
    checks = (_check_times, _check_rows, _check_features, _check_histories)
    for done, (check, what) in enumerate(zip(checks, ("times", "rows", "features", "histories"), strict=True)):
        tell(f"leaks: {what}", done, len(checks))
        check(tables, roles, report)
    return report


def _splits(tables: Tables) -> list[int]:
    """The splits to compare, in the order of training; train_prefixes has the rows of train once more."""
    return [s for s, split in enumerate(tables.splits) if split.name in ("train", "valid", "test") and split.rows]


def _check_times(tables: Tables, roles: Roles, report: LeakReport) -> None:
    column = next((column for column in tables.columns if column.name == roles.time), None)
    splits = [s for s in _splits(tables) if column is not None and column.types[s] is not None]
    if column is None or len(splits) < 2:
        why = "there is no time column; name it with --time" if column is None else "there is one split"
        report.skipped.append(Checked("time", why))
        return
    known = f"SELECT s, v FROM ({tables.values(column, splits)}) WHERE v IS NOT NULL"
    known += " AND isfinite(v)" if column.kind == "float" else ""
    ends = {s: (low, high) for s, low, high in tables.rows(
        f"SELECT s, CAST(min(v) AS VARCHAR), CAST(max(v) AS VARCHAR) FROM ({known}) GROUP BY s"
    )}  # fmt: skip
    for s, later in pairwise([s for s in splits if s in ends]):
        one, other = tables.splits[s].name, tables.splits[later].name
        [(after, of, before, of_other)] = tables.rows(
            f"WITH t AS ({known}), a AS (SELECT max(v) AS v FROM t WHERE s = {s}), b AS (SELECT min(v) AS v FROM t "
            f"WHERE s = {later}) "
            f"SELECT count(*) FILTER (WHERE s = {s} AND t.v > b.v), count(*) FILTER (WHERE s = {s}), "
            f"count(*) FILTER (WHERE s = {later} AND t.v < a.v), count(*) FILTER (WHERE s = {later}) FROM t, a, b"
        )
        if not after:
            text = f"{one} ends at {ends[s][1]}, {other} begins at {ends[later][0]}"
            report.clean.append(Checked("time", text))
            continue
        text = (
            f"{one} ends at {ends[s][1]}, after {other} begins at {ends[later][0]}: {after:,} of {of:,} rows of {one} "
            f"are later than the first of {other}, {before:,} of {of_other:,} of {other} earlier than the last of {one}"
        )
        figures = {"split": one, "later": other, "column": column.name, "end": ends[s][1], "begin": ends[later][0]}
        figures |= {"rows_after": after, "rows": of, "rows_before": before, "later_rows": of_other}
        report.findings.append(Finding("time", text, figures))


def _check_rows(tables: Tables, roles: Roles, report: LeakReport) -> None:
    splits = _splits(tables)
    if len(splits) < 2:
        report.skipped.append(Checked("rows", "there is one split"))
        return
    names = {column.name for column in _features(tables, roles)} | {roles.time, roles.user, roles.item}
    columns = [c for c in tables.columns if c.name in names and all(c.types[s] is not None for s in splits)]
    if not columns:
        report.skipped.append(Checked("rows", "the splits have no feature in common"))
        return
    in_sample = " (in the sample)" if tables.sampled else ""
    for s in splits:
        row = ", ".join(f"CAST({column.sql} AS {column.type})" for column in columns)
        tables.rows(
            f"CREATE OR REPLACE TEMP TABLE hashed{s} AS SELECT hash({row}) AS h, count(*) AS n FROM split{s} GROUP BY h"
        )
    for s, other in combinations(splits, 2):
        one, two = tables.splits[s].name, tables.splits[other].name
        [(twice, rows)] = tables.rows(
            f"SELECT coalesce(sum(n) FILTER (WHERE h IN (SELECT h FROM hashed{s})), 0), sum(n) FROM hashed{other}"
        )
        [(own,)] = tables.rows(f"SELECT coalesce(sum(n) FILTER (WHERE n > 1), 0) / sum(n) FROM hashed{s}")
        if not twice:
            text = f"no row of {two} is in {one}, by {len(columns)} columns{in_sample}"
            report.clean.append(Checked("rows", text))
            continue
        text = (
            f"{int(twice):,} of {int(rows):,} rows of {two} ({twice / rows:.2%}) are also in {one}, equal in "
            f"{len(columns)} columns{in_sample}; within {one}, {own:.2%} of the rows have an equal"
        )
        figures = {"split": two, "also_in": one, "rows": int(rows), "equal": int(twice), "equal_within": float(own)}
        report.findings.append(Finding("rows", text, {**figures, "columns": [column.name for column in columns]}))


def _features(tables: Tables, roles: Roles) -> list[Column]:
    """The columns that a model may see: those of the schema, or all but labels, times and what is named a weight."""
    columns = [column for column in tables.columns if column.name not in roles.labels and column.kind != "null"]
    if roles.features:
        return [c for c in columns if any(use not in _NO_FEATURE for use in roles.features.get(c.name, ()))]
    return [column for column in columns if column.name != roles.time and "weight" not in column.name.casefold()]


def _check_features(tables: Tables, roles: Roles, report: LeakReport) -> None:
    s = next(s for s, split in enumerate(tables.splits) if split.rows)
    labels = [c for c in tables.columns if c.name in roles.labels and c.types[s] is not None]
    columns = [column for column in _features(tables, roles) if column.types[s] is not None]
    if not labels or not columns:
        report.skipped.append(Checked("features", "there is no label; name it with --label"))
        return
    tables.sample(s, SAMPLE_ROWS)
    for label in labels:
        target, what = _target(tables, label, str(label.types[s]))
        if target is None:
            report.skipped.append(Checked("features", f"{label.name!r} {what}"))
            continue
        scores: dict[str, tuple[float, str, int]] = {}
        few: list[str] = []
        for column in columns:
            found = _score(tables, column, str(column.types[s]), target, few)
            if found is not None:
                scores[column.name] = found
        suspect = {name: found for name, found in scores.items() if found[0] > AUC}
        for name, (auc, how, rows) in sorted(suspect.items(), key=lambda item: -item[1][0]):
            text = f"{name!r} alone predicts {what} with an AUC of {auc:.4f} ({how}; {rows:,} rows)"
            figures = {"column": name, "label": label.name, "auc": auc, "how": how, "rows": rows}
            report.findings.append(Finding("features", text, figures))
        if len(scores) > len(suspect):
            rest = {name: found for name, found in scores.items() if name not in suspect}
            best = max(rest, key=lambda name: rest[name][0])
            text = f"{len(rest)} features, each alone against {what}: AUC up to {rest[best][0]:.4f} ({best!r})"
            report.clean.append(Checked("features", text))
        if few:
            listed = ", ".join(few[:10]) + (f" and {len(few) - 10} more" if len(few) > 10 else "")
            text = (
                f"against {what}, by the mean of each value, with fewer than {_ROWS_PER_VALUE} rows a value: {listed}"
            )
            report.skipped.append(Checked("features", text))


def _target(tables: Tables, label: Column, type_: str) -> tuple[str | None, str]:
    """SQL that is true for positives, null without a label; and what it is in words. None for a constant label."""
    kind = kind_of(type_)
    if kind not in (*NUMBERS, "bool"):
        return None, "is not a number"
    value = f"CAST({label.sql} AS DOUBLE)"
    value = f"CASE WHEN isfinite({value}) THEN {value} END"
    [(low, median, high, values)] = tables.rows(
        f"SELECT min(y), quantile_disc(y, 0.5), max(y), count(DISTINCT y) FROM (SELECT {value} AS y FROM sample)"
    )
    if values < 2:
        return None, "has one value in the sample"
    if values == 2:
        return f"({value}) = {high!r}::DOUBLE", f"{label.name!r}"
    limit = median if median < high else low
    return f"({value}) > {limit!r}::DOUBLE", f"{label.name!r} above {limit:.6g}"


def _score(tables: Tables, column: Column, type_: str, target: str, few: list[str]) -> tuple[float, str, int] | None:
    """(the better AUC by rank or by the mean of each value, which of them, rows); None if neither says anything."""
    kind = kind_of(type_)
    lists = kind == "list"
    value = f"len({column.sql})" if lists else column.sql
    rows = tables.rows(
        f"SELECT sum(CAST(y AS INTEGER)) FILTER (WHERE f = 0), count(*) FILTER (WHERE f = 0), "
        f"sum(CAST(y AS INTEGER)) FILTER (WHERE f = 1), count(*) FILTER (WHERE f = 1) FROM "
        f"(SELECT {value} AS v, {target} AS y, position % 2 AS f FROM sample) WHERE y IS NOT NULL "
        f"GROUP BY v ORDER BY v NULLS FIRST"
    )
    counts = np.array([[number or 0 for number in row] for row in rows], np.float64).reshape(-1, 4)
    positives, all_ = counts[:, 0] + counts[:, 2], counts[:, 1] + counts[:, 3]
    found: list[tuple[float, str]] = []
    if kind not in ("text", "binary", "other"):
        auc = _auc(positives, all_ - positives)
        found.append((max(auc, 1 - auc), "by its length" if lists else "by its rank"))
    if kind in ("integer", "text", "binary", "other"):
        if all_.sum() >= _ROWS_PER_VALUE * len(all_):
            found.append((_auc_of_means(counts), "by the mean label of each value, over other rows"))
        else:
            few.append(column.name)
    number = int(all_.sum())
    return (*max(found), number) if found and 0 < positives.sum() < number else None


def _auc(positives: Floats, negatives: Floats) -> float:
    """The AUC of a score, given for each of its values, ascending, the numbers of positives and negatives."""
    below = np.cumsum(negatives) - negatives
    pairs = positives.sum() * negatives.sum()
    return float((positives * (below + negatives / 2)).sum() / pairs) if pairs else 0.5


def _auc_of_means(counts: Floats) -> float:
    """The AUC of each value's mean label in the other half of the rows; [values, (positives, rows) of both halves]."""
    total = counts.sum(axis=0)
    prior = (total[0] + total[2]) / (total[1] + total[3])
    scores = [(counts[:, i] + prior) / (counts[:, i + 1] + 1) for i in (2, 0)]  # of rows in the first, second half
    values, places = np.unique(np.concatenate(scores), return_inverse=True)
    positives: Floats = np.bincount(places, np.concatenate([counts[:, 0], counts[:, 2]]), len(values)).astype(float)
    rows: Floats = np.bincount(places, np.concatenate([counts[:, 1], counts[:, 3]]), len(values)).astype(float)
    return _auc(positives, rows - positives)


def _check_histories(tables: Tables, roles: Roles, report: LeakReport) -> None:
    columns = {column.name: column for column in tables.columns}
    for times, now in roles.history_times:
        _check_history_times(tables, columns[times], columns[now], report)
    if not roles.history_times:
        report.skipped.append(Checked("histories", "there is no column with the times of a history"))
    item = columns.get(roles.item or "")
    for name in roles.histories:
        if item is not None:
            _check_last_items(tables, columns[name], item, report)
    if not roles.histories:
        report.skipped.append(Checked("histories", "there is no history of the column of items"))


def _both(tables: Tables, one: Column, other: Column) -> Sequence[int]:
    return [s for s in range(len(tables.splits)) if one.types[s] is not None and other.types[s] is not None]


def _check_history_times(tables: Tables, times: Column, now: Column, report: LeakReport) -> None:
    if times.kind != "list" or not comparable(times.element, now.type):
        text = f"{times.name!r} is {times.type}, {now.name!r} is {now.type}: they cannot be compared"
        report.skipped.append(Checked("histories", text))
        return
    late = f"list_max({times.sql}) > {now.sql}"
    if kind_of(times.element) == "float":
        late = f"isfinite(list_max({times.sql})) AND {late}"
    for s in _both(tables, times, now):
        where = f" of {tables.splits[s].name}" if tables.splits[s].name else ""
        [(wrong, rows)] = tables.rows(
            f"SELECT count(*) FILTER (WHERE {late}), count(*) FILTER (WHERE len({times.sql}) > 0) FROM split{s}"
        )
        if wrong:
            text = f"{times.name!r} is later than the row's {now.name!r} in {wrong:,} of {rows:,} rows{where}"
            figures = {"column": times.name, "time": now.name, "split": tables.splits[s].name}
            report.findings.append(Finding("histories", text, {**figures, "late": wrong, "rows": rows}))
        elif rows:
            text = f"{times.name!r} is never later than the row's {now.name!r} in {rows:,} rows{where}"
            report.clean.append(Checked("histories", text))


def _check_last_items(tables: Tables, history: Column, item: Column, report: LeakReport) -> None:
    for s in _both(tables, history, item):
        where = f" of {tables.splits[s].name}" if tables.splits[s].name else ""
        [(last, anywhere, rows)] = tables.rows(
            f"SELECT count(*) FILTER (WHERE {history.sql}[-1] = {item.sql}), "
            f"count(*) FILTER (WHERE list_contains({history.sql}, {item.sql})), count(*) FROM split{s} "
            f"WHERE len({history.sql}) > 0 AND {item.sql} IS NOT NULL"
        )
        if not rows:
            continue
        share = last / rows
        text = (
            f"{history.name!r} ends with the row's {item.name!r} in {last:,} of {rows:,} rows{where} ({share:.1%}; it "
            f"holds it in {anywhere / rows:.1%})"
        )
        if share > _NEARLY_ALL:
            figures = {"column": history.name, "item": item.name, "split": tables.splits[s].name, "rows": rows}
            report.findings.append(Finding("histories", text, {**figures, "last": last, "anywhere": anywhere}))
        else:
            report.clean.append(Checked("histories", text))
