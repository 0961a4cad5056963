"""What one GPU makes of rechub_dist: DeepFM and DCNv2 from Parquet, beside the barest TorchRec loop.

    python benchmarks/gpu.py [--out FOLDER] [--only bare,throughput] [--budget SECONDS] [--device cpu --small]
    python benchmarks/gpu.py --out FOLDER --docs docs/gpu.md

The task has 13 dense features and 26 sparse ones of a million ids each, embeddings of width 16, an MLP of 256 and 128,
and 2.6 million rows; batches of 8192 and 32768.

env         versions and the card
data        makes the data set, where it is not there yet
bare        the barest TorchRec loop of DeepFM on batches in pinned memory: plain, and with TorchRec's pipeline
throughput  rechub_dist as a user starts it: samples/s, utilisation, shares of the time
profile     some steps under torch's profiler: kernels by stream and name, overlap, copies, what the host waits for

Each runs in a process of its own, one after another, and appends JSON lines to FOLDER/results.jsonl, in place of its
earlier ones: `ok` is true, false (it failed), or null (a measurement). What it prints goes to FOLDER/<check>.log. One
that fails, hangs or crashes does not keep the others from running, and after `--budget` seconds no more is begun.
The exit code is 1 if something failed.

`--device cpu --small` runs the same code in small; its figures say nothing. `--docs` measures nothing, and writes the
table of the given document from the results.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from alone import run_alone

SECONDS = {"env": 90, "data": 240, "bare": 150, "throughput": 300, "profile": 150}  # at most, on a GPU


def main(
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("runs/gpu-check"),
    device: Annotated[Literal["cuda", "cpu"], typer.Option()] = "cuda",
    small: Annotated[bool, typer.Option("--small", help="Sizes that only show that it works.")] = False,
    only: Annotated[str, typer.Option(help=f"Some of {', '.join(SECONDS)}, with commas.")] = ",".join(SECONDS),
    budget: Annotated[float, typer.Option(min=1, help="Seconds for all of it.")] = 900,
    docs: Annotated[Path | None, typer.Option(help="Write this document's table from the results; no more.")] = None,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure, or write down what was measured."""
    out = out.resolve()
    if docs is not None:
        _write(docs, out / "results.jsonl")
        return
    if one is not None:
        _run(one, out, device, small=small)
        return
    wanted = [check.strip() for check in only.split(",")]
    if unknown := [check for check in wanted if check not in SECONDS]:
        raise typer.BadParameter(f"no check {unknown[0]!r}: there are {', '.join(SECONDS)}", param_hint="--only")
    if {"throughput", "profile"} & set(wanted):
        wanted.append("data")  # which keeps what is there
    (out / "work").mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    _forget(results, wanted)
    deadline = time.monotonic() + budget
    options = ["--out", str(out), "--device", device, *(["--small"] if small else [])]
    for check in (check for check in SECONDS if check in wanted):
        end = min(deadline, time.monotonic() + SECONDS[check]) if device == "cuda" else deadline
        if why := _supervised(check, options, out / f"{check}.log", end):
            _append(results, {"check": check, "ok": False, "error": why})
    lines = _read(results)
    for line in lines:
        print(json.dumps(line))
    failed = [line["check"] for line in lines if line["check"] in wanted and line["ok"] is False]
    print(f"{len(lines)} lines in {results}" + (f"; failed: {', '.join(dict.fromkeys(failed))}" if failed else ""))
    raise typer.Exit(bool(failed))


def _supervised(check: str, options: list[str], log: Path, deadline: float) -> str | None:
    """Run a check in a process of its own; what kept it from ending well."""
    left = deadline - time.monotonic()
    if left < 1:
        return "no time left"
    code = run_alone(__file__, ["--one", check, *options], log, left)
    if code is None:
        return f"not done after {left:.0f} s, see {log}"
    return f"exit code {code}, see {log}" if code else None


def _run(check: str, out: Path, device: str, *, small: bool) -> None:
    """A check, in this process, which it alone has; what it does not need is not loaded."""
    from on_gpu import common  # noqa: PLC0415

    setting = common.Setting(out, device, small)
    if check in ("env", "data"):
        getattr(common, check)(setting)
    elif check == "bare":
        from on_gpu.bare import bare  # noqa: PLC0415

        bare(setting)
    else:
        from on_gpu import ours  # noqa: PLC0415

        getattr(ours, check)(setting)
    sys.stdout.flush()
    os._exit(0)  # a library's threads are not to hold it up


def _write(document: Path, results: Path) -> None:
    from on_gpu.docs import write  # noqa: PLC0415

    try:
        write(document, results)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from error


def _forget(results: Path, checks: list[str]) -> None:
    """Leave out the lines of `checks`, which are run again."""
    kept = [line for line in _read(results) if line["check"] not in checks]
    results.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def _read(results: Path) -> list[dict[str, Any]]:
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def _append(results: Path, line: dict[str, Any]) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    typer.run(main)
