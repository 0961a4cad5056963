"""A rank that hangs, and one that waits for it in an exchange: both end, and tell in which."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rechub_dist.distributed.process import STALLED
from rechub_dist.distributed.runtime import runtime
from rechub_dist.distributed.watchdog import Watchdog


def hang(rank: int, port: int, folder: Path) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    # The one that waits gives up first: an exchange whose other side has ended fails at once, and hangs no more.
    seconds = 3.0 + 3.0 * rank
    with runtime("cpu", 60) as rt, Watchdog(rt, folder, seconds) as watchdog:
        watchdog.stepped(4)
        dist.all_reduce(torch.ones(3))
        watchdog.mark("computing a step")
        if rank == 1:
            time.sleep(60)
        dist.all_reduce(torch.ones(7, 2))


@pytest.mark.slow
def test_a_rank_tells_in_which_exchange_it_hangs(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=hang, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [STALLED, STALLED]
    told = [(tmp_path / f"stalled-rank-{rank}-step-4.txt").read_text() for rank in (0, 1)]
    assert "gloo: not ended: gloo:all_reduce number 2 of group 0/default_pg, sizes [[7, 2]]" in told[0]
    assert "gloo: ended last: gloo:all_reduce number 1 of group 0/default_pg, sizes [[3]]" in told[1]
    whole = pickle.loads((tmp_path / "exchanges-gloo-rank-0").read_bytes())
    assert [entry["collective_seq_id"] for entry in whole["entries"]] == [1, 2]
