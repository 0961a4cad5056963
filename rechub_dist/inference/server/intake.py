"""Takes requests in: who may, how much of it, and in which form."""

from __future__ import annotations

import asyncio
import hmac
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

from starlette.requests import Request

from rechub_dist.errors import shown
from rechub_dist.inference.server.arrow import STREAM
from rechub_dist.inference.server.requests import JSON, RequestError
from rechub_dist.inference.server.settings import BODY_SECONDS, Settings

DEADLINE_HEADER: Final = "X-Rechub-Deadline-Ms"


class Intake:
    """Counts what is in the server, and refuses what is too much.

    Attributes:
        requests: in the server now.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.requests = 0
        self._bytes = 0

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """The request's body; it counts as in the server until the block ends.

        Raises:
            RequestError: it is too large (413), too slow (408), or the server is full (503).
        """
        most, held = self._settings.max_bytes, 0
        if self.requests >= self._settings.queue:
            raise RequestError(
                f"{self.requests} requests wait already, which is all that may; try again in a second", 503
            )
        if int(request.headers.get("content-length", 0)) > most:
            raise _too_large(most)
        self.requests += 1
        try:
            pieces = []
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    if self._bytes + len(piece) > self._settings.memory:
                        raise RequestError(
                            "the bodies of waiting requests take all memory that they may; try again", 503
                        )
                    held += len(piece)
                    self._bytes += len(piece)
                    if held > most:
                        raise _too_large(most)
                    pieces.append(piece)
            yield b"".join(pieces)
        except TimeoutError:
            raise RequestError(f"the body did not come within {BODY_SECONDS:.0f} seconds", 408) from None
        finally:
            self.requests -= 1
            self._bytes -= held


def check_caller(headers: Mapping[str, str], settings: Settings) -> None:
    """Refuse who has no token, and, where none is asked for, what a browser sends that was led here by another name.

    Raises:
        RequestError: 401 or 403.
    """
    if settings.token is not None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # compared as bytes: strings that are not ASCII cannot be compared in constant time
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), settings.token.encode()):
            raise RequestError("a token is needed: Authorization: Bearer TOKEN", 401)
    elif settings.trusted_hosts:
        host = headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name not in settings.trusted_hosts:
            raise RequestError(
                f"the host is {name!r}, and without a token only {settings.trusted_hosts[0]} is answered", 403
            )


def media_of(headers: Mapping[str, str]) -> tuple[str, str]:
    """The media types of the body and of the answer: JSON or Arrow.

    Raises:
        RequestError: the body is of another one (415), or encoded.
    """
    media = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media not in (JSON, STREAM):
        raise RequestError(f"Content-Type is {media!r}; send {JSON} or {STREAM}", 415)
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError("Content-Encoding: send the body as it is", 415)
    accepted = headers.get("accept", "").lower()
    wanted = [kind for kind in (JSON, STREAM) if kind in accepted]
    return media, wanted[0] if len(wanted) == 1 else media


def deadline_of(headers: Mapping[str, str], settings: Settings) -> float | None:
    """The seconds that a request has: those of the server, or fewer if the caller says so; None for any number.

    Raises:
        RequestError: what the caller says is no number of milliseconds.
    """
    text = headers.get(DEADLINE_HEADER)
    if text is None:
        return settings.deadline
    try:
        found = float(text) / 1000
    except ValueError:
        found = 0.0
    if not 0 < found < math.inf:
        raise RequestError(f"{DEADLINE_HEADER} is {shown(text)}; give milliseconds, as a number above 0", 400)
    return found if settings.deadline is None else min(found, settings.deadline)


def _too_large(most: int) -> RequestError:
    return RequestError(f"the body is larger than {most} bytes; send several requests", 413)
