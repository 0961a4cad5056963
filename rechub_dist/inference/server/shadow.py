"""A second bundle that gets the same requests, after they have been answered, to be compared with what answers."""

from __future__ import annotations

import threading
from collections import deque
from typing import Final

import pyarrow as pa

from rechub_dist.inference.comparison import as_array, largest
from rechub_dist.inference.server.batching import Job
from rechub_dist.inference.server.metrics import Metrics
from rechub_dist.inference.server.versions import Served
from rechub_dist.reporting.logs import LOGGER

MOST_REQUESTS: Final = 256  # that wait
MOST_BYTES: Final = 64 << 20


class Shadow:
    """Scores what it is offered in a thread of its own; what comes while its queue is full is dropped, and counted.

    Args:
        served: the shadow's bundle.
        metrics: of the server.
    """

    def __init__(self, served: Served, metrics: Metrics) -> None:
        self.served, self._metrics = served, metrics
        self._queue: deque[tuple[Job, pa.Table]] = deque()
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)
        self._thread.start()

    def offer(self, job: Job, answer: pa.Table) -> None:
        """A request that has been answered, and the answer. Returns at once."""
        with self._changed:
            if len(self._queue) >= MOST_REQUESTS or self._bytes + len(job.body) > MOST_BYTES:
                self._count("dropped")
                return
            self._queue.append((job, answer))
            self._bytes += len(job.body)
            self._changed.notify()

    def close(self) -> None:
        """Drop what waits, and end."""
        with self._changed:
            self._queue.clear()
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                job, answer = self._queue.popleft()
                self._bytes -= len(job.body)
            try:
                version = self.served.current
                found = version.answer(job.asked, version.reader(job.asked).read(job.body, job.media))
                self._metrics.shadow_differences.labels(self.served.name).observe(difference(answer, found))
                self._count("compared")
            except Exception as error:
                LOGGER.warning("shadow %s: %s", self.served.name, error)
                self._count("failed")

    def _count(self, result: str) -> None:
        self._metrics.shadow_requests.labels(self.served.name, result).inc()


def difference(answer: pa.Table, other: pa.Table) -> float:
    """How far two answers to a request are apart.

    Of scores it is the largest difference; of items the share of the answer's that the other has not found; of vectors,
    which mean nothing beside those of another model, 0.

    Raises:
        ValueError: they are not of the same kind.
    """
    if "predicted_items" in answer.column_names:
        pairs = zip(answer["predicted_items"].to_pylist(), other["predicted_items"].to_pylist(), strict=True)
        return max((len(set(one) - set(two)) / max(1, len(one)) for one, two in pairs), default=0.0)
    common = [name for name in answer.column_names if name in other.column_names]
    if not common:
        raise ValueError(f"its columns are {other.column_names}, those of the answer {answer.column_names}")
    scores = [name for name in common if name.startswith("predicted_")]
    return max((largest(as_array(answer[name]), as_array(other[name])) for name in scores), default=0.0)
