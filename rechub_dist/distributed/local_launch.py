"""Start ranks on this machine through torchrun's own API."""

from __future__ import annotations

import logging
import os
import sys
import uuid

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def launch_local(arguments: list[str], nproc: int) -> int:
    """Run `python -m rechub_dist ARGUMENTS` on `nproc` local ranks; returns the exit code.

    That is 2 where a rank ended with a user's mistake (which it has printed), else the first failed rank's.
    """
    # The agent would print a page about a worker that has said all there is to say.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, entrypoint=sys.executable)("-m", "rechub_dist", *arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return 2 if 2 in codes else next((code for code in codes if code > 0), 1)
    return 0
