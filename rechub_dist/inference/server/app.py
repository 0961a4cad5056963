"""The HTTP application: routes, and what they have in common."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final, Literal

import pyarrow as pa
from fastapi import Depends, FastAPI, Query
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from rechub_dist import __version__
from rechub_dist.errors import UserError, nearest, shown
from rechub_dist.inference.server.batching import RETRY_AFTER, Answer, Batcher, Job
from rechub_dist.inference.server.intake import Intake, check_caller, media_of
from rechub_dist.inference.server.metrics import Metrics
from rechub_dist.inference.server.openapi import with_bundles
from rechub_dist.inference.server.page import PAGE
from rechub_dist.inference.server.requests import RequestError, column_facts
from rechub_dist.inference.server.settings import Settings
from rechub_dist.inference.server.shadow import Shadow
from rechub_dist.inference.server.versions import MOST_ITEMS, OPERATIONS, Asked, Served

VERSION_HEADER: Final = "X-Rechub-Version"
_PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
K = Annotated[int, Query(ge=1, le=MOST_ITEMS)]
Side = Annotated[Literal["user", "item"], Query()]


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
        async with self.intake.body(request) as body:
            job = Job(one, asked, body, media, wanted, asyncio.get_running_loop().create_future())
            self._batcher.put(job)
            answer = await job.answer
        self.metrics.seconds.labels(one.name, asked.operation).observe(time.monotonic() - job.arrived)
        return answer

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


def make_app(serving: Serving) -> FastAPI:
    """The application of a server."""
    settings = serving.settings

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[Any]] = set()

        def hang_up() -> None:
            task = loop.create_task(serving.reload([]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        loop.add_signal_handler(signal.SIGHUP, hang_up)
        if settings.watch is not None:
            tasks.add(loop.create_task(serving.watch(settings.watch)))
        yield
        for task in list(tasks):
            task.cancel()
        await loop.run_in_executor(None, serving.close)

    app = FastAPI(title="rechub_dist", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)

    def caller(request: Request) -> None:
        check_caller(request.headers, settings)

    # async, or FastAPI would call it in a thread
    async def allowed(request: Request) -> None:
        caller(request)

    guarded = [Depends(allowed)]

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        name, operation = _labels(request, serving)
        serving.metrics.requests.labels(name, operation, str(error.status)).inc()
        headers = {
            401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}, 413: {"Connection": "close"},
            503: {"Retry-After": str(RETRY_AFTER)},
        }.get(error.status)  # fmt: skip
        return JSONResponse({"detail": str(error)}, error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def misplaced(request: Request, error: RequestValidationError) -> Response:
        found = error.errors()[0]
        return await refused(
            request, RequestError(f"{found['loc'][-1]}: {found['msg'].lower()}, got {shown(found['input'])}")
        )

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def answered(request: Request, name: str | None, asked: Asked) -> Response:
        answer = await serving.answer(request, name, asked)
        bundle = name or next(iter(serving.served))
        serving.metrics.requests.labels(bundle, asked.operation, str(answer.status)).inc()
        headers = {} if answer.version is None else {VERSION_HEADER: answer.version}
        return Response(answer.body, answer.status, headers, answer.media)

    @app.post("/score", dependencies=guarded, include_in_schema=False)
    async def score(request: Request) -> Response:
        return await answered(request, None, Asked("score"))

    @app.post("/retrieve", dependencies=guarded, include_in_schema=False)
    async def retrieve(request: Request, k: K = 10) -> Response:
        return await answered(request, None, Asked("retrieve", k=k))

    @app.post("/vectors", dependencies=guarded, include_in_schema=False)
    async def vectors(request: Request, side: Side = "user") -> Response:
        return await answered(request, None, Asked("vectors", side=side))

    @app.post("/bundles/{name}/score", dependencies=guarded, include_in_schema=False)
    async def score_of(request: Request, name: str) -> Response:
        return await answered(request, name, Asked("score"))

    @app.post("/bundles/{name}/retrieve", dependencies=guarded, include_in_schema=False)
    async def retrieve_of(request: Request, name: str, k: K = 10) -> Response:
        return await answered(request, name, Asked("retrieve", k=k))

    @app.post("/bundles/{name}/vectors", dependencies=guarded, include_in_schema=False)
    async def vectors_of(request: Request, name: str, side: Side = "user") -> Response:
        return await answered(request, name, Asked("vectors", side=side))

    @app.get("/bundles", dependencies=guarded, summary="What is served, and its columns")
    async def bundles() -> dict[str, Any]:
        return {name: facts(one) for name, one in serving.served.items()}

    @app.get("/health", summary="Whether the process answers")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Whether bundles are served")
    async def ready() -> dict[str, dict[str, str]]:
        return {"versions": {name: one.current.label for name, one in serving.served.items()}}

    @app.get("/metrics", dependencies=guarded, summary="Metrics of Prometheus")
    async def metrics() -> Response:
        return Response(serving.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.post("/admin/reload", dependencies=guarded, summary="Open the folders of bundles anew")
    async def reload(bundle: str | None = None) -> Response:
        _check_admin(settings)
        names = [] if bundle is None else [serving.named(bundle).name]
        versions, failed = await serving.reload(names)
        return JSONResponse({"versions": versions, "failed": failed}, 409 if failed else 200)

    @app.post("/admin/rollback", dependencies=guarded, summary="Answer with the version before")
    async def rollback(bundle: str | None = None) -> Response:
        _check_admin(settings)
        if bundle is None and len(serving.served) > 1:
            raise RequestError(f"there are several bundles: say ?bundle=NAME with {', '.join(serving.served)}", 404)
        one = serving.named(bundle or next(iter(serving.served)))
        try:
            return JSONResponse({"versions": {one.name: await serving.rollback(one.name)}})
        except UserError as error:
            raise RequestError(error, 409) from None

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": _PAGE_POLICY})

    def description() -> dict[str, Any]:
        tree = get_openapi(title=app.title, version=app.version, routes=app.routes)
        return with_bundles(tree, serving.served.values(), token=settings.token is not None)

    app.openapi = description  # type: ignore[method-assign]
    return app


def facts(one: Served) -> dict[str, Any]:
    """What callers are told of a bundle."""
    version = one.current
    return {
        "model": version.manifest.model,
        "step": version.manifest.step,
        "version": version.label,
        "former": None if one.former is None else one.former.label,
        "operations": [operation for operation in OPERATIONS if operation not in version.refused],
        "columns": {
            part: [column_facts(column) for column in reader.columns.values()]
            for part, reader in version.readers.items()
        },
        "examples": version.examples,
    }


def _check_admin(settings: Settings) -> None:
    """Changing what is served takes a token, also on loopback."""
    if settings.token is None:
        raise RequestError(
            "start the server with --token-env NAME for this; or send it SIGHUP, or start it with --watch", 403
        )


def _labels(request: Request, serving: Serving) -> tuple[str, str]:
    """The bundle and operation of a request, as far as there are such."""
    path = request.url.path.strip("/").split("/")
    name = path[1] if len(path) == 3 and path[1] in serving.served else ""
    if len(path) == 1 and len(serving.served) == 1:
        name = next(iter(serving.served))
    return (name, path[-1]) if path[-1] in OPERATIONS else ("", "other")
