"""The profile of a data set: what a person should know of its columns and splits before training.

All figures are exact except those that say `about` (numbers of distinct values above `EXACT_DISTINCT`), and those of a
sample. NaN counts as missing, apart from nulls; infinite values are counted, and in no mean, range or histogram.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Final

import numpy as np
import pyarrow as pa

from rechub_dist.data.columns.vocabulary import read_vocabulary
from rechub_dist.data.order.quality import layout_quality, layout_warning
from rechub_dist.data.tools.figures import ColumnProfile, LabelProfile, Overlap, Part, Profile, Run, SplitProfile
from rechub_dist.data.tools.measure import Measure, Pairs, time_range
from rechub_dist.data.tools.roles import Roles, find_roles
from rechub_dist.data.tools.tables import Column, Progress, Split, Tables
from rechub_dist.errors import UserError, one_line
from rechub_dist.redaction import redacted

EXACT_DISTINCT: Final = 5_000_000  # about as many distinct values, over all splits, are still counted exactly
_LABEL_VALUES = 10  # a label with as many values or fewer is shown by value
_AT_ONCE, _HISTOGRAMS_AT_ONCE = 64, 4  # columns in one query; with more histograms, DuckDB plans long


def profile(
    path: str,
    *,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    labels: tuple[str, ...] = (),
    sample: int | None = None,
    run: Run | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Profile a data set; for the parameters see `Tables` and `find_roles`. Raises UserError as they do."""
    with Tables(path, sample=sample, progress=progress) as tables:
        roles = find_roles(tables, user=user, item=item, time=time, labels=labels)
        return profile_tables(tables, roles, run or Run(), progress)


def profile_tables(tables: Tables, roles: Roles, run: Run, progress: Progress | None = None) -> Profile:
    """The profile of tables that are open. Raises UserError if they cannot be read."""
    steps, measure = _Steps(tables, progress), Measure(tables)
    pairs = [(column, _column(tables, column, roles)) for column in tables.columns]
    for chunk in _chunks(pairs, _AT_ONCE):
        for s in range(len(tables.splits)):
            measure.summarise(s, chunk)
            steps.done(f"ranges of {len(chunk)} columns", len(chunk))
    others = _others(tables)
    people = {roles.user: "user", roles.item: "item"} if others else {}
    overlaps: dict[str, list[Overlap]] = {}
    for column, found in pairs:
        who = people.get(column.name)
        if who is not None or sum(part.distinct for part in found.parts.values()) <= EXACT_DISTINCT:
            measure.count_values(column, found)
        else:
            measure.estimate_top(column, found)
        if who is not None:
            overlaps[who] = measure.overlaps(others)
        steps.done(f"values of {column.name}", len(tables.splits))
    for chunk in _chunks(pairs, _HISTOGRAMS_AT_ONCE):
        measure.fill_histograms(chunk)
        steps.done(f"histograms of {len(chunk)} columns", len(chunk) * len(tables.splits))
    columns = {column.name: found for column, found in pairs}
    notes = list(_notes(tables, roles, columns))
    for name, vocabulary in roles.vocabularies.items():
        notes += _add_originals(columns.get(name), vocabulary)
    return Profile(
        tables.path,
        tables.sampled,
        [_split_profile(split, run) for split in tables.splits],
        roles,
        list(columns.values()),
        [_label(columns[name]) for name in roles.labels],
        _times(tables, columns.get(roles.time or "")),
        dict(sorted(overlaps.items(), reverse=True)),
        notes,
    )


def _chunks(pairs: Pairs, size: int) -> list[Pairs]:
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


class _Steps:
    """Tells how far the profile is, in columns of splits: each is read three times."""

    def __init__(self, tables: Tables, progress: Progress | None) -> None:
        self._tell: Callable[[str, int, int], None] = progress or (lambda *_: None)
        self._done, self._total = 0, 3 * len(tables.columns) * len(tables.splits)

    def done(self, what: str, steps: int) -> None:
        self._done += steps
        self._tell(what, self._done, self._total)


