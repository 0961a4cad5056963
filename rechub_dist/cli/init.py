"""The command `rechub-dist init`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rechub_dist.cli.importing import named_tables
from rechub_dist.errors import UserError


def init(
    log: Annotated[list[str], typer.Argument(metavar="LOG...", help="Your log: CSV, TSV, JSON lines or Parquet.")],
    folder: Annotated[Path, typer.Option("--dir", help="Folder for the two files; new, or without them.")] = Path("."),
    table: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A table to join, such as users=users.csv; repeatable."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B,...", help="Names for files without a header; the log's, then each table's."),
    ] = None,
    user: Annotated[str | None, typer.Option(help="Column of users; '' for none.")] = None,
    item: Annotated[str | None, typer.Option(help="Column of items; '' for none.")] = None,
    time: Annotated[str | None, typer.Option(help="Column of times; '' for none.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Label: a column or an expression; repeatable.")] = None,
    model: Annotated[str | None, typer.Option(help="Model; default: DIN with histories, else DeepFM.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; take what is guessed.")] = False,
) -> None:
    """Write plan.yaml and run.yaml for your own data: what to import, and what to train on it.

    In a terminal it asks what it cannot be sure of, with its guess as the default; flags answer beforehand.

    Example: rechub-dist init ratings.csv --table movies=movies.csv --dir mine
    """
    from rechub_dist.assembly.first_run import first_run, suggested_model  # noqa: PLC0415 - slow to import
    from rechub_dist.config import parse_yaml  # noqa: PLC0415
    from rechub_dist.data.importing.guess import guess_plan  # noqa: PLC0415
    from rechub_dist.data.importing.plan import plan_of  # noqa: PLC0415
    from rechub_dist.distributed.host import host_memory  # noqa: PLC0415

    files = {name: folder / name for name in ("plan.yaml", "run.yaml")}
    for path in files.values():
        if path.exists():
            raise UserError(f"{path} exists, and is not replaced; choose another --dir, or remove it")
    answers: dict[str, Any] = {"user": user, "item": item, "time": time, "labels": label or []}
    names = [one.split(",") for one in columns or ()]

    def guess() -> str:
        with Console(stderr=True).status("looking at the files"):
            return guess_plan(log, named_tables(table), names=names, memory=host_memory() // 2, **answers)

    text = guess()
    plan = plan_of(parse_yaml(text, "the guessed plan"))
    if not yes and sys.stdin.isatty():
        for key in ("user", "item", "time"):
            if answers[key] is None:
                known = getattr(plan, key) or "none"
                answer = typer.prompt(f"column of {key}s (none if there is none)", default=known)
                answers[key] = "" if answer == "none" else answer
        if not answers["labels"]:
            found = ", ".join(plan.labels) or "none"
            answer = typer.prompt("label: a column, or an expression such as rating >= 4", default=found)
            answers["labels"] = [] if answer in (found, "none") else [answer]
        text = guess()
        plan = plan_of(parse_yaml(text, "the guessed plan"))
        model = model or typer.prompt("model (rechub-dist models lists them)", default=suggested_model(plan))
    data = str(folder / "data")
    run = first_run(plan, model or suggested_model(plan), data, str(folder / "out")) if plan.labels else None
    if run is None and model is not None:
        run = first_run(plan, model, data, str(folder / "out"))
    folder.mkdir(parents=True, exist_ok=True)
    files["plan.yaml"].write_text(text, encoding="utf-8")
    print(f"{files['plan.yaml']}: what becomes of your columns; look through it: what may a model know beforehand?")
    if run is None:
        print(
            "no column looks like a label, so there is no run file yet: give --label, or --model for one without labels"
        )
    else:
        files["run.yaml"].write_text(run, encoding="utf-8")
        print(f"{files['run.yaml']}: what is trained on it")
    print(f"then: rechub-dist data import --plan {files['plan.yaml']} --out {data}")
    print(f"      rechub-dist data inspect {data}")
    if run is not None:
        print(f"      rechub-dist train {files['run.yaml']}")
