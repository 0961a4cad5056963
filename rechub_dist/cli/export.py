"""The command `rechub-dist export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from rechub_dist.cli.entry import AllowCode, Overrides
from rechub_dist.distributed.process import quiet_libraries

if TYPE_CHECKING:
    from rechub_dist.inference.comparison import Comparison


def export(
    output_dir: Annotated[str, typer.Argument(metavar="OUTPUT_DIR", help="The run: its output or checkpoint folder.")],
    out: Annotated[Path, typer.Option(help="The bundle to write; an earlier, unchanged one is replaced.")],
    tables: Annotated[
        Literal["fp32", "fp16", "int8", "int4"],
        typer.Option(help="How the numbers of tables are stored; int8, int4: in steps, scaled by row."),
    ] = "fp32",
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAMES",
            help="Of onnx, torch, whole, triton, separated by commas: for what it is written (docs/export.md).",
        ),
    ] = "onnx",
    whole_mb: Annotated[int, typer.Option(min=1, help="Most that one file of --format whole may have.")] = 256,
    set_: Overrides = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare its scores with the run's before it becomes visible.")
    ] = True,
    check_data: Annotated[
        str | None, typer.Option(help="Rows to compare on; default: the run's valid split, else its train split.")
    ] = None,
    check_rows: Annotated[int, typer.Option(min=1, help="Rows to compare, at most.")] = 10_000,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Largest difference allowed; default: 1e-5, fp16 2e-3, int8 3e-2, int4 0.3."),
    ] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(min=0, help="What the first metric (AUC, say) may lose on the compared rows; default: anything."),
    ] = None,
    allow_code: AllowCode = None,
) -> None:
    """Write a run's best weights as a bundle, which scores rows without torch, torchrec, fbgemm or ray.

    A bundle is a folder: the model as ONNX, memory-mapped tables, and the schema with its vocabularies. In Python,
    rechub_dist.Bundle(folder).score(rows) scores rows as their caller has them. With --format torch it has programs of
    torch.export, with whole also the model and its tables in one ONNX file, with triton a repository for that server.

    Example: rechub-dist export runs/deepfm --out bundles/deepfm --tables fp16
    """
    from rechub_dist.inference.formats import parse_formats  # noqa: PLC0415

    formats = parse_formats(format_)
    from rechub_dist.inference.export import export_bundle  # noqa: PLC0415 - torch is slow to import
    from rechub_dist.inference.whole import Whole  # noqa: PLC0415

    quiet_libraries()
    overrides = set_ or []

    def compare(folder: Path) -> Comparison:
        from rechub_dist.inference.bundle.bundle import Bundle  # noqa: PLC0415
        from rechub_dist.inference.bundle.engines import PACKAGES  # noqa: PLC0415
        from rechub_dist.inference.check import check_bundle, rows_to_check  # noqa: PLC0415
        from rechub_dist.inference.comparison import refuse  # noqa: PLC0415
        from rechub_dist.inference.from_checkpoint import open_run  # noqa: PLC0415

        run = open_run(output_dir, overrides, allow_code or [])
        data = check_data or rows_to_check(run.config)
        for engine in PACKAGES:
            if engine in formats:
                found = check_bundle(run, Bundle(folder, engine=engine), data, check_rows)
                refuse(found, tables, tolerance, max_cost)
        return found

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("look at the run", total=None)
        made = export_bundle(
            output_dir, out, tables=tables, formats=formats, whole=Whole(whole_mb * 10**6, check_data),
            overrides=overrides, allowed_code=allow_code or [],
            check=compare if check else None,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None),
        )  # fmt: skip
    size = sum(file.size for file in made.files.values())
    told = "" if formats == ("onnx",) else f", for {', '.join(formats)}"
    print(f"{out}: {made.model}, step {made.step}, {size / 1e6:,.1f} MB, tables in {tables}{told}")
    if made.checked:
        rows = f"{made.checked['rows']:,.0f} rows"
        apart = ", ".join(f"{name} {value:.2g}" for name, value in made.checked.items() if name != "rows")
        print(f"largest differences from the run's own on {rows}: {apart}")
        for name, (run, bundle) in made.compared.items():
            print(f"{name} on them: run {run:.5f}, bundle {bundle:.5f}, difference {bundle - run:+.5f}")
    else:
        print("not compared with the run", file=sys.stderr)
