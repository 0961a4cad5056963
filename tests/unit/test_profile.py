"""Where the time of some steps went."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from rechub_dist.reporting.profile import BEFORE, PARTS, STEP, Profile, breakdown
from rechub_dist.reporting.step_times import REPLICATED_LOOKUP, WAITING_FOR_DATA
from rechub_tests.events import event


def test_each_instant_belongs_to_one_part() -> None:
    found = breakdown(
        [
            event(STEP, 100, 1000),
            event(STEP, 2000, 2100),
            event(WAITING_FOR_DATA, 50, 150),  # 50 of them before the step
            event("## KJTAllToAllSplitsAwaitable wait() ##", 150, 200),
            event("gloo:all_to_all", 140, 210, thread=2),  # the last 10 without anything else
            event(REPLICATED_LOOKUP, 210, 250),
            event("aten::embedding", 215, 245),
            event("aten::mm", 250, 300),
            event("autograd::engine::evaluate_function: AddmmBackward0", 300, 400),
            event("aten::mm", 310, 390),
            event("autograd::engine::evaluate_function: torch::autograd::CppNode<SplitLookupFunction_Op>", 400, 500),
            event("torch::autograd::CppNode<SplitLookupFunction_Op>", 400, 500),
            event("gloo:all_reduce", 480, 600, thread=2),
            event("Optimizer.step#Adam.step", 600, 640),
            event("aten::mm", 2000, 2100, thread=3),  # of another thread
        ]
    )
    assert list(found) == list(PARTS)
    assert {part: round(seconds * 1e6) for part, seconds in found.items()} == {
        "data": 50,
        "id exchange": 50,
        "table update": 100,
        "exchange": 110,
        "lookup": 40,
        "optimizer": 40,
        "dense backward": 100,
        "dense forward": 50,
        "bookkeeping": 460,
    }


def work(one: Profile, steps: range) -> None:
    for step in steps:
        if one.wants(step):
            with one.step(step):
                torch.randn(50, 50) @ torch.randn(50, 50)
    if one.wants(steps.stop):
        with pytest.raises(StopIteration), one.step(steps.stop):
            raise StopIteration


def test_the_steps_after_the_first_are_traced(tmp_path: Path) -> None:
    said: list[str] = []
    one = Profile(5, tmp_path / "profile", 3, said.append)
    work(one, range(41, 41 + BEFORE))  # a segment that ends before there is anything to see
    assert said == []
    work(one, range(41 + BEFORE, 90))
    assert said[0].startswith("profile of 5 steps, 51 to 55: ")
    assert len(said) == 2 + len(PARTS)
    assert sum(float(line.split()[-1].rstrip("%")) for line in said[1:-1]) == pytest.approx(100, abs=0.5)
    with gzip.open(tmp_path / "profile" / "rank3.json.gz") as file:
        names = [found.get("name") for found in json.load(file)["traceEvents"]]
    assert (names.count(STEP), names.count("aten::mm")) == (5, 5)
    one.finish()
    assert len(said) == 2 + len(PARTS)


def test_an_evaluation_ends_it(tmp_path: Path) -> None:
    said: list[str] = []
    work(Profile(50, tmp_path, 0, said.append), range(1, 15))
    assert said[0].startswith("profile of 4 steps, 11 to 14: ")


def test_a_run_that_is_too_short_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    one = Profile(5, tmp_path, 0, said.append)
    work(one, range(1, 6))
    one.finish()
    assert said == ["profile: there were no steps after the first 10 of a process, which are left out"]
    assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_costs_the_trace_alone(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    said: list[str] = []
    work(Profile(2, tmp_path / "profile", 0, said.append), range(1, 30))
    assert said[0].startswith("profile of 2 steps, 11 to 12: ")
    assert said[-1].startswith(f"warning: profile: {tmp_path / 'profile'}")
