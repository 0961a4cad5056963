"""Criteo's logs: generated rows in the published format, against a reference that goes row by row."""

from __future__ import annotations

import gzip
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_prepare import check_prepared, digest, rows, schema
from typer.testing import CliRunner

from rechub_dist.cli.main import app
from rechub_dist.data.columns import frequencies
from rechub_dist.data.columns.hashing import hash_ids
from rechub_dist.data.columns.strings import hash_strings
from rechub_dist.data.prepare import criteo, preparation
from rechub_dist.data.prepare.criteo import CATEGORIES, COUNTS, prepare
from rechub_dist.errors import UserError
from rechub_dist.features import DenseFeature, SparseFeature

SAMPLE = Path(__file__).parents[2] / os.environ.get("RECHUB_DATA", "../shared/data") / "criteo-sample"
Row = list[str]


def generate(n: int, seed: int = 0) -> list[Row]:
    """Rows of text: gaps, negative counts, categories of a few values and of many."""
    draw = random.Random(seed)
    table = []
    for _ in range(n):
        numbers = ["" if draw.random() < 0.3 else str(int(draw.paretovariate(0.7)) - 3) for _ in COUNTS]
        words = [
            "" if draw.random() < 0.1 else f"{hash((c, int(draw.paretovariate(0.5)))) % 2**32:08x}"
            for c in range(len(CATEGORIES))
        ]
        table.append([str(draw.randint(0, 1)), *numbers, *words])
    return table


def text(table: list[Row]) -> bytes:
    return "".join("\t".join(row) + "\n" for row in table).encode()


def expected(table: list[Row], train: int, min_count: int) -> list[dict[str, Any]]:
    """What the rows become: ids by frequency in the first `train` rows, then by value."""
    result: list[dict[str, Any]] = [{"label": int(row[0])} for row in table]
    for i, name in enumerate(COUNTS, 1):
        for row, made in zip(table, result, strict=True):
            made[name] = float(row[i]) if row[i] else None
    for i, name in enumerate(CATEGORIES, 14):
        counts = Counter(row[i] for row in table[:train])
        kept = sorted((v for v in counts if counts[v] >= min_count), key=lambda v: (-counts[v], v))
        for row, made in zip(table, result, strict=True):
            made[name] = kept.index(row[i]) + 1 if row[i] in kept else 0
    return result


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a dozen rows, so that splits begin within and between them."""
    monkeypatch.setattr(criteo, "BLOCK", 4096)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("min_count", [1, 3])
def test_one_file(tmp_path: Path, min_count: int) -> None:
    table = generate(205)
    (tmp_path / "some.txt").write_bytes(text(table))
    out = tmp_path / "out"
    prepare(tmp_path / "some.txt", out, min_count=min_count)
    check_prepared(out)
    train, valid, test = (rows(out, split).to_pylist() for split in ("train", "valid", "test"))
    assert [len(split) for split in (train, valid, test)] == [165, 20, 20]
    assert [*train, *valid, *test] == expected(table, 165, min_count)
    declared = schema(out)
    for feature in declared.features:
        if isinstance(feature, SparseFeature):
            vocabulary = pq.read_table(out / "_vocabularies" / f"{feature.name}.parquet")
            assert feature.table.rows == vocabulary.num_rows + 1
            assert min(vocabulary["count"].to_pylist()) >= min_count
        else:
            assert isinstance(feature, DenseFeature)
            assert (feature.transform, feature.missing) == ("log", "fill")
    before = digest(out)
    prepare(tmp_path / "some.txt", out, min_count=min_count)
    assert digest(out) == before


@pytest.mark.usefixtures("small_blocks")
def test_days_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Plain and gzip, the last line with and without its newline; other files stay unread."""
    table = generate(120)
    source = tmp_path / "days"
    source.mkdir()
    for day in range(12):
        content = text(table[10 * day : 10 * day + 10])
        if day % 2:
            (source / f"day_{day}.gz").write_bytes(gzip.compress(content))
        else:
            (source / f"day_{day}").write_bytes(content.rstrip(b"\n"))
    (source / "readme.txt").write_text("about")
    (source / ".day_3").write_text("hidden")
    prepare(source, tmp_path / "out", min_count=2)
    found = [row for split in ("train", "valid", "test") for row in rows(tmp_path / "out", split).to_pylist()]
    assert found == expected(table, 96, 2)


