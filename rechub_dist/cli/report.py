"""The command `rechub-dist report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rechub_dist.cli.entry import AllowCode
from rechub_dist.distributed.process import quiet_libraries
from rechub_dist.errors import UserError, one_line


def report(
    output_dirs: Annotated[
        list[Path], typer.Argument(metavar="OUTPUT_DIR...", help="Output folders of runs; several are compared.")
    ],
    out: Annotated[Path | None, typer.Option(help="The page; default: report.html in the first output folder.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows whose scores are shown; default: each run's valid split.")
    ] = None,
    scores: Annotated[bool, typer.Option(help="Score rows: calibration and histograms of scores by class.")] = True,
    allow_code: AllowCode = None,
) -> None:
    """Write one HTML page about a run, or several: metrics, curves, calibration, scores, norms, speed, configuration.

    Example: rechub-dist report runs/deepfm runs/dcnv2 --out compared.html
    """
    from rechub_dist.inference.report import read_run  # noqa: PLC0415 - torch is slow to import
    from rechub_dist.inference.report_page import MOST_RUNS, check_report, write_report  # noqa: PLC0415

    if len(output_dirs) > MOST_RUNS:
        raise UserError(f"{len(output_dirs)} runs: a page compares at most {MOST_RUNS}; leave some out")
    if data is not None and not scores:
        raise UserError("--data: is what is scored, and --no-scores scores nothing; leave one out")
    out = out or output_dirs[0] / "report.html"
    quiet_libraries()
    found = [read_run(folder, scores=scores, data=data, allowed_code=allow_code or []) for folder in output_dirs]
    check_report(out)
    write_report(out, found)
    for run in found:
        for note in run.notes:
            typer.echo(f"{run.folder}: {one_line(note)}", err=True)
    print(f"{out}: {', '.join(str(run.folder) for run in found)}")
