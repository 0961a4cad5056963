"""The figures of a profile, against plain Python and NumPy."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.data.tools import profile as profile_module
from rechub_dist.data.tools.figures import ColumnProfile, Profile, Run, share_text
from rechub_dist.data.tools.measure import TOP
from rechub_dist.data.tools.profile import profile, profile_tables
from rechub_dist.data.tools.roles import find_roles
from rechub_dist.data.tools.tables import Tables
from rechub_dist.errors import UserError

SPLITS = {"train": 700, "valid": 150, "test": 90}


def random_table(rows: int, rng: np.random.Generator) -> pa.Table:
    """Columns of most types, with what is missing in each."""

    def gaps(values: list[Any], share: float = 0.1) -> list[Any]:
        return [None if hole else value for value, hole in zip(values, rng.random(len(values)) < share, strict=True)]

    floats = rng.normal(0, 3, rows)
    floats[rng.random(rows) < 0.05] = np.nan
    floats[rng.random(rows) < 0.05] = np.inf
    floats[rng.random(rows) < 0.05] = -np.inf
    lists = [rng.integers(0, 30, rng.integers(0, 9)).tolist() for _ in range(rows)]
    lists = [gaps(values) for values in lists]
    return pa.table(
        {
            "user_id": pa.array(rng.integers(0, 120, rows)),
            "item_id": pa.array(gaps(rng.integers(1000, 1060, rows).tolist()), pa.int32()),
            "timestamp": pa.array(1_600_000_000 + rng.integers(0, 999_983, rows)),
            "at": pa.array(
                gaps((1_600_000_000_000_003 + rng.integers(0, 10**12 - 11, rows)).tolist()), pa.timestamp("us")
            ),
            "price": pa.array(gaps(floats.tolist()), pa.float64()),
            "amount": pa.array(np.exp(rng.normal(0, 4, rows)), pa.float32()),
            "wide": pa.array(gaps(rng.integers(-(10**6) + 1, 10**6, rows).tolist()), pa.int64()),
            "city": pa.array(gaps(rng.choice(["Oslo", "", "Łódź", 'a"b'], rows).tolist())).dictionary_encode(),
            "new": pa.array(gaps((rng.random(rows) < 0.3).tolist())),
            "history": pa.array(gaps(lists), pa.list_(pa.int16())),
            "label": pa.array((rng.random(rows) < 0.2).astype(np.int8)),
        }
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, pa.Table]]:
    """A prepared folder of two files a split, and its tables by split."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(5)
    tables = {}
    for split, rows in SPLITS.items():
        tables[split] = random_table(rows, rng)
        (root / split).mkdir()
        half = rows // 2
        for i, piece in enumerate((tables[split][:half], tables[split][half:])):
            pq.write_table(piece, root / split / f"{i}.parquet", row_group_size=100)
    return root, tables


@pytest.fixture(scope="module")
def found(data: tuple[Path, dict[str, pa.Table]]) -> Profile:
    return profile(str(data[0]))


def columns_of(found: Profile) -> dict[str, ColumnProfile]:
    return {column.name: column for column in found.columns}


def rounded(found: Profile) -> list[ColumnProfile]:
    """The columns, without the last digits of means, which depend on how threads divide the rows."""
    columns = []
    for column in found.columns:
        parts = {
            name: replace(part, mean=None if part.mean is None else float(f"{part.mean:.9g}"))
            for name, part in column.parts.items()
        }
        columns.append(replace(column, parts=parts))
    return columns


def missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def plain(value: Any) -> Any:
    """A value as the profile has it."""
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return str(value) if isinstance(value, pd.Timestamp) else value


@pytest.mark.parametrize("name", ["user_id", "item_id", "timestamp", "price", "amount", "wide", "label", "new", "city"])
def test_values(data: tuple[Path, dict[str, pa.Table]], found: Profile, name: str) -> None:
    column = columns_of(found)[name]
    counts: dict[str, Counter[Any]] = {}
    for split, table in data[1].items():
        values, part = table[name].to_pylist(), column.parts[split]
        assert part.rows == len(values)
        assert part.nulls == sum(value is None for value in values)
        known = [value for value in values if not missing(value)]
        assert part.nans == len(values) - part.nulls - len(known)
        counts[split] = Counter(plain(value) for value in known)
        assert (part.distinct, part.about) == (len(counts[split]), False)
        finite = [value for value in known if not isinstance(value, str) and math.isfinite(value)]
        if name == "city":
            assert part.mean is None
            continue
        assert (part.low, part.high) == (min(finite), max(finite))
        assert part.mean == pytest.approx(float(np.mean(finite)), rel=1e-6)
        assert part.infinities == len(known) - len(finite)
    for top in column.top:
        assert top.counts == {split: counts[split][top.value] for split in SPLITS}
        assert top.shares == {split: counts[split][top.value] / SPLITS[split] for split in SPLITS}
    best = sorted({v for c in counts.values() for v in c}, key=lambda v: -max(counts[s][v] / SPLITS[s] for s in SPLITS))
    assert (
        [max(t.shares.values()) for t in column.top]
        == [  # type: ignore[type-var]
            max(counts[split][value] / SPLITS[split] for split in SPLITS) for value in best[:TOP]
        ]
    )


