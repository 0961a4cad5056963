"""What the routes of a server work with: bundles, their shadows, the threads that score, and changes of version."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
from starlette.requests import Request

from rechub_dist.errors import UserError, nearest, shown
from rechub_dist.inference.server.batching import Answer, Batcher, Job
from rechub_dist.inference.server.intake import Intake, deadline_of, media_of
from rechub_dist.inference.server.metrics import Metrics
from rechub_dist.inference.server.requests import RequestError, column_facts
from rechub_dist.inference.server.settings import Settings
from rechub_dist.inference.server.shadow import Shadow
from rechub_dist.inference.server.versions import OPERATIONS, Asked, Served, Version


class Serving:
    """What the routes of a server work with.

    Args:
        served: the bundles.
        shadows: by the name of a bundle, what gets the same requests.
        settings: of the server.
    """

    def __init__(self, served: Sequence[Served], shadows: Mapping[str, Served], settings: Settings) -> None:
        self.settings = settings
        self.served = {one.name: one for one in served}
        self.every = (*served, *shadows.values())
        self.intake = Intake(settings)
        self.metrics = Metrics(self.every, lambda: self.intake.requests)
        self._shadows = {name: Shadow(one, self.metrics) for name, one in shadows.items()}
        self._batcher = Batcher(settings.threads, settings.batch_rows, settings.batch_wait, self._done, self._scored)
        self._changes = ThreadPoolExecutor(1, "reload")  # one after the other

    async def answer(self, request: Request, name: str | None, asked: Asked) -> Answer:
        """The answer to a request; `name` is None where there is one bundle.

        Raises:
            RequestError: nothing is to be scored.
        """
        one = self._one(name, asked)
        media, wanted = media_of(request.headers)
        seconds = deadline_of(request.headers, self.settings)
        try:
            async with asyncio.timeout(seconds), self.intake.body(request) as body:
                job = Job(one, asked, body, media, wanted, asyncio.get_running_loop().create_future())
                answer = await self._answered(job, request)
        except TimeoutError:
            raise RequestError(f"there was no answer within {1000 * (seconds or 0):g} ms", 504) from None
        self.metrics.seconds.labels(one.name, asked.operation).observe(time.monotonic() - job.arrived)
        return answer

    async def _answered(self, job: Job, request: Request) -> Answer:
        """What the threads answer; a request that nobody waits for is not scored.

        Raises:
            RequestError: the client has gone.
        """
        gone = asyncio.ensure_future(request.receive())  # after the body nothing else comes
        gone.add_done_callback(lambda _: job.answer.cancel())
        self._batcher.put(job)
        try:
            return await job.answer
        except asyncio.CancelledError:
            self._batcher.drop(job)
            if gone.done():
                raise RequestError("the client has gone", 499) from None
            raise
        finally:
            gone.cancel()

    async def reload(self, names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Open folders anew: what answers now by bundle, and what failed. Those that failed are served as before."""
        loop, failed = asyncio.get_running_loop(), {}
        chosen = [one for one in self.every if not names or one.name in names]
        for one in chosen:
            before = one.current.label
            try:
                changed = await loop.run_in_executor(self._changes, one.reload)
            except UserError as error:
                failed[one.name] = str(error)
                self._change(one, "failed", f"{error}; {before} is served as before")
            else:
                text = f"step {one.current.manifest.step}, version {one.current.label}, before: {before}"
                self._change(one, "loaded" if changed else "unchanged", text if changed else "")
                if changed and one.current.unindexed is not None:
                    print(f"{one.name}: {one.current.unindexed}; search is exact", file=sys.stderr, flush=True)
        return {one.name: one.current.label for one in chosen}, failed

    async def rollback(self, name: str) -> str:
        """Answer with the version before. Raises UserError if there is none."""
        one = self.served[name]
        await asyncio.get_running_loop().run_in_executor(self._changes, one.rollback)
        self._change(one, "rolled_back", f"rolled back to version {one.current.label}")
        return one.current.label

    async def watch(self, seconds: float) -> None:
        """Reload what is replaced, until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(seconds)
            for one in self.every:
                if await loop.run_in_executor(self._changes, lambda one=one: one.replaced):  # type: ignore[misc]
                    await self.reload([one.name])

    def close(self) -> None:
        """End the threads, once all is answered."""
        self._batcher.close()
        for shadow in self._shadows.values():
            shadow.close()
        self._changes.shutdown()

    def named(self, name: str) -> Served:
        """A bundle. Raises RequestError if there is none of the name."""
        if name not in self.served:
            raise RequestError(f"there is no bundle {shown(name)}: {nearest(name, self.served)}", 404)
        return self.served[name]

    def _one(self, name: str | None, asked: Asked) -> Served:
        if name is not None:
            return self.named(name)
        if len(self.served) > 1:
            raise RequestError(
                f"there are several bundles: use /bundles/NAME/{asked.operation} with {', '.join(self.served)}", 404
            )
        return next(iter(self.served.values()))

    def _done(self, job: Job, found: pa.Table) -> None:
        if (shadow := self._shadows.get(job.served.name)) is not None:
            shadow.offer(job, found)

    def _scored(self, name: str, rows: int, requests: int) -> None:
        self.metrics.batch_rows.labels(name).observe(rows)
        self.metrics.batch_requests.labels(name).observe(requests)

    def _change(self, one: Served, result: str, text: str) -> None:
        self.metrics.reloads.labels(one.name, result).inc()
        if text:
            print(f"{one.name}: {text}", file=sys.stderr, flush=True)


def facts(one: Served) -> dict[str, Any]:
    """What callers are told of a bundle."""
    version = one.current
    return {
        "model": version.manifest.model,
        "step": version.manifest.step,
        "version": version.label,
        "former": None if one.former is None else one.former.label,
        "index": _index_facts(version),
        "operations": [operation for operation in OPERATIONS if operation not in version.refused],
        "columns": {
            part: [column_facts(column) for column in reader.columns.values()]
            for part, reader in version.readers.items()
        },
        "examples": version.examples,
    }


def _index_facts(version: Version) -> dict[str, Any] | None:
    """What is searched instead of all items; None for nothing."""
    if version.unindexed is not None:
        return {"refused": "it cannot be used, as the server has said on stderr; search is exact"}
    if version.index is None:
        return None
    return {"kind": version.index.kind, "items": version.index.size, "recall": version.index.measured.recall}
