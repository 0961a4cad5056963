"""The command `rechub-dist export`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from rechub_dist.cli.entry import AllowCode, Overrides
from rechub_dist.distributed.process import quiet_libraries
from rechub_dist.errors import UserError

OutputDir = Annotated[str, typer.Argument(metavar="OUTPUT_DIR", help="The run: its output or checkpoint folder.")]
Precision = Literal["fp32", "fp16", "int8"]
Check = Annotated[
    bool, typer.Option("--check/--no-check", help="Compare its scores with the run's before it becomes visible.")
]
CheckData = Annotated[
    str | None, typer.Option(help="Rows to compare on; default: the run's valid split, else its train split.")
]
Tolerance = Annotated[
    float | None, typer.Option(min=0, help="Largest difference allowed; default: 1e-5, for fp16 2e-3, for int8 3e-2.")
]


def export(
    output_dir: OutputDir,
    out: Annotated[Path, typer.Option(help="The bundle, or delta, to write; an earlier, unchanged one is replaced.")],
    tables: Annotated[
        Precision | None,
        typer.Option(help="How the numbers of tables are stored; int8: scaled by row. Default: fp32, or as before."),
    ] = None,
    since: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="BUNDLE", help="Write what has changed since a bundle; repeat for deltas that follow it already."
        ),
    ] = None,
    set_: Overrides = None,
    check: Check = True,
    check_data: CheckData = None,
    tolerance: Tolerance = None,
    allow_code: AllowCode = None,
) -> None:
    """Write a run's best weights as a bundle, which scores rows without torch, torchrec, fbgemm or ray.

    A bundle is a folder: the model as ONNX, memory-mapped tables, and the schema with its vocabularies. In Python,
    rechub_dist.Bundle(folder).score(rows) scores rows as their caller has them. With --since it is a delta: the rows
    and files that differ.

    Example: rechub-dist export runs/deepfm --out bundles/deepfm --tables fp16
    """
    from rechub_dist.inference.bundle.deltas import read_state  # noqa: PLC0415
    from rechub_dist.inference.deltas import precision_of  # noqa: PLC0415
    from rechub_dist.inference.export import export_bundle, export_delta  # noqa: PLC0415 - torch is slow to import

    quiet_libraries()
    overrides, allowed = set_ or [], allow_code or []
    compare = _comparison(output_dir, overrides, check_data, tolerance) if check else None
    before = read_state(since[0], since[1:]) if since else None
    with _progress() as progress:
        if before is None:
            made = export_bundle(
                output_dir, out, tables=tables or "fp32", overrides=overrides, allowed_code=allowed, check=compare,
                progress=progress,
            )  # fmt: skip
        else:
            delta = export_delta(
                output_dir, out, before, tables=tables, overrides=overrides, allowed_code=allowed, check=compare,
                progress=progress,
            )  # fmt: skip
            made = delta.result
    whole = sum(file.size for file in made.files.values())
    print(f"{out}: {made.model}, step {made.step}, ", end="")
    if before is None:
        print(f"{whole / 1e6:,.1f} MB, tables in {precision_of(made)}")
    else:
        size = sum(file.size for file in delta.files.values())
        print(f"follows version {before.manifest.label}, {size / 1e6:,.1f} MB, in full {whole / 1e6:,.1f} MB")
        for name, table in made.tables.items():
            print(f"{name}: {delta.rows.get(name, 0):,} of {table.rows:,} rows have changed")
    if made.checked:
        apart = ", ".join(f"{name} {value:.2g}" for name, value in made.checked.items() if name != "rows")
        print(f"largest differences from the run's own on {made.checked['rows']:,.0f} rows: {apart}")
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
    tolerance: Tolerance = None,
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
    compare = _comparison(output_dir, set_ or [], check_data, tolerance) if check else None
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


def _comparison(
    output_dir: str, overrides: list[str], check_data: str | None, tolerance: float | None
) -> Callable[[Path], dict[str, float]]:
    """What compares a bundle with the run's own scores."""

    def compare(folder: Path) -> dict[str, float]:
        from rechub_dist.inference.bundle.bundle import Bundle  # noqa: PLC0415
        from rechub_dist.inference.check import TOLERANCES, check_bundle, rows_to_check  # noqa: PLC0415
        from rechub_dist.inference.deltas import precision_of  # noqa: PLC0415
        from rechub_dist.inference.run import load  # noqa: PLC0415

        bundle = Bundle(folder)
        run = load(output_dir, settings=overrides, step=bundle.manifest.step)
        found = check_bundle(run, bundle, check_data or rows_to_check(run.config))
        most = TOLERANCES[precision_of(bundle.manifest)] if tolerance is None else tolerance
        for name, apart in found.items():
            if name != "rows" and not apart <= most:
                raise UserError(
                    f"the bundle's {name} differ by up to {apart:.2g} from the run's, and {most:.2g} is allowed: there "
                    "is no bundle; --tolerance allows more"
                )
        return found

    return compare