def test_the_splits_of_a_folder_are_kept(tmp_path: Path) -> None:
    table = generate(60)
    for name, part in (("train.tsv", table[:40]), ("dev.tsv.gz", table[40:45]), ("test.tsv", table[45:])):
        (tmp_path / name).write_bytes(gzip.compress(text(part)) if name.endswith(".gz") else text(part))
    prepare(tmp_path, tmp_path / "out", min_count=2)
    splits = [rows(tmp_path / "out", split) for split in ("train", "valid", "test")]
    assert [split.num_rows for split in splits] == [40, 5, 15]
    assert pa.concat_tables(splits).to_pylist() == expected(table, 40, 2)


def test_a_test_file_without_labels_is_left_alone(tmp_path: Path) -> None:
    table = generate(50)
    (tmp_path / "train.txt").write_bytes(text(table))
    (tmp_path / "test.txt").write_bytes(text([row[1:] for row in generate(9, seed=1)]))
    prepare(tmp_path, tmp_path / "out", min_count=2)
    assert rows(tmp_path / "out", "test").to_pylist() == expected(table, 40, 2)[45:]


@pytest.mark.usefixtures("small_blocks")
def test_columns_of_too_many_values_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteo, "MOST_VALUES", 64)
    monkeypatch.setattr(frequencies, "_WAITING", 1)
    table = generate(200)
    for i, row in enumerate(table):
        row[15] = f"{i:08x}"  # C2 differs everywhere
        row[16] = f"{i % 64:08x}"  # C3 is just within the bound
    (tmp_path / "some.txt").write_bytes(text(table))
    prepare(tmp_path / "some.txt", tmp_path / "out", min_count=1)
    check_prepared(tmp_path / "out")
    found = pa.concat_tables([rows(tmp_path / "out", split) for split in ("train", "valid", "test")])
    words = hash_strings(pa.array([row[15] for row in table]))
    assert found["C2"].to_pylist() == hash_ids(words, "C2", 64).tolist()
    tables = {feature.name: feature.table.rows for feature in schema(tmp_path / "out").features[13:]}  # type: ignore[union-attr]
    assert (tables["C2"], tables["C3"]) == (64, 65)
    assert not (tmp_path / "out" / "_vocabularies" / "C2.parquet").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (lambda row: row[:-1], "Expected 40 columns, got 39"),
        (lambda row: ["2", *row[1:]], "column 'label' is 2, must be 0 or 1"),
        (lambda row: ["", *row[1:]], "column 'label' is None, must be 0 or 1"),
        (lambda row: [row[0], "x", *row[2:]], "invalid value 'x'"),
    ],
)
def test_what_is_not_in_the_published_format(tmp_path: Path, row: Any, message: str) -> None:
    table = generate(30)
    table[17] = row(table[17])
    (tmp_path / "some.txt").write_bytes(text(table))
    with pytest.raises(UserError, match=message) as caught:
        prepare(tmp_path / "some.txt", tmp_path / "out")
    assert str(caught.value).startswith(str(tmp_path / "some.txt"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_broken_gzip_and_empty_files(tmp_path: Path) -> None:
    (tmp_path / "day_0.gz").write_bytes(gzip.compress(text(generate(3000)))[:-2000])
    with pytest.raises(UserError, match=r"day_0\.gz"):
        prepare(tmp_path, tmp_path / "out")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(UserError, match="no rows"):
        prepare(tmp_path / "empty.txt", tmp_path / "out")
    with pytest.raises(UserError, match="missing source file"):
        prepare(tmp_path / "nowhere.txt", tmp_path / "out")


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_bytes(text(generate(30)))
    source, out = str(tmp_path / "some.txt"), str(tmp_path / "out")
    command = ["data", "prepare", "criteo", "--source", source, "--out", out, "--min-count", "2"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f"{out}/train: 24 rows" in result.output
    other = CliRunner().invoke(app, ["data", "prepare", "diginetica", *command[3:]])
    assert other.exit_code == 2


@pytest.mark.data
def test_real_sample(tmp_path: Path) -> None:
    if not SAMPLE.is_dir():
        pytest.skip(f"no sample at {SAMPLE} (RECHUB_DATA)")
    preparation("criteo").prepare(SAMPLE, tmp_path / "out")
    check_prepared(tmp_path / "out")
    assert [rows(tmp_path / "out", split).num_rows for split in ("train", "valid", "test")] == [7200, 409, 391]
    for name, split in (("train", "train"), ("dev", "valid"), ("test", "test")):
        lines = (SAMPLE / f"{name}.tsv").read_text().splitlines()
        table = rows(tmp_path / "out", split)
        assert table["label"].to_pylist() == [int(line[0]) for line in lines]
        counts = [line.split("\t")[5] for line in lines]
        assert table["I5"].to_pylist() == [float(value) if value else None for value in counts]
