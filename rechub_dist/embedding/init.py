"""Initial weights of tables: a pure function of (seed, table, row), whichever part a rank holds."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from rechub_dist.features import Table
from rechub_dist.seeds import seed_from

BLOCK = 4096  # rows per generator
_STAGED = 2  # blocks per thread that may be in flight to a device


@dataclass(frozen=True)
class Part:
    """The part of a table from `row` and `column` on that the tensor `out`, float [rows, columns], holds.

    Of a smaller type than float32 it gets the same values, rounded to nearest.
    """

    out: Tensor
    table: Table
    row: int = 0
    column: int = 0

    @property
    def used(self) -> int:
        """Number of columns that belong to the table; the others are storage padding."""
        return max(0, min(self.out.shape[1], (self.table.dim or 0) - self.column))


def init_table(out: Tensor, table: Table, seed: int, first_row: int = 0, first_column: int = 0) -> None:
    """Fill `out`, float [r, c], with the table's initial weights from `first_row` and `first_column` on."""
    init_tables([Part(out, table, first_row, first_column)], seed)


@torch.no_grad()
def init_tables(parts: Iterable[Part], seed: int) -> None:
    """Fill parts of tables with their initial weights, using as many threads as torch does.

    Entries are N(0, init_std^2); columns beyond the table's width (storage padding) are zero. Each block of rows has a
    generator of its own, so that every sharding of the table starts from the same weights.
    """
    parts = list(parts)
    clear_padding(parts)
    drawn = [part for part in parts if part.used and part.table.init_std]
    for part in parts:
        if part.used and not part.table.init_std:
            part.out.zero_()
    blocks = ((part, block) for part in drawn for block in _blocks(part))
    lock = threading.Lock()

    def following() -> Iterator[tuple[Part, int]]:
        while True:
            with lock:  # a generator is not thread-safe
                found = next(blocks, None)
            if found is None:
                return
            yield found

    def work() -> None:
        staging: dict[tuple[int, torch.device], _Staging] = {}
        for part, block in following():
            key = (part.table.dim or 0, part.out.device)
            if key not in staging:
                staging[key] = _Staging(*key)
            _draw(part, block, seed, staging[key])

    threads = min(torch.get_num_threads(), sum(len(_blocks(part)) for part in drawn))
    if threads <= 1:
        work()
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="init") as pool:
        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()


@torch.no_grad()
def clear_padding(parts: Iterable[Part]) -> None:
    """Set the columns beyond the tables' widths to zero; checkpoints do not contain them."""
    for part in parts:
        if part.used < part.out.shape[1]:
            part.out[:, part.used :].zero_()


class _Staging:
    """Host buffers for blocks of tables of one width, which are copied to the tables' device.

    Copies to a GPU are from pinned memory, while the thread draws the next block, and on the device's current stream,
    so that whatever is launched later sees them.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._device = device
        cuda = device.type == "cuda"
        self._blocks = [torch.empty(BLOCK, width, pin_memory=cuda) for _ in range(_STAGED if cuda else 1)]
        self._copied: list[torch.cuda.Event | None] = [None] * len(self._blocks)
        self._next = 0

    def block(self) -> Tensor:
        """The next block to draw into, float32 [BLOCK, width]; waits until its last copy is done."""
        copied = self._copied[self._next]
        if copied is not None:
            copied.synchronize()
        return self._blocks[self._next]

    def copy(self, values: Tensor, out: Tensor) -> None:
        """Start copying `values`, a view of the last `block`, to `out`. `block` may be called again at once."""
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):  # the current device is per thread
                out.copy_(values, non_blocking=True)
                event = self._copied[self._next] = torch.cuda.Event()
                event.record()
        else:
            out.copy_(values)
        self._next = (self._next + 1) % len(self._blocks)


def _blocks(part: Part) -> range:
    """The blocks of the table that the part's rows are in."""
    return range(part.row // BLOCK, -(-(part.row + part.out.shape[0]) // BLOCK))


def _draw(part: Part, block: int, seed: int, staging: _Staging) -> None:
    generator = torch.Generator()
    generator.manual_seed(seed_from(f"{seed}/{part.table.name}/{block}"))
    start = block * BLOCK
    lo, hi = max(start, part.row), min(start + BLOCK, part.row + part.out.shape[0])
    out = part.out[lo - part.row : hi - part.row, : part.used]
    whole = out.shape == (BLOCK, part.table.dim) and out.is_contiguous()
    # In place a draw costs no copy; the values are the same, as long as the type is.
    values = out if whole and out.device.type == "cpu" and out.dtype != torch.float16 else staging.block()
    values.normal_(0.0, part.table.init_std, generator=generator)
    if values is not out:
        staging.copy(values[lo - start : hi - start, part.column : part.column + part.used], out)
