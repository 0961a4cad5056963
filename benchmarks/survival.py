"""Fault injection with real signals, cables and disks: `python benchmarks/survival.py [NAME]...`, about half an hour.

Each fault is injected into a run of its own. The rows that the final weights were trained on, and the last step's loss,
are compared with a run without faults. Faults of hosts need root and iproute2, as they run in network namespaces.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from faults.account import Account, account, losses
from faults.hosts import Command, possible
from faults.of_hosts import OF_HOSTS
from faults.of_processes import OF_PROCESSES, not_finite
from faults.scene import Scene, Times

FAULTS = {fault.__name__: fault for fault in (*OF_PROCESSES, *OF_HOSTS)}


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Faults; default: all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random steps.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table there, too.")] = None,
) -> None:
    """Inject faults into runs, and compare the results; the exit code is 1 if any fault changed them."""
    seed = random.randrange(10**6) if seed is None else seed
    print(f"seed {seed}")
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data, spoilt = _data(folder / "data"), folder / "spoilt"
        shutil.copytree(data, spoilt)
        _spoil(spoilt)
        wanted: dict[Path, tuple[Account, float]] = {}
        for name in names or FAULTS:
            if FAULTS[name] in OF_HOSTS and not possible():
                rows.append((_what(name), "left out: needs root and iproute2", "", "", "", "", "", ""))
                continue
            own = spoilt if FAULTS[name] is not_finite else data
            if own not in wanted:
                wanted[own] = _undisturbed(folder / f"undisturbed-{own.name}", own, batch_norm=own == spoilt)
            scene = Scene(folder / name, own, random.Random(f"{seed} {name}"), batch_norm=own == spoilt)
            try:
                times = FAULTS[name](scene)
            except (RuntimeError, AssertionError) as error:
                rows.append((_what(name), "FAILED", "", "", "", "", "", ""))
                print(f"{name}: {error}", flush=True)
                continue
            finally:
                scene.close()
            rows.append(_row(name, times, scene.output, *wanted[own]))
            print(" | ".join(str(part) for part in rows[-1]), flush=True)
            shutil.rmtree(scene.folder)
    _show(rows, markdown)
    if any("FAILED" in row or "DIFFERS" in row[-1] or {*row[4:7]} - {"0", ""} for row in rows):
        raise typer.Exit(1)


def _what(name: str) -> str:
    return FAULTS[name].__doc__ or name


def _row(name: str, times: Times, output: Path, wanted: Account, loss: float) -> tuple[str, ...]:
    found = account(output)
    lost, doubled, other = found.compare(wanted)
    difference = abs(losses(output)[max(wanted.batches)] - loss)
    equal = difference <= (1e-4 if times.resized else 1e-6) and len(found.batches) == len(wanted.batches)
    return (
        _what(name),
        "" if times.told is None else f"{times.told:.1f} s",
        "not interrupted" if times.resumed is None else f"{times.resumed:.1f} s",
        str(found.repeated),
        str(lost),
        str(doubled),
        str(other),
        f"{difference:.1e}{'' if equal else ' DIFFERS'}",
    )


def _data(folder: Path) -> Path:
    command = ["data", "synthesize", "--out", str(folder), "--rows", "128000", "--dense", "4", "--sparse", "8"]
    done = Command([sys.executable, "-m", "rechub_dist", *command, "--vocabulary", "1000"])
    if done.wait() != 0:
        raise RuntimeError(done.text)
    return folder


def _spoil(data: Path) -> None:
    """One dense value whose batch has no variance that a float holds, so that batch normalisation makes it NaN."""
    path = sorted((data / "train").glob("*.parquet"))[0]
    group = pq.ParquetFile(path).metadata.row_group(0).num_rows
    table = pq.read_table(path)
    values = table["dense_0"].to_numpy().copy()
    values[len(values) // 2] = np.float32(3e38)
    table = table.set_column(table.column_names.index("dense_0"), "dense_0", [values])
    pq.write_table(table, path, row_group_size=group)


def _undisturbed(folder: Path, data: Path, *, batch_norm: bool) -> tuple[Account, float]:
    """What a run without faults is trained on, and its last loss."""
    scene = Scene(folder, data, random.Random(0), batch_norm=batch_norm)
    scene.finish(scene.start("--set", "train.on_non_finite=skip"))
    found = account(scene.output)
    return found, losses(scene.output)[max(found.batches)]


def _show(rows: list[tuple[str, ...]], markdown: Path | None) -> None:
    titles = (
        "fault",
        "reported after",
        "resumed after",
        "steps repeated",
        "rows lost",
        "rows duplicated",
        "other batches",
        "difference of the last loss",
    )
    table = Table(*titles)
    for row in rows:
        table.add_row(*row)
    Console(width=180).print(table)
    if markdown is not None:
        lines = [titles, ("---",) * len(titles), *rows]
        markdown.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


if __name__ == "__main__":
    typer.run(main)
