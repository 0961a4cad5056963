"""The one benchmark suite: rechub_dist and the alternatives, in turns within one run, against targets.

    python benchmarks/suite.py [PART ...] [--rounds 5] [--budget MINUTES] [--out runs/bench] [--smoke] [--again]
    python benchmarks/suite.py --docs docs/performance.md

`make bench` sets up an environment with what is compared and runs all parts, then writes the page. Use an idle machine:
the load average stands beside each part, and where other programs took cores, that too. Linux only.

Each part runs in a process of its own and writes OUT/records/PART.json as it goes; what it prints goes to
OUT/PART.log. A part that fails is recorded as failed, with its last line, and the others go on. Parts that have a whole
record of the same commit, rounds and size are passed over, so that a suite which was stopped goes on where it was;
`--again` measures them anew. `--smoke` uses sizes that only show that it works.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from alone import run_alone
from speed.machine import commit, machine
from speed.parts import PARTS
from speed.record import Record, read_record, read_records

_PATIENCE = 4  # times as long as a part should take it may take, and at least _LEAST seconds
_LEAST = 600


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"Some of {', '.join(PARTS)}; default: all.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each contest.")] = 5,
    budget: Annotated[float, typer.Option(min=0.1, help="Minutes after which no further part is begun.")] = 90,
    out: Annotated[Path, typer.Option(help="Where records, logs and data sets go.")] = Path("runs/bench"),
    smoke: Annotated[bool, typer.Option("--smoke", help="Sizes that only show that it works; one round.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure what has a record, too.")] = False,
    docs: Annotated[Path | None, typer.Option(help="Write this page from the records; no more.")] = None,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure, or write the page."""
    out, rounds = out.resolve(), 1 if smoke else rounds
    if docs is not None:
        raise typer.Exit(_write_page(docs, out))
    if one is not None:
        _measure(one, out, rounds, smoke=smoke)
        return
    wanted = list(dict.fromkeys(parts or PARTS))
    if unknown := [part for part in wanted if part not in PARTS]:
        raise typer.BadParameter(f"no part {unknown[0]!r}: there are {', '.join(PARTS)}", param_hint="PART")
    due = [part for part in PARTS if part in wanted and (again or not _is_whole(out, part, rounds, smoke=smoke))]
    _tell_plan(wanted, due, rounds, smoke=smoke)
    deadline = time.monotonic() + 60 * budget
    options = ["--out", str(out), "--rounds", str(rounds), *(["--smoke"] if smoke else [])]
    left_out = []
    for part in due:
        if time.monotonic() > deadline:
            left_out.append(part)
            continue
        _supervise(part, out, rounds, options)
    failed = [part for part in wanted if (record := _record(out, part)) is not None and record.failed]
    for part in failed:
        print(f"{part} has failed: {_record(out, part).failed}")  # type: ignore[union-attr]
    if left_out:
        print(f"no time left for {', '.join(left_out)}: the same command goes on with them")
    print(f"records: {out / 'records'}; the page: python benchmarks/suite.py --out {out} --docs docs/performance.md")
    raise typer.Exit(bool(failed or left_out))


def _tell_plan(wanted: Iterable[str], due: list[str], rounds: int, *, smoke: bool) -> None:
    for part in wanted:
        state = f"{PARTS[part].minutes(rounds):4.0f} min" if part in due else "measured"
        print(f"{part}  {'' if smoke else state:>8}  {PARTS[part].title}")
    if not smoke:
        print(f"about {sum(PARTS[part].minutes(rounds) for part in due):.0f} minutes on two idle cores", flush=True)


def _supervise(part: str, out: Path, rounds: int, options: list[str]) -> None:
    """Run a part in a process of its own; whatever ends it, there is a record afterwards."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "records" / f"{part}.json").unlink(missing_ok=True)
    limit = max(_LEAST, 60 * _PATIENCE * PARTS[part].minutes(rounds))
    log = out / f"{part}.log"
    print(f"{part}  {datetime.now():%H:%M:%S}  load {os.getloadavg()[0]:.1f}  {PARTS[part].title}", flush=True)
    began = time.monotonic()
    why = None
    code = run_alone(__file__, ["--one", part, *options], log, limit)
    if code is None:
        why = f"not done after {limit:.0f} s"
    elif code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        why = f"exit code {code}: {lines[-1] if lines else 'it has printed nothing'}"
    record = _record(out, part)
    if why is not None and record is not None and record.failed in (None, _UNFINISHED):
        record.failed = why
        record.write(out / "records")
    print(f"   {time.monotonic() - began:.0f} s{'' if why is None else f', failed: {why}; see {log}'}", flush=True)


_UNFINISHED = "it was stopped before it was done"


def _measure(part: str, out: Path, rounds: int, *, smoke: bool) -> None:
    """A part, in this process, which it alone has."""
    from speed.bench import Bench  # noqa: PLC0415 - with torch and all that is compared

    began, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    load = [round(value, 2) for value in os.getloadavg()]
    record = Record(part, PARTS[part].title, commit(), began, 0.0, load, machine(), rounds, smoke, failed=_UNFINISHED)
    record.write(out / "records")
    scratch = Path(tempfile.mkdtemp(prefix=f"{part}-", dir=out))
    try:
        PARTS[part].measure(Bench(record, out, scratch))
        record.failed = None
    except Exception as error:
        traceback.print_exc()
        record.failed = f"{type(error).__name__}: {error}".splitlines()[0][:400]
    finally:
        record.seconds = round(time.monotonic() - clock, 1)
        record.write(out / "records")
        shutil.rmtree(scratch, ignore_errors=True)
    sys.stdout.flush()
    os._exit(record.failed is not None)  # a library's threads are not to hold it up


def _record(out: Path, part: str) -> Record | None:
    try:
        return read_record(out / "records" / f"{part}.json")
    except ValueError:
        return None


def _is_whole(out: Path, part: str, rounds: int, *, smoke: bool) -> bool:
    """Whether the part was measured without a failure, of this commit and in this way."""
    record = _record(out, part)
    if record is None or record.failed is not None:
        return False
    return (record.commit, record.rounds, record.smoke) == (commit(), rounds, smoke)


def _write_page(document: Path, out: Path) -> int:
    from speed.page import write  # noqa: PLC0415 - with what draws

    try:
        write(document, list(read_records(out / "records")))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    typer.run(main)
