"""The commands `rechub-dist data ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

data_app = typer.Typer(no_args_is_help=True, help="Prepare, generate and look at Parquet data sets.")


@data_app.command()
def prepare(
    name: Annotated[str | None, typer.Argument(help="Data set; leave out to list them.")] = None,
    source: Annotated[Path | None, typer.Option(help="Folder with the published files.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
) -> None:
    """Turn a public data set's files into Parquet shards and their schema.

    Example: rechub-dist data prepare movielens_1m_ctr --source ml-1m --out data/movielens_1m_ctr
    """
    from rechub_dist.data.prepare import preparation, preparations  # noqa: PLC0415 - pyarrow is slow to import

    if name is None:
        for item in preparations().values():
            print(f"{item.name:24} {item.summary}")
        return
    chosen = preparation(name)
    if source is None or out is None:
        raise typer.BadParameter("give --source and --out")
    chosen.prepare(source, out)
    _report(out)


@data_app.command()
def synthesize(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    rows: Annotated[int, typer.Option(help="Rows in all, split 8:1:1.")],
    dense: Annotated[int, typer.Option(help="Dense features.")] = 13,
    sparse: Annotated[int, typer.Option(help="Sparse features, a table each.")] = 26,
    vocabulary: Annotated[int, typer.Option(help="Rows of each table.")] = 1000,
    sequence: Annotated[bool, typer.Option(help="Add an item and a history that share a table.")] = False,
    skew: Annotated[float, typer.Option(help="Exponent of the ids' power law; 0 is uniform.")] = 1.05,
    labels: Annotated[int, typer.Option(help="Number of labels.")] = 1,
    files: Annotated[int, typer.Option(help="Shards of the train split.")] = 4,
    seed: Annotated[int, typer.Option(help="Another seed, another truth.")] = 0,
) -> None:
    """Generate a data set with a planted truth, so that the best reachable metrics are known (truth.json).

    Example: rechub-dist data synthesize --out data/synthetic --rows 400000 --dense 4 --sparse 8
    """
    from rechub_dist.data.prepare.synthetic import synthesize as generate  # noqa: PLC0415

    generate(
        out, rows, dense=dense, sparse=sparse, vocabulary=vocabulary, sequence=sequence, skew=skew, seed=seed,
        labels=labels, files=files,
    )  # fmt: skip
    _report(out)


@data_app.command()
def inspect(path: Annotated[Path, typer.Argument(help="Parquet file or folder.")]) -> None:
    """Show schema, rows, row groups and null counts."""
    from rechub_dist.data.manifest import describe  # noqa: PLC0415

    found = describe(str(path))
    console = Console()
    table = Table("column", "type", "nulls", title=str(path), title_justify="left")
    for column in found["columns"]:
        table.add_row(column["name"], column["type"], f"{column['nulls']:,}")
    console.print(table)
    groups = found["row_group_rows"]
    console.print(
        f"{found['rows']:,} rows in {found['row_groups']:,} row groups of {groups['min']:,} to {groups['max']:,} rows, "
        f"{found['files']:,} file(s), {found['bytes']:,} bytes",
        highlight=False,
    )


def _report(out: Path) -> None:
    from rechub_dist.data.manifest import Manifest  # noqa: PLC0415

    for split in ("train", "valid", "test"):
        if (out / split).exists():
            print(f"{out / split}: {Manifest.read(str(out / split)).rows:,} rows")
    print(f"{out / 'dataset.yaml'}: schema")
