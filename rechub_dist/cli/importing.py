"""The command `rechub-dist data import`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rechub_dist.errors import UserError, shown

if TYPE_CHECKING:
    from rechub_dist.data.importing.run import Imported

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def import_tables(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE...", help="Files, folders or patterns of the log: CSV, TSV, JSON lines, Parquet."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write: train/, valid/, test/ and dataset.yaml.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="The plan file: what the columns are, and what becomes of them.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a key of the plan, such as split.test_from=2024-05-01; repeatable.",
        ),
    ] = None,
    guess: Annotated[
        bool, typer.Option("--guess", help="Print a plan for these files, to edit; with --plan, write it there.")
    ] = False,
    table: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="With --guess: a table to join, such as users=users.csv; repeatable."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B,...", help="With --guess: names for files without a header; the log's, then each table's."
        ),
    ] = None,
    user: Annotated[str | None, typer.Option(help="With --guess: the column of users.")] = None,
    item: Annotated[str | None, typer.Option(help="With --guess: the column of items.")] = None,
    time: Annotated[str | None, typer.Option(help="With --guess: the column of times.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="With --guess: a label, a column or an expression such as 'rating >= 4'.")
    ] = None,
    grow: Annotated[
        Path | None, typer.Option(help="An earlier import: its values keep their ids, new ones get ids after them.")
    ] = None,
    leaks: Annotated[
        bool, typer.Option("--leaks/--no-leaks", help="Look for what a model must not know, in the result.")
    ] = True,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory for the database, such as 4GB; default: half of the machine's. More data goes to disk."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the number of cores.")] = None,
) -> None:
    """Make a data set of your own tables: typed, joined, split, with vocabularies and histories.

    First let it guess a plan, and look through it; then import by the plan.

    Examples:

    rechub-dist data import ratings.csv --table movies=movies.csv --guess --plan plan.yaml

    rechub-dist data import ratings.csv --plan plan.yaml --out data/ratings
    """
    from rechub_dist.data.importing.guess import guess_plan  # noqa: PLC0415 - DuckDB and pyarrow are slow to import
    from rechub_dist.data.importing.plan import Plan, read_plan  # noqa: PLC0415
    from rechub_dist.data.importing.run import earlier_facts, import_data  # noqa: PLC0415
    from rechub_dist.distributed.host import host_memory  # noqa: PLC0415

    bytes_ = host_memory() // 2 if memory is None else memory_bytes(memory)
    if guess:
        if out is not None:
            raise typer.BadParameter(
                "--guess writes a plan, not data: leave --out out, edit the plan, then import by it"
            )
        if not sources:
            raise typer.BadParameter("--guess needs a SOURCE to look at")
        text = guess_plan(
            sources, named_tables(table), user=user, item=item, time=time, labels=label or (),
            names=[one.split(",") for one in columns or ()], memory=bytes_, threads=threads,
        )  # fmt: skip
        if plan is None:
            print(text, end="")
            return
        if plan.exists():
            raise UserError(f"--plan: {plan} exists, and is not replaced; name another file")
        plan.write_text(text, encoding="utf-8")
        print(f"{plan}: look through it, then: rechub-dist data import --plan {plan} --out FOLDER")
        return
    if table or columns or user or item or time or label:
        raise typer.BadParameter(
            "--table, --columns, --user, --item, --time and --label are for --guess; write them into the plan"
        )
    if plan is None or out is None:
        raise typer.BadParameter("give --plan and --out; --guess writes a plan to begin with")
    read: Plan = read_plan(plan, set_ or [])
    if sources:
        read = read.model_copy(update={"log": read.log.model_copy(update={"path": tuple(sources)})})
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("look at the files", total=None)
        found = import_data(
            read, out, memory=bytes_, threads=threads, grow=grow,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None),
        )  # fmt: skip
    report(out, found, {} if grow is None else earlier_facts(grow))
    if leaks:
        from rechub_dist.data.tools.leaks import check_leaks  # noqa: PLC0415

        with Console(stderr=True).status("looking for leaks"):
            checked = check_leaks(str(out), time=read.time, labels=tuple(read.labels))
        for finding in checked.findings:
            print(f"leak? {finding.text}")
        clean = len(checked.clean)
        print(f"leaks: {clean} checks found nothing; all of them: rechub-dist data inspect {out} --leaks")


def report(out: Path, found: Imported, before: dict[str, Any]) -> None:
    """Print what was imported; beside it, what the earlier import had: how labels and unknown values drift."""
    console = Console()
    shown_ = Table(str(out), *found.rows)
    shown_.add_row("rows", *(f"{rows:,}" for rows in found.rows.values()))
    for name in found.plan.labels:
        of_splits = [found.labels.get(split, {}).get(name) for split in found.rows]
        shown_.add_row(f"mean of {name}", *("" if mean is None else f"{mean:.4f}" for mean in of_splits))
    console.print(shown_)
    sizes = ", ".join(f"{name} {size:,}" for name, size in found.vocabularies.items())
    for line in (
        f"{found.read:,} rows of the log"
        + (f", {found.unused:,} of them only in histories" if found.unused else "")
        + (f"; {found.drawn:,} negatives drawn" if found.drawn else ""),
        f"values with an id of their own, from train: {sizes}" if sizes else "",
        f"{out}/dataset.yaml: schema",
    ):
        if line:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    for split, shares in found.unknown.items():
        parts = []
        for column, share in shares.items():
            earlier = before.get("unknown", {}).get(split, {}).get(column)
            if share > 0 or earlier:
                parts.append(f"{column} {share:.2%}" + ("" if earlier is None else f" (before: {earlier:.2%})"))
        if parts:
            text = f"{split}: missing or unknown: {', '.join(parts)}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
    for split, means in found.labels.items():
        for label, mean in means.items():
            if (earlier := before.get("labels", {}).get(split, {}).get(label)) is not None and mean is not None:
                text = f"{split}: mean of {label} {mean:.4f} (before: {earlier:.4f})"
                console.print(text, highlight=False, markup=False, soft_wrap=True)


def named_tables(given: list[str] | None) -> dict[str, str]:
    """The tables of `--table NAME=PATH`, by name."""
    found = {}
    for text in given or ():
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise typer.BadParameter(f"--table is {shown(text)}; write NAME=PATH, such as users=users.csv")
        found[name] = path
    return found


def memory_bytes(text: str) -> int:
    """The bytes that a text such as 4GB means. Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise UserError(f"--memory is {shown(text)}; write bytes such as 4GB or 512MB")
    return int(float(found[1]) * _UNITS[found[2].upper()])
