"""Initial weights of a table: a pure function of (seed, table, row), whatever part of it a rank holds."""

from __future__ import annotations

import torch
from torch import Tensor

from rechub_dist.features import Table
from rechub_dist.seeds import seed_from

BLOCK = 4096  # rows that are drawn from one generator


@torch.no_grad()
def init_table(out: Tensor, table: Table, seed: int, first_row: int = 0, first_column: int = 0) -> None:
    """Fill `out` [r, c] with rows `first_row ...` and columns `first_column ...` of the table's initial weights.

    Entries are N(0, init_std^2); columns beyond the table's width (storage padding) are zero. The draws are by blocks
    of rows, each with a generator of its own, so that any sharding of the table starts from the same weights.
    """
    rows, columns = out.shape
    width = table.dim or 0
    used = max(0, min(first_column + columns, width) - first_column)
    out.zero_()
    if table.init_std == 0 or used == 0:
        return
    generator = torch.Generator()
    for block in range(first_row // BLOCK, -(-(first_row + rows) // BLOCK)):
        generator.manual_seed(seed_from(f"{seed}/{table.name}/{block}"))
        values = torch.randn(BLOCK, width, generator=generator).mul_(table.init_std)
        start = block * BLOCK
        lo, hi = max(start, first_row), min(start + BLOCK, first_row + rows)
        out[lo - first_row : hi - first_row, :used] = values[
            lo - start : hi - start, first_column : first_column + used
        ].to(out)
