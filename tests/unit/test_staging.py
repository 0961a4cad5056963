"""The copy of a checkpoint's tensors in host memory: the same bytes, whichever way they take."""

from __future__ import annotations

import pytest
import torch

from rechub_dist.checkpoint import save
from rechub_dist.checkpoint.save import Hold, RankFile, chunks_of, plan_file, stage
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


def whole(file: RankFile) -> torch.Tensor:
    """The body of the file, uint8 [bytes]."""
    return stage(file, file.bytes).staged


def test_by_small_buffers_it_is_the_same(file: RankFile) -> None:
    expected, blocks = whole(file), list(save._blocks(file))
    found = torch.zeros_like(expected)
    save._stage_by_halves(blocks, found, pinned=False)
    assert torch.equal(found, expected)
    assert max(block.numel() * block.dtype.itemsize for block in blocks) == 1600  # one row of `wide`
    assert len(blocks) > 10


def test_a_buffer_is_used_again_where_it_fits(file: RankFile) -> None:
    first = whole(file)
    assert stage(file, file.bytes, first).staged is first
    assert stage(file, file.bytes, torch.zeros(3, dtype=torch.uint8)).staged is not first


@pytest.mark.parametrize("limit", [0, 7, 999, 1000, 3000, 10**9])
def test_what_is_written_is_the_same_whatever_is_copied(file: RankFile, limit: int) -> None:
    copy, hold, written, during = stage(file, limit), Hold(0.0), b"", []
    assert len(copy.staged) <= limit
    for chunk in chunks_of(file, copy, hold):
        written += bytes(chunk)
        during.append(hold.seconds > 0)
    assert written == file.header + whole(file).numpy().tobytes()
    assert len(copy.staged) > limit - 1600 or limit > file.bytes  # a block more would not have fitted
    assert during.count(False) == 1 + len(copy.live)  # the header, and what is read from the live tensors
    hold.wait()


@pytest.mark.gpu
def test_from_a_gpu(file: RankFile) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    there = RankFile(file.name, file.header, [piece.cuda() for piece in file.pieces], file.tensors, file.bytes)
    found = whole(there)
    assert torch.equal(found, whole(file))
    assert not found.is_pinned()