@pytest.mark.parametrize(
    "name", ["user_id", "item_id", "timestamp", "at", "price", "amount", "wide", "label", "history"]
)
def test_histograms(data: tuple[Path, dict[str, pa.Table]], found: Profile, name: str) -> None:
    column = columns_of(found)[name]
    assert column.histogram is not None
    edges = np.array(column.histogram.edges)
    scale = {"label": "each", "history": "each", "amount": "log"}.get(name, "linear")
    assert (column.histogram.scale, len(edges)) == (scale, {"label": 2, "history": 9, "item_id": 21}.get(name, 25))
    for split, table in data[1].items():
        values = table[name].to_pylist()
        if name == "at":
            values = [
                None if value is None else value.timestamp()
                for value in table[name].cast(pa.timestamp("us", "UTC")).to_pylist()
            ]
        known = [len(value) if isinstance(value, list) else value for value in values if not missing(value)]
        known = [value for value in known if math.isfinite(value)]
        bins = len(edges) if scale == "each" else len(edges) - 1
        places = np.clip(np.searchsorted(edges, known, side="right") - 1, 0, bins - 1)
        assert column.parts[split].bins == np.bincount(places, minlength=bins).tolist()


def test_lists(data: tuple[Path, dict[str, pa.Table]], found: Profile) -> None:
    column = columns_of(found)["history"]
    for split, table in data[1].items():
        lists, part = table["history"].to_pylist(), column.parts[split]
        lengths = [len(values) for values in lists if values is not None]
        elements = [value for values in lists for value in values or ()]
        known = [value for value in elements if value is not None]
        assert part.lengths is not None
        assert (part.lengths.low, part.lengths.high) == (min(lengths), max(lengths))
        assert part.lengths.mean == pytest.approx(np.mean(lengths))
        assert part.lengths.median == pytest.approx(np.percentile(lengths, 50))
        assert part.lengths.p95 == pytest.approx(np.percentile(lengths, 95))
        assert part.lengths.empty == pytest.approx(sum(not values for values in lists) / len(lists))
        assert part.nulls == sum(values is None for values in lists)
        assert (part.elements, part.element_nulls) == (len(elements), len(elements) - len(known))
        assert (part.distinct, part.low, part.high) == (len(set(known)), min(known), max(known))
        for top in column.top:
            assert top.counts[split] == known.count(top.value)
            assert top.shares[split] == known.count(top.value) / len(known)


def test_labels_times_and_cold_shares(data: tuple[Path, dict[str, pa.Table]], found: Profile) -> None:
    frames = {
        split: table.select(["user_id", "item_id", "timestamp", "label"]).to_pandas()
        for split, table in data[1].items()
    }
    assert [label.name for label in found.labels] == ["label"]
    assert found.labels[0].positive_rate == pytest.approx({split: f["label"].mean() for split, f in frames.items()})
    assert (found.roles.user, found.roles.item, found.roles.time) == ("user_id", "item_id", "timestamp")
    for split, frame in frames.items():
        ends = [pd.Timestamp(frame["timestamp"].agg(end), unit="s") for end in ("min", "max")]
        assert found.times[split] == (str(ends[0]), str(ends[1]))
    for role, name in (("user", "user_id"), ("item", "item_id")):
        train = set(frames["train"][name].dropna())
        for overlap in found.overlaps[role]:
            values = frames[overlap.split][name].dropna()
            assert (overlap.distinct, overlap.rows) == (values.nunique(), len(values))
            assert overlap.known == len(set(values) & train)
            assert overlap.known_rows == values.isin(train).sum()
            assert overlap.cold == pytest.approx(1 - len(set(values) & train) / values.nunique())
            assert overlap.cold_rows == pytest.approx(1 - values.isin(train).mean())
    assert {overlap.split for overlap in found.overlaps["user"]} == {"valid", "test"}


