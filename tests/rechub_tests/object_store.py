"""An S3 server on loopback, and a proxy before it that fails as networks and stores do."""

from __future__ import annotations

import http.client
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import pyarrow.fs as pafs

BUCKET = "bucket"
os.environ |= {"RECHUB_SECRET_TESTS_S3_ID": "key", "RECHUB_SECRET_TESTS_S3": "secret"}
# As options of a run's storage: what is secret comes from the environment.
KEYS = {"access_key": {"env": "RECHUB_SECRET_TESTS_S3_ID"}, "secret_key": {"env": "RECHUB_SECRET_TESTS_S3"}}

Fault = Literal["503", "403", "reset", "cut", "hang", "slow"]


@contextmanager
def s3_server() -> Iterator[int]:
    """The port of a server in a process of its own, with an empty bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _await(port, process)
        filesystem(port, allow_bucket_creation=True).create_dir(BUCKET)
        yield port
    finally:
        process.kill()
        process.wait()


def filesystem(port: int, **options: Any) -> pafs.S3FileSystem:
    """A client without faults."""
    return pafs.S3FileSystem(
        endpoint_override=f"127.0.0.1:{port}",
        scheme="http",
        region="us-east-1",
        access_key="key",
        secret_key="secret",
        **options,
    )


def upload(port: int, folder: Path, key: str) -> None:
    """Put all files below `folder` into the bucket, below `key`."""
    pafs.copy_files(str(folder), f"{BUCKET}/{key}", destination_filesystem=filesystem(port))


def _await(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert process.poll() is None, "the S3 server has ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the S3 server does not start")


class FaultyProxy:
    """Passes requests on to a server; those that GET a part of an object may meet a fault.

    `plan` has the faults (None: none) of the next such requests, used up one by one; `always` is that of all further
    ones. `match` limits both to objects whose path holds it. `met` lists the faults that happened.
    """

    def __init__(self, upstream: int) -> None:
        self.plan: list[Fault | None] = []
        self.always: Fault | None = None
        self.match = ""
        self.met: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.ended = threading.Event()
        proxy = self

        class Handler(_Handler):
            pass

        Handler.proxy, Handler.upstream = proxy, upstream
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """End it, and let go of what hangs."""
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()

    def fault(self, path: str) -> Fault | None:
        """The fault of the next request, noted as met."""
        with self.lock:
            if self.match not in path:
                return None
            found = self.plan.pop(0) if self.plan else self.always
            if found:
                self.met.append(found)
            return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy
    upstream: int

    def do_GET(self) -> None:
        self._pass_on()

    def do_HEAD(self) -> None:
        self._pass_on()

    def log_message(self, *_arguments: Any) -> None:
        """Say nothing."""

    def _pass_on(self) -> None:
        self.proxy.requests.append(f"{self.command} {self.path}")
        is_read = self.command == "GET" and "Range" in self.headers
        fault = self.proxy.fault(self.path) if is_read else None
        if fault == "reset":
            # closed with unsent data thrown away: the peer sees a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        if fault in ("503", "403"):
            code = {"503": "SlowDown", "403": "AccessDenied"}[fault]
            body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self._answer(int(fault), {"Content-Type": "application/xml"}, body)
            return
        if fault == "hang":
            self.proxy.ended.wait()
            self.close_connection = True
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.upstream)
        upstream.request(self.command, self.path, headers=dict(self.headers))
        answer = upstream.getresponse()
        body = answer.read()
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in ("connection", "date")}
        upstream.close()
        if fault == "cut":
            self._answer(answer.status, headers, body[: len(body) // 2])
            self.close_connection = True
        elif fault == "slow":
            self._answer(answer.status, headers, body[:1])
            for byte in body[1:]:
                if self.proxy.ended.wait(0.05):
                    break
                self.wfile.write(bytes([byte]))
        else:
            self._answer(answer.status, headers, body)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        try:
            self.send_response_only(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
                self.wfile.flush()
        except OSError:
            self.close_connection = True
