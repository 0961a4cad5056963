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
def sequences(
    events: Annotated[Path, typer.Argument(help="Event file with a header: .csv, .tsv or .parquet.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    user: Annotated[str, typer.Option(help="Column of the users, or of the sessions.")],
    item: Annotated[str, typer.Option(help="Column of the items.")],
    time: Annotated[str | None, typer.Option(help="Column of the times; without it the file is in time order.")] = None,
    split: Annotated[str, typer.Option(help="leave-one-out, temporal or session.")] = "leave-one-out",
    valid_from: Annotated[str | None, typer.Option(help="Time at which the valid split begins.")] = None,
    test_from: Annotated[str | None, typer.Option(help="Time at which the test split begins.")] = None,
    min_user_events: Annotated[
        int | None, typer.Option(help="Drop users of fewer events; default 5, with --split session 2.")
    ] = None,
    min_item_events: Annotated[int, typer.Option(help="Drop items of fewer events.")] = 5,
    max_length: Annotated[int, typer.Option(help="Items of a history; the newest are kept.")] = 50,
) -> None:
    """Turn a file of events into next-item prediction: rows of user_id, history and item, and their schema.

    leave-one-out: a user's last event is a test row, the last but one a valid row.

    temporal: so are all events from --valid-from and --test-from on.

    session: so are all events of the sessions that end from then on.

    Users and items are dropped until all that are left have events enough; events of one time keep the file's order.

    train/ has a row a user, train_prefixes/ a row an event, for models that learn at the last position alone.

    users.parquet and items.parquet tell what id stands for whom.

    Example: rechub-dist data sequences ratings.csv --out data/mine --user userId --item movieId --time timestamp
    """
    from rechub_dist.data.prepare.events import Columns, Plan, prepare_events  # noqa: PLC0415

    least = (2 if split == "session" else 5) if min_user_events is None else min_user_events
    plan = Plan(split, valid_from, test_from, least, min_item_events, max_length)
    counts = prepare_events(events, out, Columns(user, item, time), plan)
    _report(out)
    print(
        f"{counts.kept:,} of {counts.read:,} events, {counts.users:,} users, {counts.items:,} items, of which "
        f"{counts.unlearned:,} stand in no train row"
    )


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
def inspect(path: Annotated[str, typer.Argument(help="Parquet file, folder, glob or address.")]) -> None:
    """Show schema, rows, row groups and null counts."""
    from rechub_dist.data.manifest import describe  # noqa: PLC0415

    found = describe(path)
    console = Console()
    table = Table("column", "type", "nulls", title=path, title_justify="left")
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

    for split in ("train", "train_prefixes", "valid", "test"):
        if (out / split).exists():
            print(f"{out / split}: {Manifest.read(str(out / split)).rows:,} rows")
    print(f"{out / 'dataset.yaml'}: schema")
