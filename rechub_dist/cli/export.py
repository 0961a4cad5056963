"""The command `rechub-dist export`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer
from rich.console import Console
from rich.progress import Progress

from rechub_dist.cli.entry import AllowCode, Overrides
from rechub_dist.distributed.process import quiet_libraries
from rechub_dist.errors import UserError

if TYPE_CHECKING:
    from rechub_dist.inference.comparison import Comparison

OutputDir = Annotated[str, typer.Argument(metavar="OUTPUT_DIR", help="The run: its output or checkpoint folder.")]
Precision = Literal["fp32", "fp16", "int8", "int4"]
Check = Annotated[
    bool, typer.Option("--check/--no-check", help="Compare its scores with the run's before it becomes visible.")
]
CheckData = Annotated[
    str | None, typer.Option(help="Rows to compare on; default: the run's valid split, else its train split.")
]
Tolerance = Annotated[
    float | None,
    typer.Option(min=0, help="Largest difference allowed; default: 1e-5, fp16 2e-3, int8 3e-2, int4 0.3."),
]
CheckRows = Annotated[int, typer.Option(min=1, help="Rows to compare, at most.")]
MaxCost = Annotated[
    float | None,
    typer.Option(min=0, help="What the first metric (AUC, say) may lose on the compared rows; default: anything."),
]
FormatNames = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAMES",
        help="Of onnx, torch, whole, triton, separated by commas: for what it is written; default: onnx.",
    ),
]
WholeMB = Annotated[int, typer.Option(min=1, help="Most that one file of --format whole may have.")]


def export(
    output_dir: OutputDir,
    out: Annotated[Path, typer.Option(help="The bundle, or delta, to write; an earlier, unchanged one is replaced.")],
    tables: Annotated[
        Precision | None,
        typer.Option(help="How tables are stored; int8, int4: in steps, scaled by row. Default: fp32, or as before."),
    ] = None,
    format_: FormatNames = None,
    whole_mb: WholeMB = 256,
    since: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="BUNDLE", help="Write what has changed since a bundle; repeat for deltas that follow it already."
        ),
    ] = None,
    set_: Overrides = None,
    check: Check = True,
    check_data: CheckData = None,
    check_rows: CheckRows = 10_000,
    tolerance: Tolerance = None,
    max_cost: MaxCost = None,
    allow_code: AllowCode = None,
) -> None:
    """Write a run's best weights as a bundle, which scores rows without torch, torchrec, fbgemm or ray.

    A bundle is a folder: the model as ONNX, memory-mapped tables, and the schema with its vocabularies. In Python,
    rechub_dist.Bundle(folder).score(rows) scores rows as their caller has them. With --format torch it has programs of
    torch.export, with whole also the model and its tables in one ONNX file, with triton a repository for that server.
    With --since it is a delta: the rows and files that differ.

    Example: rechub-dist export runs/deepfm --out bundles/small --tables fp16
    """
    from rechub_dist.inference.bundle.deltas import read_state  # noqa: PLC0415
    from rechub_dist.inference.deltas import stored_precision  # noqa: PLC0415
    from rechub_dist.inference.formats import formats_of, parse_formats  # noqa: PLC0415

    formats = parse_formats(format_ or "onnx")
    before = read_state(since[0], since[1:]) if since else None
    if before is not None and format_ is not None and formats != formats_of(before.manifest):
        there = ",".join(formats_of(before.manifest))
        raise UserError(f"--format {format_}: what --since names is for {there}, and so is a delta; leave it out")
    from rechub_dist.inference.export import export_bundle, export_delta  # noqa: PLC0415 - torch is slow to import
    from rechub_dist.inference.whole import Whole  # noqa: PLC0415

    quiet_libraries()
    overrides, allowed = set_ or [], allow_code or []
    compare = _comparison(output_dir, overrides, allowed, _Limits(check_data, check_rows, tolerance, max_cost))
    with _progress() as progress:
        if before is None:
            made = export_bundle(
                output_dir, out, tables=tables or "fp32", formats=formats, whole=Whole(whole_mb * 10**6, check_data),
                overrides=overrides, allowed_code=allowed, check=compare if check else None, progress=progress,
            )  # fmt: skip
        else:
            delta = export_delta(
                output_dir, out, before, tables=tables, whole=Whole(whole_mb * 10**6, check_data), overrides=overrides,
                allowed_code=allowed, check=compare if check else None, progress=progress,
            )  # fmt: skip
            made = delta.result
    whole = sum(file.size for file in made.files.values())
    print(f"{out}: {made.model}, step {made.step}, ", end="")
    if before is None:
        told = "" if formats == ("onnx",) else f", for {', '.join(formats)}"
        print(f"{whole / 1e6:,.1f} MB, tables in {stored_precision(made)}{told}")
    else:
        size = sum(file.size for file in delta.files.values())
        print(f"follows version {before.manifest.label}, {size / 1e6:,.1f} MB, in full {whole / 1e6:,.1f} MB")
        for name, table in made.tables.items():
            print(f"{name}: {delta.rows.get(name, 0):,} of {table.rows:,} rows have changed")
    if made.checked:
        apart = ", ".join(f"{name} {value:.2g}" for name, value in made.checked.items() if name != "rows")
        print(f"largest differences from the run's own on {made.checked['rows']:,.0f} rows: {apart}")
        for name, (run, bundle) in made.compared.items():
            print(f"{name} on them: run {run:.5f}, bundle {bundle:.5f}, difference {bundle - run:+.5f}")
    else:
        print("not compared with the run", file=sys.stderr)


def fold(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle, or a folder to `publish` to.")],
    out: Annotated[Path, typer.Option(help="The bundle to write; an earlier, unchanged one is replaced.")],
    deltas: Annotated[
        list[Path] | None, typer.Argument(metavar="[DELTA]...", help="Deltas that follow it, in order.")
    ] = None,
) -> None:
    """Write a bundle and the deltas that follow it as one bundle: file for file that of an export in full.

    Example: rechub-dist fold bundles/deepfm deltas/monday deltas/tuesday --out bundles/tuesday
    """
    from rechub_dist.inference.bundle.deltas import read_state  # noqa: PLC0415 - NumPy is slow to import
    from rechub_dist.inference.deltas import fold as write  # noqa: PLC0415

    made = write(read_state(bundle, deltas or []), out)
    size = sum(file.size for file in made.files.values())
    print(f"{out}: {made.model}, step {made.step}, version {made.label}, {size / 1e6:,.1f} MB")


def publish(
    output_dir: OutputDir,
    to: Annotated[Path, typer.Option(help="Folder to add bundles and deltas to: new, or published to before.")],
    every: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", min=0.1, help="Go on: publish the newest checkpoint whenever there is a new one."
        ),
    ] = None,
    deltas: Annotated[int, typer.Option(min=0, help="Deltas after which there is a whole bundle again.")] = 20,
    tables: Annotated[Precision, typer.Option(help="How the numbers of tables are stored.")] = "fp32",
    set_: Overrides = None,
    check: Check = True,
    check_data: CheckData = None,
    check_rows: CheckRows = 10_000,
    tolerance: Tolerance = None,
    max_cost: MaxCost = None,
    allow_code: AllowCode = None,
) -> None:
    """Publish a run into a folder that `serve --watch` serves: first as a bundle, then as deltas of what has changed.

    Without --every it publishes the best checkpoint and ends. A bundle is also published where the deltas would be more
    than half as large, or where tables or features are others. See docs/serving.md.

    Example: rechub-dist publish runs/deepfm --to published/deepfm --every 60
    """
    from rechub_dist.inference.publish import Wanted, follow  # noqa: PLC0415 - torch is slow to import
    from rechub_dist.inference.publish import publish as publish_once  # noqa: PLC0415

    quiet_libraries()
    limits = _Limits(check_data, check_rows, tolerance, max_cost)
    compare = _comparison(output_dir, set_ or [], allow_code or [], limits) if check else None
    wanted = Wanted(output_dir, to, tables, deltas, tuple(set_ or ()), tuple(allow_code or ()), compare)

    def said(text: str) -> None:
        print(text, flush=True)

    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with _progress() as progress:
            if every is None:
                publish_once(wanted, said, progress)
            else:
                follow(wanted, every, said, progress)
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(*_: object) -> None:
    """End as if all were done; what is half written is removed on the way."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(0)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("look at the run", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None)


