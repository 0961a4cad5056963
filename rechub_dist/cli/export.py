"""The command `rechub-dist export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from rechub_dist.cli.entry import AllowCode, Overrides
from rechub_dist.distributed.process import quiet_libraries
from rechub_dist.errors import UserError


def export(
    output_dir: Annotated[str, typer.Argument(metavar="OUTPUT_DIR", help="The run: its output or checkpoint folder.")],
    out: Annotated[Path, typer.Option(help="The bundle to write; an earlier, unchanged one is replaced.")],
    tables: Annotated[
        Literal["fp32", "fp16", "int8", "int4"],
        typer.Option(help="How the numbers of tables are stored; int8, int4: in steps, scaled by row."),
    ] = "fp32",
    set_: Overrides = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare its scores with the run's before it becomes visible.")
    ] = True,
    check_data: Annotated[
        str | None, typer.Option(help="Rows to compare on; default: the run's valid split, else its train split.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Largest difference allowed; default: 1e-5, for fp16 2e-3, for int8 3e-2."),
    ] = None,
    allow_code: AllowCode = None,
) -> None:
    """Write a run's best weights as a bundle, which scores rows without torch, torchrec, fbgemm or ray.

    A bundle is a folder: the model as ONNX, memory-mapped tables, and the schema with its vocabularies. In Python,
    rechub_dist.Bundle(folder).score(rows) scores rows as their caller has them.

    Example: rechub-dist export runs/deepfm --out bundles/deepfm --tables fp16
    """
    from rechub_dist.inference.export import export_bundle  # noqa: PLC0415 - torch is slow to import

    quiet_libraries()
    overrides = set_ or []

    def compare(folder: Path) -> dict[str, float]:
        from rechub_dist.inference.bundle.bundle import Bundle  # noqa: PLC0415
        from rechub_dist.inference.check import TOLERANCES, check_bundle, rows_to_check  # noqa: PLC0415
        from rechub_dist.inference.run import load  # noqa: PLC0415

        run = load(output_dir, settings=overrides)
        found = check_bundle(run, Bundle(folder), check_data or rows_to_check(run.config))
        most = TOLERANCES[tables] if tolerance is None else tolerance
        for name, apart in found.items():
            if name != "rows" and not apart <= most:
                raise UserError(
                    f"the bundle's {name} differ by up to {apart:.2g} from the run's, and {most:.2g} is allowed: there "
                    "is no bundle; --tolerance allows more"
                )
        return found

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("look at the run", total=None)
        made = export_bundle(
            output_dir, out, tables=tables, overrides=overrides, allowed_code=allow_code or [],
            check=compare if check else None,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None),
        )  # fmt: skip
    size = sum(file.size for file in made.files.values())
    print(f"{out}: {made.model}, step {made.step}, {size / 1e6:,.1f} MB, tables in {tables}")
    if made.checked:
        apart = ", ".join(f"{name} {value:.2g}" for name, value in made.checked.items() if name != "rows")
        print(f"largest differences from the run's own on {made.checked['rows']:,.0f} rows: {apart}")
    else:
        print("not compared with the run", file=sys.stderr)
