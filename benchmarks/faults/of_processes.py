"""What befalls processes, files and disks of one host. Each fault takes a scene, plays in it, and returns its times."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faults.scene import RESUMED, TOLD, Fault, Scene, Times
from rechub_dist.checkpoint import saved_steps
from rechub_dist.checkpoint.folder import step_folder
from rechub_dist.distributed.process import MISTAKE


def no_fault(scene: Scene) -> Times:
    """None, but on one rank: the effect of rounding alone when the number of ranks differs."""
    run = scene.start("--nproc", "1")
    scene.finish(run)
    return Times(None, None, resized=True)


def five_kills(scene: Scene) -> Times:
    """SIGKILL of a worker, five times in one run, at random steps."""
    run = scene.start("--max-restarts", "5")
    steps = sorted(scene.dice.sample(range(40, 700), 5))
    times = []
    for step in steps:
        scene.reach(step, run)
        at = time.monotonic()
        os.kill(run.workers()[scene.dice.randrange(2)], signal.SIGKILL)
        times.append((run.wait_for(TOLD, at) - at, run.wait_for(RESUMED, at) - at))
    scene.finish(run)
    return Times(*map(max, zip(*times, strict=True)))


def agent_killed(scene: Scene) -> Times:
    """SIGKILL of the agent; its workers end with it, and the script restarts it."""
    run = scene.start("--outer-restarts", "1")
    scene.reach(110, run)
    workers = list(run.workers().values())
    at = time.monotonic()
    os.kill(run.agent(), signal.SIGKILL)
    run.wait_for("restarting it", at)
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        if time.monotonic() > at + 5:
            raise RuntimeError("an orphan trains on")
        time.sleep(0.01)
    return scene.goes_on(run, at)


def all_killed(scene: Scene) -> Times:
    """SIGKILL of all processes; the command is run again."""
    run = scene.start()
    scene.reach(110, run)
    at = time.monotonic()
    run.kill()
    return scene.again(run, at, code=-signal.SIGKILL)


def worker_stopped(scene: Scene, rank: int = 1) -> Times:
    """A worker hangs (SIGSTOP). The ranks that wait for it write their stacks."""
    run = scene.start()
    scene.reach(110, run)
    at = time.monotonic()
    os.kill(run.workers()[rank], signal.SIGSTOP)
    times = scene.goes_on(run, at)
    stacks = [path.read_text() for path in (scene.output / "logs").glob("stalled-rank-*.txt")]
    if not stacks or not all("trainer.py" in text for text in stacks):
        raise RuntimeError(f"no stacks were written:\n{run.text}")
    return times


def main_worker_stopped(scene: Scene) -> Times:
    """The main rank, which hosts the ranks' store, hangs."""
    return worker_stopped(scene, 0)


def sigterm(scene: Scene, number: signal.Signals = signal.SIGTERM) -> Times:
    """SIGTERM during training."""
    run = scene.start()
    scene.reach(110, run)
    at = time.monotonic()
    run.signal(number)
    return scene.again(run, at)


def sighup(scene: Scene) -> Times:
    """SIGHUP during training, as when the terminal is closed."""
    return sigterm(scene, signal.SIGHUP)


def second_process(scene: Scene) -> Times:
    """The command is started a second time during a run: it is refused, and the run continues."""
    run = scene.start()
    scene.reach(110, run)
    at = time.monotonic()
    second = scene.start()
    told = second.wait_for(r"error: output_dir: .* is in use by process .* --take-over")
    if second.wait() != MISTAKE:
        raise RuntimeError(second.text)
    scene.finish(run)
    return Times(told - at, None)


def owner_paused(scene: Scene) -> Times:
    """All of a run is stopped (SIGSTOP), and wakes after a second run has taken its folders over."""
    run = scene.start()
    scene.reach(110, run)
    tree = run.tree()
    at = time.monotonic()
    for pid in tree:
        os.kill(pid, signal.SIGSTOP)
    again = scene.start()
    told = again.wait_for("is held by process")
    resumed = again.wait_for(RESUMED)
    for pid in reversed(tree):
        os.kill(pid, signal.SIGCONT)
    run.wait_for("error: .* was taken over by process")
    if run.wait() != MISTAKE:
        raise RuntimeError(run.text)
    if run.saw("saved", resumed) is not None:
        raise RuntimeError(f"it saved after it was taken over:\n{run.text}")
    scene.finish(again)
    return Times(told - at, resumed - at)


def owner_killed(scene: Scene) -> Times:
    """SIGKILL of all processes, with a lease of an hour: the command is run again, and does not wait."""
    run = scene.start("--set", "distributed.lease_seconds=3600")
    scene.reach(110, run)
    at = time.monotonic()
    run.kill()
    return scene.again(run, at, code=-signal.SIGKILL)


def taken_over(scene: Scene) -> Times:
    """The command is started with --take-over during a run, which ends."""
    run = scene.start()
    scene.reach(110, run)
    at = time.monotonic()
    again = scene.start("--take-over")
    told, resumed = run.wait_for("error: .* was taken over by process"), again.wait_for(RESUMED)
    if run.wait() != MISTAKE:
        raise RuntimeError(run.text)
    scene.finish(again)
    return Times(told - at, resumed - at)


