"""Faults, for real, and what a run makes of them: `python benchmarks/survival.py [NAME]...`, about twenty minutes.

Each fault befalls a run of its own. What the weights in the end are made of is compared with a run without faults, row
by row and by the last step's loss. Faults of hosts need root and iproute2, as they run in network namespaces.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.parquet as pq
import typer
from faults.account import Account, account, losses
from faults.hosts import Command, Hosts, possible
from faults.scene import RESUMED, TOLD, Scene, Times
from rich.console import Console
from rich.table import Table

from rechub_dist.checkpoint import saved_steps


def no_fault(scene: Scene) -> Times:
    """None, but on one rank: what rounding alone makes of the losses where the number of ranks is another one."""
    run = scene.start("--nproc", "1")
    scene.finish(run)
    return Times(0.0, 0.0, True)


def five_kills(scene: Scene) -> Times:
    """SIGKILL of a worker, five times in one run, at random steps."""
    run = scene.start("--max-restarts", "5")
    steps = sorted(scene.dice.sample(range(40, 700), 5))
    times = []
    for step in steps:
        scene.reach(step, run)
        at = time.monotonic()
        os.kill(run.workers()[scene.dice.randrange(2)], signal.SIGKILL)
        times.append(Times(run.wait_for(TOLD, at) - at, run.wait_for(RESUMED, at) - at))
    scene.finish(run)
    return Times(max(t.detected for t in times), max(t.resumed for t in times))


def agent_killed(scene: Scene) -> Times:
    """SIGKILL of the agent; the script starts it again."""
    run = scene.start("--outer-restarts", "1")
    scene.reach(110, run)
    at = time.monotonic()
    os.kill(run.agent(), signal.SIGKILL)
    return scene.goes_on(run, at)


def all_killed(scene: Scene) -> Times:
    """SIGKILL of everything; the command is given again."""
    run = scene.start()
    scene.reach(110, run)
    at = time.monotonic()
    run.kill()
    return scene.again(run, at)


def worker_stopped(scene: Scene, rank: int = 1) -> Times:
    """A worker hangs: SIGSTOP."""
    run = scene.start()
    scene.reach(110, run)
    at = time.monotonic()
    os.kill(run.workers()[rank], signal.SIGSTOP)
    return scene.goes_on(run, at)


def main_worker_stopped(scene: Scene) -> Times:
    """The main rank hangs, which keeps the ranks' store."""
    return worker_stopped(scene, 0)


def sigterm(scene: Scene) -> Times:
    """SIGTERM while training."""
    run = scene.start()
    scene.reach(110, run)
    at = time.monotonic()
    run.signal(signal.SIGTERM)
    return scene.again(run, at)


def sigterm_while_saving(scene: Scene) -> Times:
    """SIGTERM while a checkpoint is written."""
    run = scene.start()
    scene.reach(110, run)
    while not list((scene.output / "checkpoints").glob(".step-*.partial")):
        pass
    at = time.monotonic()
    run.signal(signal.SIGTERM)
    return scene.again(run, at)


def sigterm_while_evaluating(scene: Scene) -> Times:
    """SIGTERM during an evaluation."""
    run = scene.start("--set", "data.eval_batch_size=8")
    at = run.wait_for("^epoch 0: ")
    run.signal(signal.SIGTERM)
    return scene.again(run, at)


def checkpoint_corrupted(scene: Scene) -> Times:
    """Everything is killed, and the newest checkpoint is half its size."""
    run = scene.start()
    scene.reach(110, run)
    run.kill()
    run.wait()
    folder = scene.output / "checkpoints"
    data = next((folder / f"step-{saved_steps(folder)[-1]:010d}").glob("*.distcp"))
    os.truncate(data, data.stat().st_size // 2)
    at = time.monotonic()
    again = scene.start()
    return scene.goes_on(again, at)


def disk_full(scene: Scene) -> Times:
    """The disk is full when a checkpoint is saved; room is made, and the command given again."""
    scene.output.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(scene.output)], check=True)
    try:
        run = scene.start()
        scene.reach(60, run)
        filler = scene.output / "filler"
        free = shutil.disk_usage(scene.output).free
        at = time.monotonic()
        filler.write_bytes(bytes(free - (5 << 20)))  # what is left is enough for the logs
        if run.wait() != 2:
            raise RuntimeError(run.text)
        filler.unlink()
        times = scene.again(run, at)
        shutil.copytree(scene.output, scene.folder / "copy")
    finally:
        subprocess.run(["umount", "--lazy", str(scene.output)], check=True)
    scene.output = scene.folder / "copy"
    return times


def not_finite(scene: Scene) -> Times:
    """A row that makes the loss infinite: the run ends, and is told to leave such steps out."""
    run = scene.start()
    if run.wait() != 2:
        raise RuntimeError(run.text)
    at = run.wait_for("error:") - 0.001
    return scene.again(run, at, "--set", "train.on_non_finite=skip")


def host_killed(scene: Scene) -> Times:
    """One of two hosts loses power."""
    run = _two_hosts(scene)
    at = time.monotonic()
    scene.hosts.kill(1)  # type: ignore[union-attr]
    return scene.goes_on(run, at, resized=True)


def link_cut(scene: Scene) -> Times:
    """The cable of one of two hosts is pulled."""
    run = _two_hosts(scene)
    at = time.monotonic()
    scene.hosts.cut(1)  # type: ignore[union-attr]
    return scene.goes_on(run, at, resized=True)


def link_cut_for_a_while(scene: Scene) -> Times:
    """The cable of one of two hosts that must both be there is pulled, and put in again after 20 s."""
    hosts = scene.hosts = Hosts(2)
    run, other = (scene.start_on(host, "2", "--outer-restarts", "9", "--max-restarts", "9") for host in (0, 1))
    scene.reach(110, run)
    at = time.monotonic()
    hosts.cut(1)
    time.sleep(20)
    hosts.heal(1)
    times = scene.goes_on(run, at)
    scene.finish(other)
    return times


