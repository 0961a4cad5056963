"""The HTTP application: routes, and what they have in common."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, FastAPI, Query
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from rechub_dist import __version__
from rechub_dist.errors import UserError, shown
from rechub_dist.inference.server.batching import RETRY_AFTER
from rechub_dist.inference.server.intake import check_caller
from rechub_dist.inference.server.openapi import with_bundles
from rechub_dist.inference.server.page import PAGE
from rechub_dist.inference.server.requests import RequestError
from rechub_dist.inference.server.serving import Serving, facts
from rechub_dist.inference.server.versions import MOST_ITEMS, OPERATIONS, Asked

VERSION_HEADER: Final = "X-Rechub-Version"
_PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_HEADERS: Final = {  # of answers that say no
    401: {"WWW-Authenticate": "Bearer"},
    408: {"Connection": "close"},  # the rest of the body is not read
    413: {"Connection": "close"},
    503: {"Retry-After": str(RETRY_AFTER)},
}
K = Annotated[int, Query(ge=1, le=MOST_ITEMS)]
Where = Annotated[str | None, Query(min_length=1, max_length=4096)]
Side = Annotated[Literal["user", "item"], Query()]


def make_app(serving: Serving) -> FastAPI:
    """The application of a server. Its lifespan ends the threads of `serving`."""
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

    # async, or FastAPI would call it in a thread
    async def allowed(request: Request) -> None:
        check_caller(request.headers, settings)

    guarded = [Depends(allowed)]
    app = FastAPI(
        title="rechub_dist", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )
    _answer_errors(app, serving)
    app.include_router(_open_routes(serving))
    app.include_router(_routes_of_bundles(serving), dependencies=guarded, include_in_schema=False)
    app.include_router(_routes_of_operators(serving), dependencies=guarded)

    @app.get("/openapi.json", dependencies=guarded, include_in_schema=False)
    async def description() -> dict[str, Any]:
        tree = get_openapi(title=app.title, version=app.version, routes=app.routes)
        return with_bundles(tree, serving.served.values(), token=settings.token is not None)

    return app


def _answer_errors(app: FastAPI, serving: Serving) -> None:
    """Answers to requests that get none."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        name, operation = _labels(request, serving)
        serving.metrics.requests.labels(name, operation, str(error.status)).inc()
        return JSONResponse({"detail": str(error)}, error.status, _HEADERS.get(error.status))

    @app.exception_handler(RequestValidationError)
    async def misplaced(request: Request, error: RequestValidationError) -> Response:
        found = error.errors()[0]
        text = f"{found['loc'][-1]}: {found['msg'].lower()}, got {shown(found['input'])}"
        return await refused(request, RequestError(text))

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it


def _routes_of_bundles(serving: Serving) -> APIRouter:
    """What bundles answer; `/score` and its like where there is one alone."""
    router = APIRouter()

    async def answered(request: Request, name: str | None, asked: Asked) -> Response:
        answer = await serving.answer(request, name, asked)
        bundle = name or next(iter(serving.served))
        serving.metrics.requests.labels(bundle, asked.operation, str(answer.status)).inc()
        headers = _HEADERS.get(answer.status, {})
        headers = headers if answer.version is None else {**headers, VERSION_HEADER: answer.version}
        return Response(answer.body, answer.status, headers, answer.media)

    @router.post("/score")
    @router.post("/bundles/{name}/score")
    async def score(request: Request, name: str | None = None) -> Response:
        return await answered(request, name, Asked("score"))

    @router.post("/retrieve")
    @router.post("/bundles/{name}/retrieve")
    async def retrieve(request: Request, name: str | None = None, k: K = 10, where: Where = None) -> Response:
        return await answered(request, name, Asked("retrieve", k=k, where=where))

    @router.post("/vectors")
    @router.post("/bundles/{name}/vectors")
    async def vectors(request: Request, name: str | None = None, side: Side = "user") -> Response:
        return await answered(request, name, Asked("vectors", side=side))

    return router


def _open_routes(serving: Serving) -> APIRouter:
    """What anybody may ask."""
    router = APIRouter()

    @router.get("/health", summary="Whether the process answers")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/ready", summary="Whether bundles are served, and which versions")
    async def ready() -> dict[str, dict[str, str]]:
        return {"versions": {name: one.current.label for name, one in serving.served.items()}}

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": _PAGE_POLICY})

    return router


def _routes_of_operators(serving: Serving) -> APIRouter:
    router = APIRouter()

    @router.get("/bundles", summary="What is served, and its columns")
    async def bundles() -> dict[str, Any]:
        return {name: facts(one) for name, one in serving.served.items()}

    @router.get("/metrics", summary="Metrics of Prometheus")
    async def metrics() -> Response:
        return Response(serving.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.post("/admin/reload", summary="Open the folders of bundles anew")
    async def reload(bundle: str | None = None) -> Response:
        _check_admin(serving)
        versions, failed = await serving.reload([] if bundle is None else [serving.named(bundle).name])
        return JSONResponse({"versions": versions, "failed": failed}, 409 if failed else 200)

    @router.post("/admin/rollback", summary="Answer with the version before")
    async def rollback(bundle: str | None = None) -> Response:
        _check_admin(serving)
        if bundle is None and len(serving.served) > 1:
            raise RequestError(f"there are several bundles: say ?bundle=NAME with {', '.join(serving.served)}", 404)
        one = serving.named(bundle or next(iter(serving.served)))
        try:
            return JSONResponse({"versions": {one.name: await serving.rollback(one.name)}})
        except UserError as error:
            raise RequestError(error, 409) from None

    return router


def _check_admin(serving: Serving) -> None:
    """Changing what is served takes a token, also on loopback."""
    if serving.settings.token is None:
        raise RequestError(
            "start the server with --token-env NAME for this; or send it SIGHUP, or start it with --watch", 403
        )


def _labels(request: Request, serving: Serving) -> tuple[str, str]:
    """The bundle and operation of a request, as far as there are such: nobody makes up labels of metrics."""
    path = request.url.path.strip("/").split("/")
    name = path[1] if len(path) == 3 and path[1] in serving.served else ""
    if len(path) == 1 and len(serving.served) == 1:
        name = next(iter(serving.served))
    return (name, path[-1]) if path[-1] in OPERATIONS else ("", "other")
