"""The benchmark suite's records, turns and page, on figures and contestants made up here."""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from speed.page import BEGIN, END, number, section, summary, write
from speed.parts import PARTS
from speed.record import Figure, Record, ratio, read_record, read_records
from speed.turns import Contestant, Pace, Seat, contest, serve

DOCS = Path(__file__).parents[2] / "docs"


def record(part: str, *figures: Figure, failed: str | None = None) -> Record:
    return Record(
        part, f"title of {part}", "abc", "2026-01-01T00:00:00+00:00", 61.0, [0.25, 0.5, 1.0], {"torch": "2.1"}, 3,
        False, list(figures), [f"A note of {part}."], ["  data  1.0 ms"], failed,
    )  # fmt: skip


def test_medians_ratios_and_targets() -> None:
    one = ratio("g", "a / b", [2.0, 9.0, 4.0], [1.0, 3.0, 4.0], 2.0)
    assert (one.values, one.median, one.spread, one.met) == ([2.0, 3.0, 1.0], 2.0, (1.0, 3.0), True)
    assert not ratio("g", "a / b", [1.9], [1.0], 2.0).met
    assert Figure("", "time", "s", [7.0, 9.0], 8.0, at_most=True).met
    assert not Figure("", "time", "s", [8.1], 8.0, at_most=True).met
    assert Figure("", "time", "s", [1.0]).met is None
    nothing = Figure("", "time", "s", [], 8.0, at_most=True)
    assert math.isnan(nothing.median)
    assert nothing.met is False
    with pytest.raises(ValueError, match="zip"):
        ratio("g", "a / b", [1.0], [1.0, 2.0])


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = record("b", Figure("g", "a", "samples/s", [1.0, 2.5], 1.5), failed="no memory")
    written.write(tmp_path)
    record("a").write(tmp_path)
    assert read_record(tmp_path / "b.json") == written
    (tmp_path / "c.json").write_text('{"format": 1, "part": "c"}')
    (tmp_path / "d.json").write_text("cut off")
    (tmp_path / "e.json").write_text('{"format": 0}')
    assert [one.part for one in read_records(tmp_path)] == ["a", "b"]
    for name in "cde":
        with pytest.raises(ValueError, match=f"{name}.json: no record of a benchmark"):
            read_record(tmp_path / f"{name}.json")


def test_the_page_says_what_is_met_missed_and_failed(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"before\n\n{BEGIN}\n\nold\n\n{END}\nafter\n")
    met = Figure("26 x 10", "ours / bare", "ratio", [0.98, 0.99, 0.97], 0.97)
    missed = Figure("26 x 10", "ours / other", "ratio", [3.0, 4.0, 3.5], 4.5)
    rate = Figure("26 x 10", "ours", "samples/s", [1000.4, 1500.0, 1200.0])
    write(page, [record("a", rate, met, missed), record("g", failed="no | memory")])
    text = page.read_text()
    assert text.startswith(f"before\n\n{BEGIN}\n\ntorch 2.1; commit abc.\n\n## Targets")
    assert text.endswith(f"{END}\nafter\n")
    assert "| a | 26 x 10: ours / bare | 0.98 | 0.97-0.99 | at least 0.97 | met |" in text
    assert "| a | 26 x 10: ours / other | 3.5 | 3-4 | at least 4.5 | **missed** |" in text
    assert "| ours | samples/s | 1,200 | 1,000-1,500 |  |  |" in text
    assert "| g | failed: no / memory |" in text
    assert (
        "## a. title of a\n\n3 round(s), 1 min, begun 2026-01-01T00:00:00+00:00 at a load average of 0.2 0.5 1.0"
        in text
    )
    assert "A note of a.\n\n```text\n  data  1.0 ms\n```" in text
    assert "old" not in text
    once = page.read_text()
    write(page, [record("a", rate, met, missed), record("g", failed="no | memory")])
    assert page.read_text() == once


def test_a_page_of_several_commits_or_of_smoke_says_so(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"{BEGIN}{END}")
    other = record("b")
    other.commit, other.machine, other.smoke = "def", {"torch": "2.2"}, True
    write(page, [record("a"), other])
    assert "Part b: torch 2.2, commit def." in page.read_text()
    assert "`--smoke`, which only show that the suite works" in page.read_text()


def test_a_page_without_a_place_or_without_records(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="once each the lines"):
        write(page, [record("a")])
    page.write_text(f"{BEGIN}{END}")
    with pytest.raises(ValueError, match="no records"):
        write(page, [])
    assert summary([record("a")]) == ""
    assert "**Failed**: why" in section(record("a", failed="why"))


def test_numbers_have_the_digits_that_are_worth_reading() -> None:
    given = (0.9876, 0.00001234, 12345.6, 0.0, math.nan, 99.44)
    assert [number(value) for value in given] == ["0.988", "1.2e-05", "12,346", "0", "none", "99.4"]


def test_the_place_in_the_documentation() -> None:
    text = (DOCS / "performance.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert set(PARTS) >= set("abcdefghijrstp")


def pausing(pipe: Connection, seat: Seat, log: Path, seconds: float) -> None:
    """Sleeps in each step and notes when it has been at work."""

    def work(steps: int) -> None:
        began = time.monotonic()
        time.sleep(steps * seconds)
        with log.open("a") as file:
            file.write(f"{began} {time.monotonic()} {os.environ.get('BENCH_TEST', '')}\n")

    serve(pipe, work)
    (log.parent / f"{seat.rank}.ended").touch()


def failing(pipe: Connection, seat: Seat) -> None:
    """The second of two ranks fails; the first would wait for ever."""
    pipe.send(None)
    pipe.recv()
    if seat.rank:
        raise ValueError("there is\nno disk")
    signal.pause()


def test_contestants_take_turns_one_after_another(tmp_path: Path) -> None:
    logs = {name: tmp_path / name for name in ("slow", "fast")}
    slow = Contestant("slow", partial(pausing, log=logs["slow"], seconds=0.04), 100, ranks=1, env={"BENCH_TEST": "x"})
    fast = Contestant("fast", partial(pausing, log=logs["fast"], seconds=0.01), 100, ranks=1, steps=3)
    found = contest([slow, fast], Pace(rounds=2, turns=2, seconds=0.1, warmup=1), tmp_path / "scratch", lambda _: None)
    spans = {name: [line.split() for line in log.read_text().splitlines()] for name, log in logs.items()}
    assert [len(spans[name]) for name in logs] == [1 + 1 + 2 * 2, 1 + 2 * 2]  # warm-up, calibration of one, turns
    in_order = sorted((float(began), float(ended)) for one in spans.values() for began, ended, *_ in one)
    assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(in_order))
    assert {line[2] for line in spans["slow"]} == {"x"}
    assert all(len(line) == 2 for line in spans["fast"])
    assert "BENCH_TEST" not in os.environ
    for name in logs:
        result = found[name]
        assert len(result.rates) == len(result.cpu) == len(result.sent) == 2
        assert result.peak > 1 << 20
    assert max(found["slow"].rates) < 100 / 0.04  # no more than sleeping allows
    assert (tmp_path / "0.ended").exists()


def test_a_contestant_that_fails_is_named_and_no_process_is_left(tmp_path: Path) -> None:
    two = Contestant("of two ranks", failing, 100)
    with pytest.raises(RuntimeError, match=r"of two ranks: ValueError: there is\nno disk"):
        contest([two], Pace(rounds=1, warmup=1), tmp_path, lambda _: None)
    assert "no disk" in (tmp_path / "contestant-0" / "rank1.log").read_text()