def host_gone_and_back(scene: Scene) -> Times:
    """Two hosts, one of which is killed and comes back: 2, 1, 2."""
    run = _two_hosts(scene)
    at = time.monotonic()
    scene.hosts.kill(1)  # type: ignore[union-attr]
    run.wait_for(r"1 rank\(s\).*resumed", at)
    first = run.saw(RESUMED, at)
    assert first is not None
    scene.hosts.heal(1)  # type: ignore[union-attr]
    scene.start_on(1, "1:2")
    run.wait_for(r"2 rank\(s\).*resumed", at)
    times = scene.goes_on(run, at, resized=True)
    return times._replace(resumed=first - at)


def host_preempted(scene: Scene) -> Times:
    """SIGTERM on one of two hosts: the other goes on alone."""
    hosts = scene.hosts = Hosts(2)
    run, other = (scene.start_on(host, "1:2") for host in (0, 1))
    scene.reach(110, run)
    at = time.monotonic()
    other.signal(signal.SIGTERM)
    times = scene.goes_on(run, at, resized=True)
    scene.finish(other)
    assert hosts.count == 2
    return times


def meeting_host_killed(scene: Scene) -> Times:
    """The host that all meet at loses power, and is started anew after 5 s."""
    hosts = scene.hosts = Hosts(2)
    run, other = (scene.start_on(host, "2", "--outer-restarts", "9") for host in (0, 1))
    scene.reach(110, run)
    at = time.monotonic()
    hosts.kill(0)
    time.sleep(5)
    hosts.heal(0)
    again = scene.start_on(0, "2", "--outer-restarts", "9")
    told, resumed = other.wait_for(TOLD, at), again.wait_for(RESUMED, at)
    scene.finish(again)
    scene.finish(other)
    return Times(told - at, resumed - at)


def first_host_killed(scene: Scene) -> Times:
    """The first host loses power for good; the hosts meet at a store of its own on a third one."""
    hosts = scene.hosts = Hosts(3)
    store = hosts.run(2, [sys.executable, "-m", "rechub_dist", "store", "--port", "29400"])
    store.wait_for("listening")
    meet = ("--rdzv", f"{hosts.address(2)}:29400", "--rdzv-external")
    run, other = (scene.start_on(host, "1:2", *meet) for host in (0, 1))
    scene.reach(110, run)
    at = time.monotonic()
    hosts.kill(0)
    return scene.goes_on(other, at, resized=True)


def _two_hosts(scene: Scene) -> Command:
    """Two hosts of one to two, at step 110; the first's command."""
    scene.hosts = Hosts(2)
    run, _ = (scene.start_on(host, "1:2") for host in (0, 1))
    run.wait_for(r"2 rank\(s\)")
    scene.reach(110, run)
    return run


FAULTS: dict[str, Callable[[Scene], Times]] = {
    f.__name__: f
    for f in (
        no_fault,
        not_finite,
        five_kills,
        agent_killed,
        all_killed,
        worker_stopped,
        main_worker_stopped,
        sigterm,
        sigterm_while_saving,
        sigterm_while_evaluating,
        checkpoint_corrupted,
        disk_full,
        host_killed,
        link_cut,
        link_cut_for_a_while,
        host_gone_and_back,
        host_preempted,
        meeting_host_killed,
        first_host_killed,
    )
}
OF_HOSTS = ("host", "link")


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Faults; default: all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random steps.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table there, too.")] = None,
) -> None:
    """Let faults befall runs, and compare what comes out; the exit code is 1 if any has left a trace."""
    seed = random.randrange(10**6) if seed is None else seed
    print(f"seed {seed}")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data, spoilt = _data(folder / "data"), folder / "spoilt"
        shutil.copytree(data, spoilt)
        _spoil(spoilt)
        wanted: dict[Path, tuple[Account, float]] = {}
        for name in names or FAULTS:
            if any(word in name for word in OF_HOSTS) and not possible():
                rows.append((FAULTS[name].__doc__, "left out: needs root and iproute2", "", "", "", "", "", ""))
                continue
            own = spoilt if name == "not_finite" else data
            if own not in wanted:
                wanted[own] = _undisturbed(folder / f"undisturbed-{own.name}", own, batch_norm=own == spoilt)
            scene = Scene(folder / name, own, random.Random(f"{seed} {name}"), batch_norm=own == spoilt)
            try:
                times = FAULTS[name](scene)
            except (RuntimeError, AssertionError) as error:
                rows.append((FAULTS[name].__doc__, "FAILED", "", "", "", "", "", ""))
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


def _row(name: str, times: Times, output: Path, wanted: Account, loss: float) -> tuple[str, ...]:
    found = account(output)
    lost, doubled, other = found.compare(wanted)
    difference = abs(losses(output)[max(wanted.batches)] - loss)
    equal = difference <= (1e-4 if times.resized else 1e-6) and len(found.batches) == len(wanted.batches)
    return (
        FAULTS[name].__doc__ or name,
        f"{times.detected:.1f} s",
        f"{times.resumed:.1f} s",
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
    titles = ("fault", "told after", "resumed after", "steps repeated", "rows lost", "rows doubled", "other batches")
    titles = (*titles, "difference of the last loss")
    table = Table(*titles)
    for row in rows:
        table.add_row(*row)
    Console(width=180).print(table)
    if markdown is not None:
        lines = [titles, ("---",) * len(titles), *rows]
        markdown.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


if __name__ == "__main__":
    typer.run(main)
