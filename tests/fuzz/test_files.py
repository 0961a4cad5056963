"""Damaged data and checkpoints: the values that were written, or one line that says what is damaged."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rechub_dist.checkpoint.coverage import check_coverage
from rechub_dist.checkpoint.find import find_checkpoint
from rechub_dist.checkpoint.inspect import inspect_checkpoint, list_checkpoints
from rechub_dist.checkpoint.load import blocks_of, consume, read_rows, verify
from rechub_dist.checkpoint.manifest import MANIFEST, seal
from rechub_dist.checkpoint.position import position_of
from rechub_dist.config import StorageConfig
from rechub_dist.data.columns.extremes import check_extremes
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.pages import parquet_writer, read_parquet
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.spec import BatchSpec
from rechub_dist.features import DenseFeature, Label, SequenceFeature, SparseFeature, Table
from rechub_tests.mutations import BYTES, MUTATIONS, Cut, Mutation, cut, cuts, fuzz, mutated, outcome

ROWS = 120
SPEC = BatchSpec(
    features=(
        SparseFeature("user", Table("user", 1000)),
        SparseFeature("city", Table("city", 100), hash=True),
        SequenceFeature("history", Table("item", 50), max_length=3),
    ),
    dense=(DenseFeature("x"),),
    labels=(Label("y"),),
    collections={"a": ("user", "city"), "b": ("history",)},
)
_NUMBER = itertools.count()


def values(path: Path) -> list[Tensor]:
    """All that a reader gives of a file."""
    reader = ParquetReader(
        Manifest.read(str(path), StorageConfig(cache=False)), SPEC, batch_size=50, shuffle=False, prefetch=0
    )
    found = []
    for batch in reader.batches(0):
        assert batch.dense is not None
        assert batch.labels is not None
        found += [batch.dense, batch.labels]
        for jagged in batch.jagged.values():
            found += [jagged.values(), jagged.lengths()]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def parquet(folder: Path) -> tuple[bytes, list[Tensor]]:
    """A file with checksums, and what is in it."""
    rows = np.arange(ROWS)
    table = pa.table(
        {
            "user": rows * 7 % 1000,
            "city": [f"city {row % 9}" for row in rows],
            "history": [[int(row * k) % 50 for k in range(row % 5)] for row in rows],
            "x": rows.astype(np.float32) / 3,
            "y": rows % 2,
        }
    )
    path = folder / "whole.parquet"
    with parquet_writer(path, table.schema) as writer:
        writer.write_table(table, row_group_size=40)
    return path.read_bytes(), values(path)


@fuzz(60)
@given(cuts(BYTES))
def test_parquet(folder: Path, parquet: tuple[bytes, list[Tensor]], changes: list[Cut]) -> None:
    check_parquet(folder, parquet, changes)


def check_parquet(folder: Path, parquet: tuple[bytes, list[Tensor]], changes: list[Cut]) -> None:
    """Read a file with other bytes. In its pages, which have checksums, no change passes for data."""
    whole, wanted = parquet
    data = cut(whole, changes)
    path = folder / f"{next(_NUMBER)}.parquet"
    path.write_bytes(data)
    try:
        found = outcome(lambda: values(path))
        outcome(lambda: read_parquet(path))
        outcome(lambda: check_extremes(Manifest.read(str(path), StorageConfig(cache=False)).files, SPEC))
    finally:
        path.unlink()
    if found is not None and data[-_footer(whole) :] == whole[-_footer(whole) :] and len(data) == len(whole):
        assert len(found) == len(wanted)
        assert all(map(torch.equal, found, wanted)), "other values, and no error"


def _footer(data: bytes) -> int:
    """The bytes that a file ends with after its pages."""
    return int.from_bytes(data[-8:-4], "little") + 8


GOLDEN = Path(__file__).parents[1] / "golden" / "format-1"
MODELS = ("deepfm", "sasrec")


@pytest.fixture(scope="module")
def checkpoints(folder: Path) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """Folders with a checkpoint each, and what is in it."""
    found = {}
    for model in MODELS:
        shutil.copytree(GOLDEN / model / "out" / "checkpoints", folder / model)
        found[model] = (folder / model, read_all(folder / model))
    return found


def read_all(folder: Path) -> dict[str, Tensor]:
    """What `checkpoint verify` looks at, and all tensors of the best checkpoint."""
    store, manifest = find_checkpoint(str(folder), StorageConfig())
    consume(verify(store, manifest, blocks_of(manifest)))
    check_coverage(manifest, str(folder))
    position_of(manifest.run)
    return {key: torch.cat([*read_rows(store, manifest, key), torch.empty(0)]) for key in manifest.tensors}


@fuzz(60)
@given(st.sampled_from(MODELS), st.integers(0, 100), cuts(BYTES))
def test_checkpoints(
    checkpoints: dict[str, tuple[Path, dict[str, Tensor]]], model: str, number: int, changes: list[Cut]
) -> None:
    folder, wanted = checkpoints[model]
    check_checkpoint(folder, wanted, number, changes)


def check_checkpoint(folder: Path, wanted: dict[str, Tensor], number: int, changes: list[Cut]) -> None:
    """Read a checkpoint of which one file has other bytes; afterwards it is as before."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    file = files[number % len(files)]
    whole = file.read_bytes()
    file.write_bytes(cut(whole, changes))
    try:
        found = outcome(lambda: read_all(folder))
        outcome(lambda: list_checkpoints(find_checkpoint(str(folder), StorageConfig(), "newest")[0]))
    finally:
        file.write_bytes(whole)
    if found is not None:
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), "other values, and no error"


@fuzz(60)
@given(st.sampled_from(MODELS), MUTATIONS)
def test_manifests(
    checkpoints: dict[str, tuple[Path, dict[str, Tensor]]], model: str, mutations: list[Mutation]
) -> None:
    check_manifest(checkpoints[model][0], mutations)


def check_manifest(folder: Path, mutations: list[Mutation]) -> None:
    """Read a checkpoint whose manifest has another content, and the checksum of that."""
    file = max(folder.glob(f"*/{MANIFEST}"))
    whole = file.read_bytes()
    tree: dict[str, Any] = json.loads(whole)["manifest"]
    file.write_bytes(seal(json.dumps(mutated(tree, mutations)).encode()))
    try:
        outcome(lambda: read_all(folder))
        outcome(lambda: inspect_checkpoint(*find_checkpoint(str(folder), StorageConfig(), "newest")))
        outcome(lambda: list_checkpoints(find_checkpoint(str(folder), StorageConfig(), "newest")[0]))
    finally:
        file.write_bytes(whole)
