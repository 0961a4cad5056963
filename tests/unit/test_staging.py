"""The copy of a checkpoint's tensors in host memory: the same bytes, whichever way they take."""

from __future__ import annotations

import pytest
import torch

from rechub_dist.checkpoint import save
from rechub_dist.checkpoint.save import RankFile, chunks_of, plan_file, stage
from rechub_dist.checkpoint.tensors import Entry, Piece


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch) -> RankFile:
    monkeypatch.setattr(save, "CHUNK", 1000)  # bytes: many blocks, and rows that are longer than one
    wide = torch.randn(3, 400)
    entries = {
        "table": Entry((90, 6), torch.float32, (Piece(0, 0, torch.randn(90, 8)[:, :6]),), replicated=False),
        "state": Entry((90,), torch.float32, (Piece(0, 0, torch.rand(90, 1)),), replicated=False),
        "wide": Entry.whole(wide),
        "count": Entry.whole(torch.tensor(7)),
        "steps": Entry.whole(torch.arange(500)),
    }
    return plan_file(entries, 0, 1, "a.safetensors")


def test_by_small_buffers_it_is_the_same(file: RankFile) -> None:
    expected = stage(file, None)
    found = torch.zeros_like(expected)
    save._stage_by_blocks(file, found, pinned=False)
    assert torch.equal(found, expected)
    assert max(block.numel() * block.dtype.itemsize for block in save._blocks(file)) == 1600  # one row of `wide`
    assert len(list(save._blocks(file))) > 10


def test_a_buffer_is_used_again_where_it_fits(file: RankFile) -> None:
    first = stage(file, None)
    assert stage(file, first) is first
    assert stage(file, torch.zeros(3, dtype=torch.uint8)) is not first


def test_what_is_written_is_the_same_without_a_copy(file: RankFile) -> None:
    staged, live = (b"".join(bytes(part) for part in chunks_of(file, copy)) for copy in (stage(file, None), None))
    assert staged == live


@pytest.mark.gpu
def test_from_a_gpu(file: RankFile) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    there = RankFile(file.name, file.header, [piece.cuda() for piece in file.pieces], file.tensors, file.bytes)
    found = stage(there, None)
    assert torch.equal(found, stage(file, None))
    assert not found.is_pinned()
