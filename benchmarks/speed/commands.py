"""Parts that measure whole commands: starting, checkpoints, memory, serving, a profile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from rechub_dist.reporting.records import read_records
from speed.bench import Bench, command
from speed.machine import ROOT
from speed.record import Figure
from speed.shapes import RANKS, deepfm

PROGRAM = ("-m", "rechub_dist")


def starting(bench: Bench) -> None:
    """From the command to the first step of the demo, and `--help`."""
    demo, rows = bench.cache / "demo", "20000" if bench.smoke else "400000"
    if not (demo / "dataset.yaml").exists():
        sizes = ("--rows", rows, "--dense", "4", "--sparse", "8", "--vocabulary", "1000")
        command(*PROGRAM, "data", "synthesize", "--out", str(demo), *sizes)
    helps, firsts = [], []
    for number in range(bench.rounds + 1):  # the first warms up
        began = time.perf_counter()
        command(*PROGRAM, "--help")
        helped = time.perf_counter() - began
        out = bench.folder() / "run"
        first = _first_step(demo, out)
        shutil.rmtree(out.parent)
        if number:
            helps.append(helped)
            firsts.append(first)
    bench.add(
        Figure("", "command to the first step of the demo, two ranks", "s", firsts, 8.0, at_most=True),
        Figure("", "`rechub-dist --help`", "s", helps, 0.5, at_most=True),
    )


def _first_step(data: Path, out: Path) -> float:
    """Seconds until the demo's first step is recorded; it is killed then."""
    run = ROOT / "configs" / "runs" / "deepfm_synthetic.yaml"
    changes = {"data.root": data, "output_dir": out, "train.log_every": 1}
    options = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    log = out.parent / "log"
    with log.open("wb") as file:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *PROGRAM, "train", str(run), "--nproc", str(RANKS), *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while not any(record["split"] == "train" for record in read_records(out)):
            if process.poll() is not None or time.perf_counter() - began > 300:
                lines = log.read_text(errors="replace").strip().splitlines()
                raise RuntimeError(f"the demo has made no step: {lines[-1] if lines else 'it has printed nothing'}")
            time.sleep(0.01)
        return time.perf_counter() - began
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def checkpoints(bench: Bench) -> None:
    """Saves beside plain writes to the same disk, and how long training is held up."""
    megabytes = 32 if bench.smoke else 1024
    for ranks in (1, 2):
        folder = bench.folder() / "saves"
        script = str(ROOT / "benchmarks" / "checkpoint.py")
        options = ("--folder", str(folder), "--megabytes", str(megabytes), "--rounds", str(bench.rounds))
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
        found = json.loads(command(*launcher, script, *options))
        group, rounds = f"{megabytes:,} MB of state on {ranks} rank(s)", found["rounds"]
        bench.add(
            Figure(group, "save", "MB/s", rounds["save, MB/s"]),
            Figure(group, "plain write and fsync", "MB/s", rounds["plain write, MB/s"]),
            Figure(group, "save / plain write", "ratio", rounds["ratio"]),
            Figure(group, "training waits", "s", rounds["training waits, s"]),
            Figure(group, "load", "MB/s", [found["load, MB/s"]]),
            Figure(group, "memory of a save / state", "ratio", [found["peak memory of a save over this rank's state"]]),
        )


def memory(bench: Bench) -> None:
    """Memory of a rank beside what the plan says."""
    measured, planned = [], []
    sizes = (1000, 20_000) if bench.smoke else (1000, 1_000_000)
    for vocabulary in sizes:
        shape = deepfm(vocabulary, rows=20_000 if bench.smoke else 128_000)
        shape.data.prepare(bench.cache)
        found = bench.contest(None, [bench.ours(shape, "ours")], bench.pace(1.0))
        measured.append(found["ours"].peak)
        file = bench.folder() / "run.yaml"
        file.write_text(yaml.safe_dump(shape.run(bench.cache, file.parent / "run")), encoding="utf-8")
        tree = json.loads(command(*PROGRAM, "plan", str(file), "--world-size", str(RANKS), "--json"))
        of_ranks = [0.0] * RANKS
        for table in tree["tables"].values():
            for rank, _rows, _columns, device, host in table["shards"]:
                of_ranks[rank] += device + host
        planned.append(max(of_ranks))
    (small, large), (little, much) = measured, planned
    group = f"what tables of {sizes[1]:,} rows take more than such of {sizes[0]:,}, of the rank that has most"
    bench.add(
        Figure(group, "measured: growth of the largest resident size", "MB", [(large - small) / 1e6]),
        Figure(group, "by `rechub-dist plan`", "MB", [(much - little) / 1e6]),
        Figure(group, "difference", "%", [100 * abs((large - small) / (much - little) - 1)], 15.0, at_most=True),
        Figure(group, "whole process at its peak, with large tables", "MB", [large / 1e6]),
    )


def serving(bench: Bench) -> None:
    """A served bundle beside torch behind the same server."""
    out = bench.folder() / "figures.json"
    script = str(ROOT / "benchmarks" / "serving.py")
    requests = "20" if bench.smoke else "100"
    command(script, "--rounds", str(bench.rounds), "--requests", requests, "--json", str(out))
    found = json.loads(out.read_text(encoding="utf-8"))
    for one in found:
        group = f"DIN, {one['candidates']} candidate(s) a request"
        for key, unit in (("p50", "ms"), ("p99", "ms"), ("rate", "requests/s"), ("cpu", "ms CPU")):
            bench.add(Figure(group, f"{one['scorer']}: {key}", unit, one[key]))


def profile(bench: Bench) -> None:
    """Where the time of a step of part a goes."""
    shape, steps = bench.sized(deepfm()), 10 if bench.smoke else 50
    file = bench.folder() / "run.yaml"
    changes = {"train__max_steps": 11 + steps, "monitor__profile_steps": steps}
    file.write_text(yaml.safe_dump(shape.run(bench.cache, file.parent / "run", **changes)), encoding="utf-8")
    command(*PROGRAM, "train", str(file), "--nproc", str(RANKS))
    log = file.parent / "run" / "logs" / "rank-0.jsonl"
    lines = [json.loads(line)["message"] for line in log.read_text(encoding="utf-8").splitlines()]
    first = next((n for n, line in enumerate(lines) if line.startswith("profile of ")), None)
    if first is None:
        raise RuntimeError(f"the run has told no profile; the last that it has told: {lines[-1]}")
    found = [lines[first]]
    for line in lines[first + 1 :]:
        if " ms " not in line:
            break
        found.append(line)
    bench.record.text += found
    bench.record.write(bench.out / "records")
