"""A pool of rank processes, started once: importing torchrec takes seconds, joining a process group does not."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

MAX_RANKS = 4


class RankPool:
    """`run(world_size, function, *args)` calls `function` on that many ranks at once and returns their results."""

    def __init__(self, ranks: int = MAX_RANKS) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            assert pipe.recv() == "ready"

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
        """The ranks' results in rank order; the first error that a rank raised is raised here."""
        pipes = self._pipes[:world_size]
        assert len(pipes) == world_size, f"the pool has {len(pipes)} processes"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank, pipe in enumerate(pipes):
            pipe.send((rank, world_size, port, function, args))
        results: dict[int, Any] = {}
        while len(results) < world_size:
            ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], timeout)
            assert ready, f"ranks {set(range(world_size)) - set(results)} hang"
            for pipe in ready:
                results[pipes.index(pipe)] = pipe.recv()
        failed = {rank: result for rank, result in results.items() if result[1] is not None}
        if failed:
            traces = "\n".join(f"on rank {rank}:\n{trace}" for rank, (_, _, trace) in failed.items())
            # The first to answer is the first to fail: the others then lose their connection to it.
            raise next(iter(failed.values()))[1] from RuntimeError(traces)
        return [results[rank][0] for rank in range(world_size)]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(pipe: Connection) -> None:
    import torch  # noqa: PLC0415 - paid once, in the rank
    from torchrec.distributed import collective_utils  # noqa: PLC0415

    import rechub_dist.training.trainer  # noqa: F401, PLC0415

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    pipe.send("ready")
    while True:
        try:
            rank, world_size, port, function, args = pipe.recv()
        except EOFError:
            return
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        # torchrec asks once a process, by a broadcast, whether to validate collectives; here worlds come and go.
        collective_utils._INITIALIZED = False
        try:
            answer = (function(*args), None, "")
        except Exception as error:
            answer = (None, error, traceback.format_exc())
        pipe.send(answer)