def test_estimates_say_so(
    data: tuple[Path, dict[str, pa.Table]], monkeypatch: pytest.MonkeyPatch, found: Profile
) -> None:
    monkeypatch.setattr(profile_module, "EXACT_DISTINCT", 20)
    estimated = columns_of(profile(str(data[0])))
    for name, exact in columns_of(found).items():
        few = sum(part.distinct for part in exact.parts.values()) <= 20
        for split, part in estimated[name].parts.items():
            assert part.about is not (few or name in ("user_id", "item_id"))  # of which the overlap is counted
            assert part.distinct == pytest.approx(exact.parts[split].distinct, rel=0.1)
        assert estimated[name].chosen_about is any(part.about for part in estimated[name].parts.values())
    wide = data[1]["train"]["wide"].to_pylist()
    for top in estimated["wide"].top:
        assert top.counts["train"] == wide.count(top.value)  # exact all the same


def test_a_sample_has_as_many_rows_as_it_says(data: tuple[Path, dict[str, pa.Table]]) -> None:
    found = profile(str(data[0]), sample=100)
    assert found.sampled
    assert [(split.name, split.rows, split.read) for split in found.splits] == [
        ("train", 700, 100), ("valid", 150, 100), ("test", 90, 90),
    ]  # fmt: skip
    assert found.notes[0].startswith("sampled: 100 of 700 rows of train")
    columns, whole = columns_of(found), data[1]["train"]
    assert columns["label"].parts["train"].rows == 100
    values = whole["wide"].to_pylist()
    assert all(top.counts["train"] <= values.count(top.value) for top in columns["wide"].top)
    assert columns["at"].parts["train"].nulls < 100
    assert sum(columns["wide"].parts["train"].bins) == 100 - columns["wide"].parts["train"].nulls
    again = profile(str(data[0]), sample=100)
    assert rounded(again) == rounded(found)


def test_a_folder_in_a_store_is_as_on_disk(data: tuple[Path, dict[str, pa.Table]], found: Profile) -> None:
    import fsspec  # noqa: PLC0415

    store = fsspec.filesystem("memory")
    for file in data[0].rglob("*.parquet"):
        store.pipe_file(f"/set/{file.relative_to(data[0])}", file.read_bytes())
    try:
        steps: list[tuple[str, int, int]] = []
        there = profile("memory://set", progress=lambda what, done, total: steps.append((what, done, total)))
    finally:
        store.rm("/set", recursive=True)
    assert rounded(there) == rounded(found)
    assert there.overlaps == found.overlaps
    assert steps[0][0] == "reading train"
    assert steps[-1][1] == steps[-1][2]


def test_the_tree_is_strict_json(found: Profile) -> None:
    tree = json.loads(json.dumps(found.tree(), allow_nan=False))
    assert [column["name"] for column in tree["columns"]] == list(columns_of(found))
    assert tree["splits"][0]["rows"] == 700


def test_a_run_says_how_it_is_shuffled(data: tuple[Path, dict[str, pa.Table]]) -> None:
    with Tables(str(data[0] / "train")) as tables:
        found = profile_tables(tables, find_roles(tables), Run(batch_size=64, ranks=2))
    assert [split.name for split in found.splits] == [""]
    assert found.splits[0].shuffle is not None
    assert found.splits[0].shuffle["row_groups"] == 8
    assert found.overlaps == {}


def test_little_memory_is_enough(tmp_path: Path) -> None:
    rows = 400_000
    rng = np.random.default_rng(1)
    pq.write_table(pa.table({"user": rng.permutation(rows), "x": rng.random(rows)}), tmp_path / "x.parquet")
    with Tables(str(tmp_path), memory=60_000_000) as tables:
        found = columns_of(profile_tables(tables, find_roles(tables), Run()))
    assert found["user"].parts[""].distinct == found["x"].parts[""].distinct == rows


def test_columns_that_are_named(data: tuple[Path, dict[str, pa.Table]]) -> None:
    found = profile(str(data[0]), user="city", item="history", time="at", labels=("price", "new"))
    assert set(found.overlaps) == {"user", "item"}
    assert found.roles.why == {
        "city": "--user",
        "history": "--item",
        "at": "--time",
        "price": "--label",
        "new": "--label",
    }
    assert [label.positive_rate is None for label in found.labels] == [True, False]
    with pytest.raises(UserError, match=r"--user: .* has no column 'user_i'; did you mean 'user_id'\?"):
        profile(str(data[0]), user="user_i")


def test_shares_read_well() -> None:
    shown = [share_text(share) for share in (None, 0.0, 1e-6, 0.5, 0.99999, 1.0)]
    assert shown == ["-", "0.0%", "<0.1%", "50.0%", ">99.9%", "100.0%"]
