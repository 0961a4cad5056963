"""Where the time of a step goes."""

from __future__ import annotations

import time

import pytest
import torch
from torch.profiler import record_function

from rechub_dist.reporting.step_times import PARTS, REPLICATED_LOOKUP, WAITING_FOR_DATA, StepTimes, split
from rechub_tests.events import event


def test_what_overlaps_belongs_to_one_part() -> None:
    found = split(
        [
            event(WAITING_FOR_DATA, 0, 100),
            event("gloo:all_reduce", 90, 150),  # 50 of them on its own
            event("[lookup]_[stage.pooled.pooled]_[table_wise]", 150, 250),
            event("fbgemm::lookup", 160, 240),
            event("aten::mm", 250, 400),
            event("gloo:all_to_all", 300, 430),  # 30 after what is computed meanwhile
            event("All2All_Pooled_WaitBackward", 420, 480),  # 50 after the exchange
        ],
        seconds=600e-6,
    )
    assert set(found) == set(PARTS)
    assert {part: round(seconds * 1e6) for part, seconds in found.items()} == {
        "data": 100,
        "communication": 80,
        "embedding": 150,
        "dense": 270,
    }


def test_a_real_step_is_divided() -> None:
    times = StepTimes(100)
    table = torch.nn.EmbeddingBag(50_000, 64)
    ids, dense = torch.randint(0, 50_000, (200, 500)), torch.randn(300, 300)
    for number in (9, 10, 110):
        with times.step(number):
            with record_function(WAITING_FOR_DATA):
                time.sleep(0.05)
            with record_function(REPLICATED_LOOKUP):
                vectors = table(ids)
            vectors.sum().backward()
            for _ in range(5):
                dense = dense @ dense / dense.norm()
        found = times.take()
        if number == 9:
            assert found is None
        else:
            assert found is not None
            assert found["data"] == pytest.approx(0.05, rel=0.5)
            assert found["embedding"] > 0
            assert found["dense"] > 0
            assert found["communication"] == 0
            assert times.take() is None


def test_the_end_of_the_data_passes_through() -> None:
    times = StepTimes(2)

    def run() -> None:
        with times.step(1):
            raise StopIteration

    with pytest.raises(StopIteration):
        run()
    assert times.take() is None


def test_it_can_be_left_out() -> None:
    times = StepTimes(None)
    with times.step(10):
        pass
    assert times.take() is None
