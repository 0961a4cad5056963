"""The commands `rechub-dist vectors`, `index` and `retrieve`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from rechub_dist.cli.entry import AllowCode, Overrides
from rechub_dist.distributed.process import quiet_libraries
from rechub_dist.errors import UserError

_VALUES = typer.Option(
    "--values", help="The rows hold values, as Bundle takes them, not the ids of the data set's own files."
)
_OUT = "New or empty folder or address for the Parquet output."
_KEEP = "Column to copy to the output; repeatable."


def vectors(
    source: Annotated[str, typer.Argument(metavar="BUNDLE | RUN", help="A bundle, or a run, which is exported first.")],
    of: Annotated[Literal["items", "users"], typer.Option(help="Whose vectors.")],
    out: Annotated[str, typer.Option(help=_OUT)],
    data: Annotated[str | None, typer.Option(help="Rows of users: Parquet file, folder, glob or address.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help=_KEEP)] = None,
    values: Annotated[bool, _VALUES] = False,
    nproc: Annotated[int, typer.Option(min=1, help="Processes that share the row groups.")] = 1,
    set_: Overrides = None,
    allow_code: AllowCode = None,
) -> None:
    """Write the vectors of a recall model's items, or of users, as Parquet.

    Items come as `item` (in the words of the data) and `vector`, users as `vectors`, several for some models. A file
    _SUCCESS marks the output as complete.

    Example: rechub-dist vectors bundles/dssm --of items --out vectors/items --nproc 2
    """
    from rechub_dist.inference.vectors import Wanted, write_vectors  # noqa: PLC0415 - pyarrow is slow to import

    if of == "items" and (data is not None or values):
        raise UserError("--of items: items come from the bundle; leave --data and --values out")
    if of == "users" and data is None:
        raise UserError("--of users: name their rows with --data")
    with _bundle(source, out, set_ or [], allow_code or []) as bundle:
        rows = write_vectors(Wanted(bundle, of, out, data, tuple(keep or ()), not values, nproc))
    print(f"{out}: vectors of {rows:,} {of}")


def index(
    source: Annotated[
        str, typer.Argument(metavar="VECTORS | BUNDLE", help="Vectors of items that `vectors` wrote, or a bundle.")
    ],
    out: Annotated[Path, typer.Option(help="The index to write; an earlier, unchanged one is replaced.")],
    kind: Annotated[
        Literal["flat", "ivf", "hnsw", "pq"],
        typer.Option(help="flat: exact. hnsw: a graph. ivf: lists around centres. pq: lists of short codes."),
    ] = "hnsw",
    recall: Annotated[
        float, typer.Option(min=0, max=1, help="Recall that the parameters of search are chosen for.")
    ] = 0.98,
    top_k: Annotated[int, typer.Option(min=1, help="Items that recall is measured on.")] = 100,
    queries: Annotated[
        str | None, typer.Option(help="Users' vectors to measure with; default: a sample of the items'.")
    ] = None,
    links: Annotated[int | None, typer.Option(min=2, help="hnsw: links of an item; default: 32.")] = None,
    ef_construction: Annotated[
        int | None, typer.Option(min=1, help="hnsw: candidates for links; default: 200.")
    ] = None,
    ef_search: Annotated[
        int | None, typer.Option(min=1, help="hnsw: candidates of a search; default: as recall needs.")
    ] = None,
    lists: Annotated[
        int | None, typer.Option(min=1, help="ivf, pq: lists; default: four times the root of the items.")
    ] = None,
    probes: Annotated[
        int | None, typer.Option(min=1, help="ivf, pq: lists that are searched; default: as recall needs.")
    ] = None,
    codes: Annotated[
        int | None, typer.Option(min=1, help="pq: codes of four bits of an item; default: half the width.")
    ] = None,
    refine: Annotated[
        int | None,
        typer.Option(min=1, help="pq: candidates compared by 16-bit vectors, in multiples of k; default: as needed."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="To build with; default: as many as cores.")] = None,
) -> None:
    """Make an index of items' vectors, and measure it against exact search.

    It is searched by inner product. index.json in its folder says what it is, its recall and its speed.

    Example: rechub-dist index bundles/dssm --out indexes/dssm --kind hnsw --recall 0.98
    """
    from rechub_dist.inference.index import Wanted, make_index  # noqa: PLC0415

    given = {
        "links": links, "ef_construction": ef_construction, "ef_search": ef_search, "lists": lists, "probes": probes,
        "codes": codes, "refine": refine,
    }  # fmt: skip
    wanted = Wanted(kind, {n: v for n, v in given.items() if v is not None}, recall, top_k, queries, threads)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("look at the vectors", total=None)
        made = make_index(
            source, out, wanted,
            lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None),
        )  # fmt: skip
    found = made.measured
    chosen = ", ".join(f"{name} {value}" for name, value in made.parameters.items())
    print(f"{out}: {made.kind} of {made.size:,} vectors {made.dim} wide{', ' if chosen else ''}{chosen}")
    print(
        f"recall@{found.k} {found.recall:.4f} on {found.queries} "
        f"{'given vectors' if found.queries_of == 'given' else 'vectors of items'}"
    )
    for size, spent in found.milliseconds.items():
        print(f"{spent:.3g} ms a query of {size}, exact search {found.exact_milliseconds[size]:.3g} ms, one thread")
    if found.recall < recall:
        print(f"recall@{found.k} is below {recall:g}: give it more links, lists or codes, or another kind")


def retrieve(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="The bundle of a recall model.")],
    data: Annotated[str, typer.Option(help="Rows of users: Parquet file, folder, glob or address.")],
    out: Annotated[str, typer.Option(help=_OUT)],
    top_k: Annotated[int, typer.Option(min=1, help="Number of items per row.")] = 100,
    index: Annotated[str | None, typer.Option(help="An index of the bundle's items; default: exact search.")] = None,
    where: Annotated[
        str | None, typer.Option(metavar="SQL", help="What must be true of an item: \"category = 'x'\".")
    ] = None,
    keep: Annotated[list[str] | None, typer.Option(help=_KEEP)] = None,
    values: Annotated[bool, _VALUES] = False,
) -> None:
    """Write the best items of a bundle's catalogue for each row of users, without those of the row's history.

    The output is that of `predict`: predicted_items and predicted_scores beside source_file and source_row, and
    _SUCCESS once it is complete.

    Example: rechub-dist retrieve bundles/dssm --data data/now --out retrieved --top-k 100 --index indexes/dssm
    """
    from rechub_dist.inference.retrieve import Wanted, write_retrieved  # noqa: PLC0415

    rows = write_retrieved(Wanted(bundle, data, out, top_k, index, where, tuple(keep or ()), not values))
    print(f"{out}: items for {rows:,} rows")


@contextmanager
def _bundle(source: str, out: str, overrides: list[str], allowed_code: list[str]) -> Iterator[str]:
    """The folder of a bundle; that of a run is made for the time, where the output goes to."""
    from rechub_dist.inference.bundle.deltas import is_bundle  # noqa: PLC0415

    if "://" not in source and is_bundle(Path(source)):
        if overrides or allowed_code:
            raise UserError(f"{source} is a bundle: --set and --allow-code are for runs; leave them out")
        yield source
        return
    from rechub_dist.inference.export import export_bundle  # noqa: PLC0415 - torch is slow to import

    quiet_libraries()
    beside = None if "://" in out else Path(out).absolute().parent
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".rechub-bundle-", dir=beside) as folder:
        export_bundle(source, Path(folder) / "bundle", overrides=overrides, allowed_code=allowed_code)
        yield str(Path(folder) / "bundle")
