"""The commands `rechub-dist data ...`."""

from __future__ import annotations

import sys
from pathlib import Path
from time import monotonic as time_now
from typing import Annotated, Any

import typer
from rich import markup
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from rechub_dist.cli.importing import import_tables
from rechub_dist.errors import printable, shortened

_QUIET = 10.0  # seconds between lines of progress where there is no terminal

data_app = typer.Typer(no_args_is_help=True, help="Import, prepare, generate and inspect data sets.")
data_app.command("import")(import_tables)


@data_app.command()
def prepare(
    name: Annotated[str | None, typer.Argument(help="Data set; omit to list them.")] = None,
    source: Annotated[
        Path | None, typer.Option(help="Folder with the published files (criteo: or a single file).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder.")] = None,
    min_count: Annotated[
        int | None, typer.Option(help="criteo: values that occur less often share one id; default 10.")
    ] = None,
) -> None:
    """Convert a public data set's files to Parquet shards with a schema.

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
    events: Annotated[Path, typer.Argument(help="Event file: .csv or .tsv with a header, or .parquet.")],
    out: Annotated[Path, typer.Option(help="Output folder.")],
    user: Annotated[str, typer.Option(help="Column of user or session ids.")],
    item: Annotated[str, typer.Option(help="Column of item ids.")],
    time: Annotated[str | None, typer.Option(help="Column of timestamps; default: the file is in time order.")] = None,
    split: Annotated[str, typer.Option(help="leave-one-out, temporal or session.")] = "leave-one-out",
    valid_from: Annotated[str | None, typer.Option(help="Start time of the valid split.")] = None,
    test_from: Annotated[str | None, typer.Option(help="Start time of the test split.")] = None,
    min_user_events: Annotated[
        int | None, typer.Option(help="Drop users with fewer events; default 5, with --split session 2.")
    ] = None,
    min_item_events: Annotated[int, typer.Option(help="Drop items with fewer events.")] = 5,
    max_length: Annotated[int, typer.Option(help="Maximum history length; the newest items are kept.")] = 50,
) -> None:
    """Convert an event log to a next-item data set: rows of user_id, history and item, with a schema.

    leave-one-out: each user's last event is a test row, the last but one a valid row.

    temporal: events from --valid-from on are valid rows, events from --test-from on test rows.

    session: as temporal, by the end time of the event's session.

    Users and items with too few events are dropped until all that remain have enough. Ties in time keep file order.

    train/ has one row per user; train_prefixes/ one row per event, for models that only learn from the last position.

    users.parquet and items.parquet map ids to the original values.

    Example: rechub-dist data sequences ratings.csv --out data/next --user userId --item movieId --time timestamp
    """
    from rechub_dist.data.prepare.events import Columns, EventPlan, prepare_events  # noqa: PLC0415

    least = (2 if split == "session" else 5) if min_user_events is None else min_user_events
    plan = EventPlan(split, valid_from, test_from, least, min_item_events, max_length)
    counts = prepare_events(events, out, Columns(user, item, time), plan)
    _report(out)
    print(
        f"{counts.kept:,} of {counts.read:,} events, {counts.users:,} users, {counts.items:,} items, of which "
        f"{counts.unlearned:,} are in no train row"
    )


@data_app.command()
def synthesize(
    out: Annotated[Path, typer.Option(help="Output folder.")],
    rows: Annotated[int, typer.Option(help="Total rows, split 8:1:1.")],
    dense: Annotated[int, typer.Option(help="Number of dense features.")] = 13,
    sparse: Annotated[int, typer.Option(help="Number of sparse features, each with its own table.")] = 26,
    vocabulary: Annotated[int, typer.Option(help="Rows per table.")] = 1000,
    sequence: Annotated[bool, typer.Option(help="Add an item feature and a history that share a table.")] = False,
    skew: Annotated[float, typer.Option(help="Power-law exponent of the id frequencies; 0 is uniform.")] = 1.05,
    labels: Annotated[int, typer.Option(help="Number of labels.")] = 1,
    files: Annotated[int, typer.Option(help="Files of the train split.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the data and of the true model.")] = 0,
) -> None:
    """Generate a synthetic data set from a known model; truth.json has the best reachable metrics.

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
    path: Annotated[str, typer.Argument(help="Parquet file, folder, glob or address.")],
    column: Annotated[list[str], typer.Option(help="Column of integers, strings or lists of them; repeatable.")],
    out: Annotated[
        Path, typer.Option(help="A .parquet file for one shared vocabulary, or a folder for one per column.")
    ],
    min_count: Annotated[int, typer.Option(help="Omit values that occur less often.")] = 1,
    max_size: Annotated[int | None, typer.Option(help="Keep only this many values, the most frequent.")] = None,
    first_id: Annotated[int, typer.Option(help="Id of the most frequent value; lower ids stay unused.")] = 1,
    scatter: Annotated[
        bool | None,
        typer.Option(help="Spread frequent values over the ids, for tables sharded by rows; default: from 1M values."),
    ] = None,
) -> None:
    """Build a vocabulary: a file with value, id and count, ids by descending frequency, for a feature's `vocabulary`.

    Build it from the train split, so that values seen only in the other splits are unknown, as in production.

    Memory grows with the number of distinct values only.

    The file may be stored beside the data in a folder that begins with `_`, which is never read as data.

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
            scatter=scatter,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for found in summaries:
        share = found.covered / max(1, found.occurrences)
        print(
            f"{found.path}: {found.kept:,} of {found.distinct:,} values of {', '.join(found.columns)}, covering "
            f"{share:.2%} of {found.occurrences:,} occurrences"
        )
        below = f"{found.path.parent.name}/{found.path.name}"
        unknown = ", out_of_range: unknown" if first_id else ""
        print(f"  in dataset.yaml: {{rows: {found.rows}, vocabulary: {below}{unknown}}}  # its path below data.root")


@data_app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Parquet file, folder, glob or address.")],
    schema: Annotated[bool, typer.Option("--schema", help="Print a guessed dataset.yaml instead.")] = False,
    write: Annotated[
        bool, typer.Option("--write", help="With --schema: write it and its vocabularies to the data folder.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Global batch size of the planned run.")] = 8192,
    ranks: Annotated[int, typer.Option(min=1, help="World size of the planned run.")] = 1,
    max_streams: Annotated[int, typer.Option(min=1, help="data.max_streams of the planned run.")] = 64,
    max_lanes: Annotated[int | None, typer.Option(min=1, hidden=True)] = None,  # its former name
    user: Annotated[str | None, typer.Option(help="Column of user ids; default: by its name.")] = None,
    item: Annotated[str | None, typer.Option(help="Column of item ids; default: by its name or dataset.yaml.")] = None,
    time: Annotated[str | None, typer.Option(help="Column of times; default: by its name or values.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Column of labels; repeatable. Default: by dataset.yaml or its name.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Read at most this many rows of each split; default all of local files.")
    ] = None,
    leaks: Annotated[bool, typer.Option("--leaks", help="Look for what training must not know.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page with plots to this file.")] = None,
) -> None:
    """Show what a data set holds, split by split, and how well training would shuffle the rows.

    For each column: nulls, distinct and frequent values, a histogram. Also rates of labels, ranges of time, lengths of
    histories, and the users and items of valid and test that train lacks. See docs/inspect.md.

    With --schema, guess a dataset.yaml from all splits instead.

    Example: rechub-dist data inspect data/mine --html mine.html --leaks
    """
    if schema:
        _schema(path, write)
        return
    if write:
        raise typer.BadParameter("--write needs --schema")
    from rechub_dist.cli.inspect import show_leaks, show_profile  # noqa: PLC0415
    from rechub_dist.data.tools.figures import Run  # noqa: PLC0415
    from rechub_dist.data.tools.leaks import find_leaks  # noqa: PLC0415
    from rechub_dist.data.tools.profile import profile_tables  # noqa: PLC0415
    from rechub_dist.data.tools.profile_html import check_page, write_page  # noqa: PLC0415
    from rechub_dist.data.tools.roles import find_roles  # noqa: PLC0415
    from rechub_dist.data.tools.tables import Tables  # noqa: PLC0415
    from rechub_dist.reporting.strict_json import dumps  # noqa: PLC0415

    if html is not None:
        check_page(html)
    with _progress() as bar:
        task, told = bar.add_task("footers", total=None), time_now()

        def progress(what: str, done: int, total: int) -> None:
            nonlocal told
            if bar.disable and time_now() > told + _QUIET:
                print(f"{printable(what)}: {done:,} of {total:,}", file=sys.stderr, flush=True)
                told = time_now()
            bar.update(task, description=markup.escape(printable(shortened(what, 40))), completed=done, total=total)

        with Tables(path, sample=sample, progress=progress) as tables:
            roles = find_roles(tables, user=user, item=item, time=time, labels=tuple(label or ()))
            found = profile_tables(tables, roles, Run(batch_size, ranks, max_lanes or max_streams), progress)
            report = find_leaks(tables, roles, progress) if leaks else None
    if html is not None:
        write_page(html, found, report)
    if as_json:
        tree = found.tree()
        print(dumps(tree if report is None else {**tree, "leaks": report.tree()}))
        return
    show_profile(found)
    if report is not None:
        show_leaks(report)


def _schema(path: str, write: bool) -> None:
    """Print a guessed schema, or write it and print the files."""
    from rechub_dist.data.tools.guess import guess_schema  # noqa: PLC0415

    with _progress() as bar:
        task = bar.add_task("row groups", total=None)
        guess = guess_schema(path, lambda done, total: bar.update(task, completed=done, total=total))
    if not write:
        print(guess.text, end="")
    for file in guess.write() if write else ():
        print(file)


@data_app.command()
def rechunk(
    source: Annotated[str, typer.Argument(help="Prepared folder, or Parquet file, folder, glob or address.")],
    out: Annotated[Path, typer.Option(help="New or empty output folder.")],
    row_group_rows: Annotated[int, typer.Option(min=1, help="Rows per row group.")] = 65_536,
    files: Annotated[int | None, typer.Option(min=1, help="Number of equally large files per split.")] = None,
    file_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows per file; default 4,194,304.", show_default=False)
    ] = None,
    shuffle: Annotated[bool, typer.Option(help="Write the rows of each split in random order.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random order.")] = 0,
) -> None:
    """Rewrite the same rows in new row groups and files, which shuffle better and are decoded only once.

    For a prepared folder, each split is rewritten separately, and dataset.yaml is copied.

    Memory is bounded for row groups of any size. --shuffle temporarily needs as much disk space as the data again.

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
    """A progress bar on stderr, so that stdout can be piped; nothing where that is no terminal."""
    columns, console = (*Progress.get_default_columns(), MofNCompleteColumn()), Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _report(out: Path) -> None:
    from rechub_dist.data.parquet.manifest import Manifest  # noqa: PLC0415

    for split in ("train", "train_prefixes", "valid", "test"):
        if (out / split).exists():
            print(f"{out / split}: {Manifest.read(str(out / split)).rows:,} rows")
    print(f"{out / 'dataset.yaml'}: schema")
