"""Scores the requests that wait together, in a few threads."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from pydantic_core import to_json

from rechub_dist.inference.server.arrow import STREAM, write_stream
from rechub_dist.inference.server.requests import JSON, Parsed, RequestError
from rechub_dist.inference.server.versions import Asked, Served, Version
from rechub_dist.reporting.logs import LOGGER

RETRY_AFTER = 1  # seconds, for who is sent away


@dataclass(frozen=True)
class Answer:
    """What is sent back.

    Attributes:
        version: the label of what answered; None where nothing did.
    """

    status: int
    body: bytes
    media: str = JSON
    version: str | None = None


@dataclass(eq=False)
class Job:
    """A request that waits for its answer."""

    served: Served
    asked: Asked
    body: bytes
    media: str  # of the body
    wanted: str  # of the answer
    answer: asyncio.Future[Answer]
    arrived: float = field(default_factory=time.monotonic)


@dataclass
class _Read:
    """A request whose rows have been read, and its answer."""

    job: Job
    rows: Parsed
    found: pa.Table | None = None


class Batcher:
    """Answers requests: those that wait for the same operation of a bundle are scored together.

    Args:
        threads: that score.
        rows: a batch takes no further request once it has so many.
        wait: seconds that an incomplete batch waits for further requests after its first has come.
        done: called with each request that was answered by scores, and its answer, after that has been sent.
        scored: called with the bundle, and the rows and requests of each batch.
    """

    def __init__(
        self,
        threads: int,
        rows: int,
        wait: float,
        done: Callable[[Job, pa.Table], None],
        scored: Callable[[str, int, int], None],
    ) -> None:
        self._rows, self._wait = rows, wait
        self._done, self._scored = done, scored
        self._lanes: dict[tuple[str, Asked], deque[Job]] = defaultdict(deque)
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=f"score-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def put(self, job: Job) -> None:
        """Have a request answered. From the event loop of its future."""
        with self._changed:
            self._lanes[job.served.name, job.asked].append(job)
            self._changed.notify_all()  # some wait for this lane alone

    def drop(self, job: Job) -> None:
        """Let a request be that still waits: nobody wants its answer any more."""
        with self._changed:
            lane = self._lanes.get((job.served.name, job.asked), ())
            if job in lane:
                lane.remove(job)  # type: ignore[union-attr]

    def close(self) -> None:
        """Answer what waits, and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _first(self) -> Job | None:
        """The request that has waited longest, taken from its lane; None when all is done."""
        with self._changed:
            while True:
                lanes = [lane for lane in self._lanes.values() if lane]
                if lanes:
                    return min(lanes, key=lambda lane: lane[0].arrived).popleft()
                self._lanes.clear()
                if self._closed:
                    return None
                self._changed.wait()

    def _next(self, first: Job, version: Version) -> Job | None:
        """A further request of the same lane; None if there is none in time.

        Nor where another version has come to answer: what asks after that is not to be answered by the one before.
        """
        until = first.arrived + self._wait
        with self._changed:
            while True:
                lane = self._lanes.get((first.served.name, first.asked))
                if lane and first.served.current is not version:
                    return None
                if lane:
                    return lane.popleft()
                left = until - time.monotonic()
                if left <= 0 or self._closed:
                    return None
                self._changed.wait(left)

    def _work(self) -> None:
        while (first := self._first()) is not None:
            version = first.served.current  # of all answers of this batch
            answers: list[tuple[Job, Answer]] = []
            read: list[_Read] = []
            rows, job = 0, first
            while True:
                try:
                    if not job.answer.cancelled():  # nobody waits for it any more
                        one = _Read(job, version.reader(job.asked).read(job.body, job.media))
                        rows += one.rows.rows.num_rows
                        read.append(one)
                except Exception as error:
                    answers.append((job, _failed(error, version)))
                further = self._next(first, version) if rows < self._rows else None
                if further is None:
                    break
                job = further
            for group in _alike(read):
                answers += _answers(version, group)
                self._scored(first.served.name, sum(one.rows.rows.num_rows for one in group), len(group))
            for loop in {job.answer.get_loop() for job, _ in answers}:
                loop.call_soon_threadsafe(_deliver, [pair for pair in answers if pair[0].answer.get_loop() is loop])
            for one in read:
                if one.found is not None:
                    self._done(one.job, one.found)


def _alike(read: Iterable[_Read]) -> list[list[_Read]]:
    """Requests that can be scored as one table; candidates of a user are a batch of their own."""
    groups: dict[Any, list[_Read]] = defaultdict(list)
    for one in read:
        schema = one.rows.rows.schema
        plain = one.rows.user is None and not any(pa.types.is_dictionary(kind) for kind in schema.types)
        groups[tuple(zip(schema.names, map(str, schema.types), strict=True)) if plain else id(one)].append(one)
    return list(groups.values())


def _answers(version: Version, group: list[_Read]) -> list[tuple[Job, Answer]]:
    asked = group[0].job.asked
    try:
        if len(group) == 1:
            group[0].found = version.answer(asked, group[0].rows)
        else:
            found = version.answer(asked, Parsed(pa.concat_tables([one.rows.rows for one in group])))
            first = 0
            for one in group:
                one.found = found.slice(first, one.rows.rows.num_rows)
                first += one.rows.rows.num_rows
        return [(one.job, _encoded(one, version)) for one in group]
    except RequestError as error:
        if len(group) == 1:
            return [(group[0].job, _failed(error, version))]
        # one of them is at fault: the others are not to suffer for it
        return [pair for one in group for pair in _answers(version, [one])]
    except Exception as error:
        return [(one.job, _failed(error, version)) for one in group]


def _encoded(one: _Read, version: Version) -> Answer:
    assert one.found is not None
    if one.job.wanted == STREAM:
        return Answer(200, write_stream(one.found), STREAM, version.label)
    tree = {
        "bundle": one.job.served.name,
        "model": version.manifest.model,
        "step": version.manifest.step,
        "version": version.label,
        "columns": one.found.to_pydict(),
    }
    return Answer(200, to_json(tree, inf_nan_mode="null"), JSON, version.label)


def _failed(error: Exception, version: Version) -> Answer:
    if isinstance(error, RequestError):
        message = str(error).replace(f"{version.scorer.folder}/", "")
        return Answer(error.status, to_json({"detail": message}), version=version.label)
    LOGGER.exception("a request failed", exc_info=error)
    traceback.print_exception(error)
    return Answer(500, to_json({"detail": "this request met a defect of the server, which has logged it"}))


def _deliver(answers: list[tuple[Job, Answer]]) -> None:
    for job, answer in answers:
        if not job.answer.done():  # as above
            job.answer.set_result(answer)
