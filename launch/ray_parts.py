"""Runs the tasks of an import in parts on a Ray cluster.

Plain tasks rather than Ray Data: a task reads from files and writes to files, within the memory of its own database,
however large its part. Ray Data would carry the rows themselves, and its sort and group-by need all blocks of a
column's key in the cluster's object store. A task's result is a few numbers; and one that runs again, since its worker
was killed, writes the same files again.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

from rechub_dist.data.importing.parts import Job, Run
from rechub_dist.data.importing.write import Progress
from rechub_dist.errors import UserError, one_line

_LOOK_SECONDS = 1.0


def cluster_task_memory(cpus: int) -> int:
    """Bytes for the database of a task that reserves so many CPUs: half of its share of the node that has the least."""
    shares = [
        node["Resources"]["memory"] * cpus / node["Resources"]["CPU"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU") and node["Resources"].get("memory")
    ]
    return int(min(shares, default=4 << 30) / 2)


def runner(retries: int, progress: Progress) -> Run:
    """What runs tasks on the cluster that is connected.

    Args:
        retries: how often a task runs again whose worker or node has died; -1: as often as needed.
        progress: called with what is being done.
    """

    def run(what: str, task: Any, job: Job, count: int) -> list[Any]:
        remote = ray.remote(task).options(
            num_cpus=job.threads, max_retries=retries, retry_exceptions=[OSError], name=f"import: {what}"
        )
        shared = ray.put(job)
        number_of = {remote.remote(shared, number): number for number in range(count)}
        waiting = list(number_of)
        found: dict[int, Any] = {}
        try:
            while waiting:
                progress(what, len(found), count)
                done, waiting = ray.wait(waiting, timeout=_LOOK_SECONDS)
                for one in done:
                    found[number_of[one]] = ray.get(one)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except WorkerCrashedError as error:
            raise UserError(
                f"{what}: the worker of a task died more than {retries} times, most likely for lack of memory: "
                f"{one_line(error)}; lower --memory or raise --parts"
            ) from None
        finally:
            for one in waiting:
                ray.cancel(one)
        return [found[number] for number in range(count)]

    return run