def sigterm_while_saving(scene: Scene) -> Times:
    """SIGTERM while a checkpoint is written."""
    run = scene.start()
    scene.reach(110, run)
    step = scene.saving(run)
    at = time.monotonic()
    run.signal(signal.SIGTERM)
    times = scene.again(run, at)
    if run.saw(rf"step {step}: saved", at) is None:
        raise RuntimeError(f"the save was over before the signal:\n{run.text}")
    return times


def sigterm_while_evaluating(scene: Scene) -> Times:
    """SIGTERM during an evaluation, which is repeated on resume."""
    run = scene.start("--set", "data.eval_batch_size=4")
    at = run.wait_for("^epoch 0: ")
    run.signal(signal.SIGTERM)
    times = scene.again(run, at)
    if run.saw(r"^step 400 valid") is not None:
        raise RuntimeError(f"the evaluation was over before the signal:\n{run.text}")
    return times


def second_signal(scene: Scene) -> Times:
    """SIGTERM to a run that cannot stop because a worker hangs; then a second SIGTERM, which kills it."""
    run = scene.start()
    scene.reach(110, run)
    os.kill(run.workers()[1], signal.SIGSTOP)
    run.signal(signal.SIGTERM)
    time.sleep(1.5)
    at = time.monotonic()
    run.signal(signal.SIGTERM)
    return scene.again(run, at, code=128 + signal.SIGTERM)


def killed_while_saving(scene: Scene) -> Times:
    """SIGKILL of all processes while a checkpoint is written."""
    run = scene.start()
    scene.reach(110, run)
    step = scene.saving(run)
    at = time.monotonic()
    run.kill()
    run.wait()
    if step in saved_steps(scene.checkpoints):
        raise RuntimeError("the save was over before the signal")
    return scene.again(run, at, code=-signal.SIGKILL)


def checkpoint_corrupted(scene: Scene) -> Times:
    """SIGKILL of all processes, and a bit of the newest checkpoint is flipped."""
    run = scene.start()
    scene.reach(110, run)
    run.kill()
    run.wait()
    newest = saved_steps(scene.checkpoints)[-1]
    data = next((scene.checkpoints / step_folder(newest)).glob("rank-*"))
    with data.open("r+b") as file:
        file.seek(scene.dice.randrange(data.stat().st_size))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << scene.dice.randrange(8)]))
    at = time.monotonic()
    again = scene.start()
    again.wait_for(f"{step_folder(newest)}.*trying the checkpoint before it")
    return scene.goes_on(again, at)


def disk_full(scene: Scene) -> Times:
    """The disk is full when a checkpoint is saved; space is freed later."""
    with _small_disk(scene):
        run = scene.start()
        scene.reach(60, run)
        before = saved_steps(scene.checkpoints)
        at = time.monotonic()
        _fill(scene)
        told = run.wait_for(TOLD, at)
        if saved_steps(scene.checkpoints)[: len(before)] != before:
            raise RuntimeError("an older checkpoint is gone")
        scene.verify()
        (scene.output / "filler").unlink()
        run.wait_for("saved", told)
        scene.finish(run)
        return Times(told - at, None)


def disk_full_to_the_end(scene: Scene) -> Times:
    """The disk is full from some step to the end; space is freed, and the command run again."""
    with _small_disk(scene):
        run = scene.start()
        scene.reach(60, run)
        at = time.monotonic()
        _fill(scene)
        if run.wait() != MISTAKE:
            raise RuntimeError(run.text)
        scene.verify()
        (scene.output / "filler").unlink()
        return scene.again(run, at, code=MISTAKE)


@contextmanager
def _small_disk(scene: Scene) -> Iterator[None]:
    """The run's output is on a disk of its own; what is on it in the end is kept."""
    scene.output.mkdir()
    disk = scene.output
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(disk)], check=True)
    try:
        yield
        scene.output = scene.folder / "copy"
        shutil.copytree(disk, scene.output)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _fill(scene: Scene) -> None:
    """Leave enough room for the logs, and for no checkpoint."""
    free = shutil.disk_usage(scene.output).free
    (scene.output / "filler").write_bytes(bytes(free - (5 << 20)))


def not_finite(scene: Scene) -> Times:
    """A row that makes the loss infinite: the run ends, and is resumed with such steps skipped."""
    run = scene.start()
    if run.wait() != 2:
        raise RuntimeError(run.text)
    at = run.wait_for("error:")
    return scene.again(run, at, "--set", "train.on_non_finite=skip", code=MISTAKE)


OF_PROCESSES: tuple[Fault, ...] = (
    no_fault,
    five_kills,
    agent_killed,
    all_killed,
    killed_while_saving,
    worker_stopped,
    main_worker_stopped,
    sigterm,
    sighup,
    sigterm_while_saving,
    sigterm_while_evaluating,
    second_signal,
    checkpoint_corrupted,
    disk_full,
    disk_full_to_the_end,
    not_finite,
    second_process,
    owner_paused,
    owner_killed,
    taken_over,
)
