"""Initial weights are the same wherever a table lies."""

from __future__ import annotations

import math

import pytest
import torch

from rechub_dist.embedding.init import BLOCK, Part, init_tables
from rechub_dist.features import Table


@pytest.mark.parametrize("threads", [1, 4])
def test_initial_weights_are_those_of_the_cpu(device: str, threads: int) -> None:
    tables = [Table("a", 9 * BLOCK + 17, dim=16), Table("b", 5 * BLOCK, dim=5), Table("zero", 100, dim=4, init_std=0.0)]
    found, wanted = (
        [Part(torch.full((table.rows, table.stored_dim), math.nan, device=where), table) for table in tables]
        for where in (device, "cpu")
    )
    slices = [Part(torch.full((2 * BLOCK, 4), math.nan, device=where), tables[0], 5, 4) for where in (device, "cpu")]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        init_tables([*found, slices[0]], seed=3)
        init_tables([*wanted, slices[1]], seed=3)
    finally:
        torch.set_num_threads(before)
    for one, other in zip([*found, slices[0]], [*wanted, slices[1]], strict=True):
        assert torch.equal(one.out.cpu(), other.out)
