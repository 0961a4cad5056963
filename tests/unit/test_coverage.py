"""A checkpoint from which a piece is missing, or in which one is there twice, is not called good."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from rechub_dist.checkpoint.coverage import check_coverage
from rechub_dist.checkpoint.manifest import CheckpointManifest, DamagedError, FileRecord, SavedPiece, SavedTensor
from rechub_dist.checkpoint.position import Position

TABLES = {"user": {"rows": 10, "dim": 6, "sharding": "row_wise", "optimizer": "rowwise_adagrad"}}
RUN: Any = {
    "position": asdict(Position(step=3)),
    "identity": {"seed": 0, "model": {"name": "none"}, "data": {}},
    "config": "{}",
    "tables": TABLES,
    "world_size": 1,
    "saved_at": "",
    "versions": {},
}


def piece(row: int, rows: int, column: int = 0, columns: int = 6) -> SavedPiece:
    return SavedPiece("rank-0.safetensors", 0, row, column, rows, columns)


def manifest(weight: list[SavedPiece], tensors: dict[str, SavedTensor] | None = None) -> CheckpointManifest:
    found = {
        "tables/user/weight": SavedTensor("F32", (10, 6), weight),
        "tables/user/rowwise_sum": SavedTensor("F32", (10,), [piece(0, 10, columns=1)]),
        "dense_optim/w/step": SavedTensor("F32", (), [piece(0, 1, columns=1)]),
        "dense/empty": SavedTensor("F32", (0, 6), []),
    }
    return CheckpointManifest(
        3, RUN, {"rank-0.safetensors": FileRecord(240, ["0" * 32])}, found if tensors is None else tensors
    )


WHOLE = [
    [piece(0, 10)],
    [piece(5, 5), piece(0, 5)],
    [piece(0, 10, 0, 4), piece(0, 10, 4, 2)],
    [piece(0, 4, 0, 3), piece(4, 6, 0, 3), piece(0, 7, 3, 3), piece(7, 3, 3, 3)],
]


@pytest.mark.parametrize("pieces", WHOLE)
def test_whole(pieces: list[SavedPiece]) -> None:
    check_coverage(manifest(pieces), "here")


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([], "lacks 60 elements of tables/user/weight"),
        ([piece(0, 5)], "lacks 30 elements"),
        ([piece(0, 5), piece(0, 5)], "rows 0 to 4 of tables/user/weight are duplicated"),
        ([piece(0, 6), piece(5, 4), piece(9, 1)], "are duplicated"),  # one row lacks, another is there twice: below
        ([piece(0, 5), piece(5, 5), piece(3, 2)], "are duplicated"),
        ([piece(0, 10, 0, 3), piece(0, 10, 2, 3)], "are duplicated"),
        ([piece(5, 10)], "is outside its 10 x 6 elements"),
        ([piece(0, 10, 3, 6)], "is outside"),
    ],
)
def test_pieces_that_are_missing_or_there_twice(pieces: list[SavedPiece], message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        check_coverage(manifest(pieces), "here")


@pytest.mark.parametrize("lost", ["tables/user/weight", "tables/user/rowwise_sum"])
def test_a_table_or_a_state_that_is_not_there(lost: str) -> None:
    tensors = {name: saved for name, saved in manifest(WHOLE[0]).tensors.items() if name != lost}
    with pytest.raises(DamagedError, match=f"lacks {lost}"):
        check_coverage(manifest([], tensors), "here")


def test_a_table_of_fewer_rows() -> None:
    found = manifest(WHOLE[0])
    tensors = {**found.tensors, "tables/user/weight": SavedTensor("F32", (9, 6), [piece(0, 9)])}
    with pytest.raises(DamagedError, match="has 9 rows; its table has 10"):
        check_coverage(replace(found, tensors=tensors), "here")