class _Limits(NamedTuple):
    """How a bundle is compared with its run, and how far apart they may be."""

    data: str | None
    rows: int
    tolerance: float | None
    max_cost: float | None


def _comparison(
    output_dir: str, overrides: list[str], allowed: list[str], limits: _Limits
) -> Callable[[Path], Comparison]:
    """What compares a bundle with the run's own scores."""

    def compare(folder: Path) -> Comparison:
        from rechub_dist.inference.bundle.bundle import Bundle  # noqa: PLC0415
        from rechub_dist.inference.bundle.engines import PACKAGES  # noqa: PLC0415
        from rechub_dist.inference.bundle.manifest import read_manifest  # noqa: PLC0415
        from rechub_dist.inference.check import check_bundle, rows_to_check  # noqa: PLC0415
        from rechub_dist.inference.comparison import refuse  # noqa: PLC0415
        from rechub_dist.inference.deltas import stored_precision  # noqa: PLC0415
        from rechub_dist.inference.formats import formats_of  # noqa: PLC0415
        from rechub_dist.inference.from_checkpoint import open_run  # noqa: PLC0415

        manifest = read_manifest(folder)
        run = open_run(output_dir, overrides, allowed, manifest.step)
        data = limits.data or rows_to_check(run.config)
        for engine in PACKAGES:
            if engine in formats_of(manifest):
                found = check_bundle(run, Bundle(folder, engine=engine), data, limits.rows)
                refuse(found, stored_precision(manifest), limits.tolerance, limits.max_cost)
        return found

    return compare
