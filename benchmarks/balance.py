"""How evenly a table that is sharded by rows loads its ranks: `python benchmarks/balance.py`.

Batches of ids are drawn from power laws; values have ids as in vocabularies, by frequency or scattered. The load of the
busiest rank over the mean: of different rows, which are read and updated, and of all ids, which are sent to it.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pyarrow as pa
import typer
from rich.console import Console
from rich.table import Table

from rechub_dist.data.columns.frequencies import frequent


def main(
    values: Annotated[int, typer.Option(min=100)] = 1_000_000,
    batch: Annotated[int, typer.Option(min=1, help="Ids of a batch.")] = 65_536,
    batches: Annotated[int, typer.Option(min=1)] = 20,
) -> None:
    """Draw, count, print."""
    rng = np.random.default_rng(0)
    table = Table("exponent", "ranks", "rows: by frequency", "scattered", "ids: by frequency", "scattered")
    for exponent in (0.8, 1.05, 1.2):
        share = 1 / np.arange(1, values + 1) ** exponent
        share /= share.sum()
        counts = pa.table({"value": np.arange(values), "count": np.full(values, 1)})
        ids = {
            name: frequent(counts, 0, scatter=name == "scattered")["id"].to_numpy() for name in ("plain", "scattered")
        }
        drawn = [rng.choice(values, batch, p=share) for _ in range(batches)]
        for ranks in (2, 4, 8, 16):
            of_rank = {name: found // -(-(values + 1) // ranks) for name, found in ids.items()}
            cells = []
            for distinct in (True, False):
                for owner in of_rank.values():
                    loads = [np.bincount(owner[np.unique(one) if distinct else one], minlength=ranks) for one in drawn]
                    cells.append(f"{np.mean([load.max() / load.mean() for load in loads]):.2f}")
            table.add_row(str(exponent), str(ranks), *cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
