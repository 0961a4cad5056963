"""The command `rechub-dist simulate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from rechub_dist.cli.entry import Overrides
from rechub_dist.cli.importing import memory_bytes
from rechub_dist.distributed.process import quiet_libraries
from rechub_dist.errors import UserError

if TYPE_CHECKING:
    from rechub_dist.assembly.simulate import Hardware, Step

_BAR = 30  # characters of a step's parts
_LETTERS = {"dense": "d", "lookup": "l", "ids": "i", "vectors": "v", "gradients": "g", "fixed": "f"}
_RATES = "Hardware"


def simulate(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run file; its schema must be readable.")],
    ranks: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of GPUs.")] = "8,16,32,64,128,256,512,1024",
    local_world_size: Annotated[int, typer.Option(min=1, help="GPUs of a host.")] = 8,
    per_rank: Annotated[
        bool, typer.Option("--per-rank", help="data.batch_size is each rank's; default: of all ranks together.")
    ] = False,
    memory: Annotated[str, typer.Option(help="Memory of each GPU.", rich_help_panel=_RATES)] = "80GB",
    tflops: Annotated[float, typer.Option(min=0.01, help="Reached by products, 10^12/s.", rich_help_panel=_RATES)] = 25,
    memory_rate: Annotated[
        float, typer.Option(min=0.01, help="Of scattered rows, GB/s.", rich_help_panel=_RATES)
    ] = 1500,
    in_host: Annotated[float, typer.Option(min=0.01, help="From GPU to GPU, GB/s.", rich_help_panel=_RATES)] = 300,
    network: Annotated[
        float, typer.Option(min=0.01, help="Of a GPU between hosts, GB/s.", rich_help_panel=_RATES)
    ] = 35,
    latency: Annotated[float, typer.Option(min=0, help="Of a message, microseconds.", rich_help_panel=_RATES)] = 20,
    fixed: Annotated[float, typer.Option(min=0, help="Of every step, milliseconds.", rich_help_panel=_RATES)] = 3,
    overlap: Annotated[
        bool, typer.Option(help="Ids and gradients are exchanged while ranks compute.", rich_help_panel=_RATES)
    ] = True,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Say by a model, without that hardware, how a run would do on many GPUs, and which part bends the curve.

    Nothing is measured: bytes by the plan that a run would make, divided by the rates below. Give rates that you have
    measured; docs/slow.md says what is assumed.

    Example: rechub-dist simulate run.yaml --ranks 8,64,512 --per-rank
    """
    from rechub_dist.assembly.simulate import Hardware, as_tree  # noqa: PLC0415 - torch is slow to import
    from rechub_dist.assembly.simulate import simulate as modelled  # noqa: PLC0415
    from rechub_dist.data.run_file import load_run  # noqa: PLC0415
    from rechub_dist.embedding.planning import Cluster, memory_for_tables  # noqa: PLC0415

    counts = _counts(ranks)
    for count in counts:
        if count > local_world_size and count % local_world_size:
            raise UserError(
                f"--ranks {count}: is no multiple of the {local_world_size} GPUs of a host (--local-world-size)"
            )
    quiet_libraries()
    config, room = load_run(run_file, set_ or []), memory_for_tables(memory_bytes(memory))
    clusters = [
        Cluster(count, min(count, local_world_size), "cuda", room, host_memory=room, assumed=f"80% of {memory}")
        for count in counts
    ]
    hardware = Hardware(tflops, memory_rate, in_host, network, latency, fixed, overlap)
    steps = modelled(config, clusters, hardware, per_rank=per_rank)
    if as_json:
        print(json.dumps(as_tree(steps, hardware)))
    else:
        _show(Console(width=max(110, Console().width)), steps, hardware)


def _counts(text: str) -> list[int]:
    """The numbers of ranks that are asked for, ascending."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= 100_000 for part in parts):
        raise UserError(f"--ranks {text}: write numbers of GPUs such as 8,64,512")
    return sorted({int(part) for part in parts})


def _show(console: Console, steps: list[Step], hardware: Hardware) -> None:
    first = steps[0]
    table = Table(
        "GPUs", "rows each", *first.parts, "step", "samples/s", "efficiency",
        title="MODELLED, never measured: milliseconds of a step", box=None,
    )  # fmt: skip
    for step in steps:
        each = step.samples_per_second / step.ranks / (first.samples_per_second / first.ranks)
        table.add_row(
            f"{step.ranks:,}", f"{step.rows:,.0f}", *(f"{value:.2f}" for value in step.parts.values()),
            f"{step.total:.2f}", f"{step.samples_per_second:,.0f}", f"{each:.0%}",
        )  # fmt: skip
    console.print(table)
    print(f"what a step consists of, {', '.join(f'{letter} {name}' for name, letter in _LETTERS.items())}:")
    for step in steps:
        print(f"  {step.ranks:>6} {_bar(step)}")
    if len(steps) > 1:
        print(_bends(steps))
    print(
        f"assumed of a GPU: {hardware.tflops:g} TFLOPS, {hardware.memory:g} GB/s of memory, {hardware.in_host:g} GB/s "
        f"within a host, {hardware.network:g} GB/s between hosts, {hardware.latency:g} us a message, "
        f"{hardware.fixed:g} ms a step; {'' if hardware.overlap else 'nothing hidden behind computing, '}sequences at "
        "their longest, ids spread evenly"
    )


def _bar(step: Step) -> str:
    """The parts of a step, as letters in proportion."""
    return "".join(_LETTERS[name] * round(_BAR * value / step.total) for name, value in step.parts.items())


def _bends(steps: list[Step]) -> str:
    """Which part takes a larger share on the most ranks than on the fewest."""
    few, many = steps[0], steps[-1]
    growth = {name: many.parts[name] / many.total - few.parts[name] / few.total for name in few.parts}
    name = max(growth, key=lambda one: growth[one])
    return (
        f"what bends the curve: {name}, {few.parts[name] / few.total:.0%} of a step on {few.ranks:,} and "
        f"{many.parts[name] / many.total:.0%} on {many.ranks:,}"
    )
