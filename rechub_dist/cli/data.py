"""The commands `rechub-dist data ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

data_app = typer.Typer(no_args_is_help=True, help="Prepare, generate and look at Parquet data sets.")


@data_app.command()
def prepare(
    name: Annotated[str | None, typer.Argument(help="Data set; leave out to list them.")] = None,
    source: Annotated[
        Path | None, typer.Option(help="Folder with the published files (criteo: or one of them).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    min_count: Annotated[
        int | None, typer.Option(help="criteo: values that occur less often share an id; default 10.")
    ] = None,
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
    if min_count is not None and "min_count" not in chosen.options:
        raise typer.BadParameter(f"{name} takes no --min-count")
    chosen.prepare(source, out, **({} if min_count is None else {"min_count": min_count}))
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
    from rechub_dist.data.prepare.events import Columns, EventPlan, prepare_events  # noqa: PLC0415

    least = (2 if split == "session" else 5) if min_user_events is None else min_user_events
    plan = EventPlan(split, valid_from, test_from, least, min_item_events, max_length)
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
def vocabulary(
    path: Annotated[str, typer.Argument(help="Parquet file, folder, pattern or address.")],
    column: Annotated[list[str], typer.Option(help="Column of integers, strings or lists of them; may be repeated.")],
    out: Annotated[Path, typer.Option(help="A .parquet file for one vocabulary, or a folder for one a column.")],
    min_count: Annotated[int, typer.Option(help="Leave out values that occur less often.")] = 1,
    max_size: Annotated[int | None, typer.Option(help="Keep so many values, the most frequent ones.")] = None,
    first_id: Annotated[int, typer.Option(help="Id of the most frequent value; ids below it are free.")] = 1,
) -> None:
    """Number the values of columns by their frequency: a file with value, id and count, for a feature's `vocabulary`.

    Build it from the train split, so that values that only the other splits hold are unknown, as they will be later.

    Memory is bounded by the number of distinct values.

    Folders that begin with `_` are not taken for data, so that the file can lie beside it.

    Example: rechub-dist data vocabulary data/mine/train --column city --min-count 5 --out data/mine/_words/city.parquet
    """
    from rechub_dist.data.columns.frequencies import build_vocabularies  # noqa: PLC0415

    with _progress() as bar:
        task = bar.add_task("row groups", total=None)
        summaries = build_vocabularies(
            path,
            column,
            out,
            min_count=min_count,
            max_size=max_size,
            first_id=first_id,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for found in summaries:
        share = found.covered / max(1, found.occurrences)
        print(
            f"{found.path}: {found.kept:,} of {found.distinct:,} values of {', '.join(found.columns)}, which are "
            f"{share:.2%} of {found.occurrences:,} occurrences"
        )
        below = f"{found.path.parent.name}/{found.path.name}"
        unknown = ", out_of_range: unknown" if first_id else ""
        print(f"  in dataset.yaml: {{rows: {found.rows}, vocabulary: {below}{unknown}}}  # its path below data.root")


@data_app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Parquet file, folder, pattern or address.")],
    schema: Annotated[bool, typer.Option("--schema", help="Print a dataset.yaml to start from instead.")] = False,
    write: Annotated[
        bool, typer.Option("--write", help="With --schema: write it into the data's folder, with its vocabularies.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Global batch of the run to come.")] = 8192,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of the run to come.")] = 1,
    max_streams: Annotated[int, typer.Option(min=1, help="data.max_streams of the run to come.")] = 64,
    max_lanes: Annotated[int | None, typer.Option(min=1, hidden=True)] = None,  # its former name
) -> None:
    """Show schema, rows, row groups and null counts, and how well the rows would be mixed in training.

    Of a prepared folder each split is shown. With --schema, guess a dataset.yaml from all of them.

    Example: rechub-dist data inspect data/mine --schema --write
    """
    from rechub_dist.data.parquet.manifest import prepared_splits  # noqa: PLC0415

    splits = prepared_splits(path)
    if schema:
        from rechub_dist.data.tools.guess import guess_schema  # noqa: PLC0415

        with _progress() as bar:
            task = bar.add_task("row groups", total=None)
            guess = guess_schema(path, lambda done, total: bar.update(task, completed=done, total=total))
        if not write:
            print(guess.text, end="")
        for file in guess.write() if write else ():
            print(file)
        return
    if write:
        raise typer.BadParameter("--write needs --schema")
    for shown in [f"{path}/{split}" for split in splits] or [path]:
        _show(shown, batch_size, ranks, max_lanes or max_streams)


def _show(path: str, batch_size: int, ranks: int, max_streams: int) -> None:
    """Print what `inspect` tells of one split."""
    from rechub_dist.data.order.quality import layout_quality, layout_warning  # noqa: PLC0415
    from rechub_dist.data.parquet.manifest import Manifest, describe  # noqa: PLC0415

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
    counts = Manifest.read(str(path)).counts
    quality = layout_quality(counts, batch_size, ranks, max_streams=max_streams)
    console.print(
        f"shuffled in batches of {batch_size:,} on {ranks:,} rank(s): a batch has rows of "
        f"{quality.groups_per_batch:.0f} row groups, rank correlation of stored and read order "
        f"{quality.rank_correlation:+.3f}, {quality.amplification:.2f} rows decoded for each row read, at most "
        f"{quality.peak_rows:,} rows open on a rank",
        highlight=False,
        soft_wrap=True,
    )
    if (warning := layout_warning(str(path), counts, batch_size, ranks, max_streams=max_streams)) is not None:
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)


@data_app.command()
def rechunk(
    source: Annotated[str, typer.Argument(help="Prepared folder, or Parquet file, folder, pattern or address.")],
    out: Annotated[Path, typer.Option(help="Folder to write; new, or empty.")],
    row_group_rows: Annotated[int, typer.Option(min=1, help="Rows of a row group.")] = 65_536,
    files: Annotated[int | None, typer.Option(min=1, help="Files of each split, of equal size.")] = None,
    file_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of a file; default 4,194,304.", show_default=False)
    ] = None,
    shuffle: Annotated[bool, typer.Option(help="Write the rows of each split in random order.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the random order.")] = 0,
) -> None:
    """Write the same rows in other row groups and files, which mix better and are decoded once.

    Of a prepared folder each split is written by itself, and dataset.yaml is copied.

    Memory is bounded, whatever the row groups' size; --shuffle needs the room of the data once more on the disk.

    Example: rechub-dist data rechunk data/mine --out data/mine_64k --files 16
    """
    from rich.progress import Progress  # noqa: PLC0415

    from rechub_dist.data.tools.rechunk import rechunk as write  # noqa: PLC0415

    if files and file_rows:
        raise typer.BadParameter("give --files or --file-rows, not both")
    with Progress(console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def progress(split: str, done: int, total: int) -> None:
            if split not in tasks:
                tasks[split] = bar.add_task(split or "rows", total=total)
            bar.update(tasks[split], completed=done)

        counts = write(
            source, out, row_group_rows=row_group_rows, files=files, file_rows=file_rows, shuffle=shuffle, seed=seed,
            progress=progress,
        )  # fmt: skip
    for split, rows in counts.items():
        print(f"{out / split}: {rows:,} rows")


def _progress() -> Progress:
    """A bar on standard error, so that standard output can be piped."""
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _report(out: Path) -> None:
    from rechub_dist.data.parquet.manifest import Manifest  # noqa: PLC0415

    for split in ("train", "train_prefixes", "valid", "test"):
        if (out / split).exists():
            print(f"{out / split}: {Manifest.read(str(out / split)).rows:,} rows")
    print(f"{out / 'dataset.yaml'}: schema")