def _column(tables: Tables, column: Column, roles: Roles) -> ColumnProfile:
    parts = {
        split.name: Part(kind, split.read)
        for split, kind in zip(tables.splits, column.arrow, strict=True)
        if kind is not None
    }
    return ColumnProfile(column.name, column.kind, roles.features.get(column.name, ()), parts)


def _split_profile(split: Split, run: Run) -> SplitProfile:
    found = SplitProfile(split.name, redacted(split.path), split.rows, split.read, run)
    if (manifest := split.manifest) is None:
        return found
    sizes = [count for count in manifest.counts if count]
    found.files, found.bytes = len(manifest.files), sum(file.size for file in manifest.files)
    found.row_groups, found.row_group_rows = len(manifest.counts), (min(sizes), max(sizes))
    quality = layout_quality(manifest.counts, run.batch_size, run.ranks, max_streams=run.max_streams)
    found.shuffle = asdict(quality)
    found.warning = layout_warning(split.path, manifest.counts, run.batch_size, run.ranks, max_streams=run.max_streams)
    return found


def _label(column: ColumnProfile) -> LabelProfile:
    distinct = max((part.distinct for part in column.parts.values()), default=0)
    few = distinct <= _LABEL_VALUES and len(column.top) <= _LABEL_VALUES and bool(column.top)
    values = sorted(column.top, key=lambda top: (isinstance(top.value, str), top.value)) if few else None
    binary = values is not None and all(top.value in (0, 1) for top in values)
    mean = {name: part.mean for name, part in column.parts.items()}
    return LabelProfile(column.name, mean, dict(mean) if binary else None, values)


def _times(tables: Tables, column: ColumnProfile | None) -> dict[str, tuple[str, str] | None]:
    if column is None or column.kind not in ("time", "integer", "float"):
        return {}
    parts = {split.name: column.parts.get(split.name) for split in tables.splits}
    ends = [end for part in parts.values() if part is not None for end in (part.low, part.high) if end is not None]
    return {
        name: None if part is None or part.low is None else time_range(part.low, part.high, ends)
        for name, part in parts.items()
    }


def _others(tables: Tables) -> list[int]:
    """The splits to compare with train, which is split 0; train_prefixes has its rows once more."""
    return [s for s, split in enumerate(tables.splits) if split.name in ("valid", "test") and split.rows]


def _add_originals(column: ColumnProfile | None, vocabulary: str) -> list[str]:
    """Add the values whose ids a column holds to its frequent ids; returns why that cannot be, if so."""
    if column is None:
        return []
    try:
        found = read_vocabulary(vocabulary)
    except UserError as error:
        return [f"{column.name!r}: {one_line(error)}"]
    ids = [top.value for top in column.top if isinstance(top.value, int)]
    places = np.flatnonzero(np.isin(found.ids, np.array(ids, np.int64)))
    values = dict(zip(found.ids[places].tolist(), found.values.take(pa.array(places)).to_pylist(), strict=True))
    for top in column.top:
        top.original = values.get(top.value)
    return []


def _notes(tables: Tables, roles: Roles, columns: dict[str, ColumnProfile]) -> Iterable[str]:
    for split in tables.splits:
        if split.read < split.rows:
            of = f" of {split.name}" if split.name else ""
            yield f"sampled: {split.read:,} of {split.rows:,} rows{of}; all figures but the numbers of rows are theirs"
    if tables.sampled and _others(tables):
        yield "in a sample more users and items seem cold than are"
    if roles.note is not None:
        yield roles.note
    for name, column in columns.items():
        kinds = {split: part.type for split, part in column.parts.items()}
        absent = [item.name for item in tables.splits if item.name not in kinds]
        if absent:
            yield f"{name!r} is not in {', '.join(absent)}"
        if len(set(kinds.values())) > 1:
            yield f"{name!r} has different types: {', '.join(f'{kind} in {split}' for split, kind in kinds.items())}"
        for where, part in column.parts.items():
            missing = part.nulls + (0 if column.kind == "list" else part.nans)
            if part.rows and missing == part.rows:
                yield f"{name!r} has no value" + (f" in {where}" if where else "")
