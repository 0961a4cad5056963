"""`train --profile`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from rechub_dist.reporting.profile import STEP
from rechub_tests.ranks import RankPool
from rechub_tests.runs import losses, output, run_file, train


def test_a_profiled_run_is_the_same_run(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    """It ends at the epoch's evaluation, and leaves a trace of each rank."""
    plain, profiled = (run_file(tmp_path / name, data_root, "DeepFM") for name in ("plain", "profiled"))
    pool.run(2, train, plain)
    pool.run(2, train, profiled, ["monitor.profile_steps=3", "monitor.profile_every=11"])
    assert losses(profiled) == losses(plain)
    for rank in range(2):
        with gzip.open(output(profiled) / "profile" / f"rank{rank}.json.gz") as file:
            names = [event.get("name") for event in json.load(file)["traceEvents"]]
        assert names.count(STEP) == 3
