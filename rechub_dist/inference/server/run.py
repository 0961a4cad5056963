"""Runs a server in this process until it is asked to stop."""

from __future__ import annotations

import errno
import signal
import socket
from collections.abc import Callable
from typing import Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rechub_dist.errors import UserError
from rechub_dist.inference.server.app import make_app
from rechub_dist.inference.server.serving import Serving

MOST_HEADERS: Final = 64 << 10  # bytes, of one request
_KEEP_ALIVE: Final = 75  # seconds: longer than the pools of clients and balancers keep idle connections


def serve(serving: Serving, said: Callable[[str], None]) -> None:
    """Answer requests until SIGTERM or SIGINT, then finish those that have begun.

    Args:
        serving: what is served.
        said: called with the address once the server listens.

    Raises:
        UserError: it cannot listen there.
    """
    settings = serving.settings
    config = uvicorn.Config(
        make_app(serving), http=_Bounded, ws="none", lifespan="on", log_level="warning", access_log=False,
        server_header=False, timeout_keep_alive=_KEEP_ALIVE, timeout_graceful_shutdown=settings.grace,
        proxy_headers=False,
    )  # fmt: skip
    listener = _listen(settings.address, settings.port)
    host = f"[{settings.address}]" if ":" in settings.address else settings.address
    server = _Server(config, lambda: said(f"http://{host}:{listener.getsockname()[1]}"))
    # uvicorn raises the signal anew once it has stopped, which is no failure
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run([listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not server.started:
        raise UserError("the server did not start; what it printed says why")


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        await super().startup(sockets)
        if self.started:
            self._ready()


class _Bounded(HttpToolsProtocol):
    """Closes a connection whose headers do not end."""

    _in_headers, _seen = True, 0

    def data_received(self, data: bytes) -> None:
        """As uvicorn's."""
        if self._in_headers:
            self._seen += len(data)
            if self._seen > MOST_HEADERS + len(data):
                self.transport.close()
                return
        super().data_received(data)

    def on_headers_complete(self) -> None:
        """As uvicorn's."""
        self._in_headers = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """As uvicorn's."""
        self._in_headers, self._seen = True, 0
        super().on_message_complete()


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        fix = "choose another --port" if error.errno == errno.EADDRINUSE else "give an address of this host"
        raise UserError(f"cannot listen on {address}, port {port}: {error.strerror}; {fix}") from None
    return listener
