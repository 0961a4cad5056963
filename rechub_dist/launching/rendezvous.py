"""The rendezvous of a run: its address, whether this host runs its store, and what listens there."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import torch.distributed as dist

from rechub_dist.errors import UserError
from rechub_dist.launching.ports import RENDEZVOUS

_DEFAULT_ROUTE = ("198.51.100.1", "2001:db8::1")  # documentation addresses: nothing is sent there
_CONNECT_SECONDS = 3.0
_RETRY_SECONDS = 1.0  # between attempts to find the rendezvous
_ANSWER_SECONDS = 20.0  # for a rendezvous store to answer; another service may never answer


class UnknownHostError(UserError):
    """A host name that does not resolve here."""


def parse_address(rendezvous: str) -> tuple[str, int]:
    """Parse HOST:PORT, HOST or [IPv6]:PORT into host and port; the default port is 29400.

    Raises:
        UserError: it is none of these.
    """
    try:
        parts = urlsplit(f"//{rendezvous}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.path or parts.query or parts.username:
        raise UserError(
            f"--rdzv {rendezvous}: write HOST:PORT, with an IPv6 address in brackets: [fd00::1]:{RENDEZVOUS}"
        )
    return host, RENDEZVOUS if port is None else port


def addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
    """Resolve a host name to (address family, address) pairs, in the order in which they are tried.

    Raises:
        UnknownHostError: it does not resolve.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise UnknownHostError(f"--rdzv: the host name {host!r} does not resolve here: {error.strerror}") from error
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


def is_here(host: str, port: int) -> bool:
    """Whether a name or address is this host's own, i.e. a socket can be bound to it, including 127.0.1.1."""
    for family, address in addresses(host, port):
        with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
            return True
    return False


def listens(host: str, port: int) -> bool:
    """Whether a rendezvous store already listens on host and port.

    Raises:
        UserError: another service listens there.
    """
    for family, address in addresses(host, port):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.settimeout(_CONNECT_SECONDS)
                probe.connect((address, port))
        except OSError:
            continue
        if not _answers(lambda: dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_ANSWER_SECONDS))):
            raise UserError(
                f"--rdzv: the service on port {port} of {host} is not a rendezvous store; choose another port, the "
                f"same on all hosts, or stop that service"
            )
        return True
    return False


def await_rendezvous(host: str, port: int, seconds: float) -> None:
    """Wait until the rendezvous name is this host's own, or a store listens there; at most `seconds`.

    For hosts that start in any order, with names that only resolve once their host is up.

    Raises:
        UserError: another service listens there.
    """
    deadline, told = time.monotonic() + seconds, False
    while time.monotonic() < deadline:
        with suppress(UnknownHostError):
            if is_here(host, port) or listens(host, port):
                return
        if not told:
            print(f"waiting for the rendezvous store at {host}:{port}", file=sys.stderr, flush=True)
            told = True
        time.sleep(_RETRY_SECONDS)


def _answers(connect: Callable[[], object]) -> bool:
    """Whether `connect` succeeds in time. It runs in a thread, since torch would wait forever for a silent service."""
    done: list[bool] = []

    def attempt() -> None:
        with suppress(RuntimeError):
            connect()
            done.append(True)

    thread = threading.Thread(target=attempt, daemon=True)
    with _silent():
        thread.start()
        thread.join(_ANSWER_SECONDS)
    return bool(done)


@contextmanager
def _silent() -> Iterator[None]:
    """Silence stderr: torch prints a page of addresses about a failed connection."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def interface(host: str, port: int, *, others: bool) -> tuple[str | None, str | None]:
    """The network interface and own address with which this host reaches the rendezvous, and so the other hosts.

    A host's own name often resolves to an address that others cannot reach, or not at all.

    Args:
        host: of the rendezvous.
        port: of the rendezvous.
        others: whether there are other hosts, so that a loopback address is of no use.

    Returns:
        (interface name, address), each None if unknown.

    Raises:
        UserError: the rendezvous name does not resolve.
    """
    for family, address in addresses(host, port):
        local = _source_address(family, address, port or 1)
        if local is not None and others and (local.startswith("127.") or local == "::1"):
            local = _source_address(family, _DEFAULT_ROUTE[family == socket.AF_INET6], 1)
        if local is not None:
            return _interface_of(local), local
    return None, None


def _source_address(family: socket.AddressFamily, address: str, port: int) -> str | None:
    """This host's source address for packets to `address`."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, port))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _interface_of(address: str) -> str | None:
    if ":" in address:
        return _interface_of_ipv6(address)
    siocgifaddr = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, siocgifaddr, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _interface_of_ipv6(address: str) -> str | None:
    wanted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            found, *_, name = line.split()
            if found == wanted:
                return name
    return None


def open_store(port: int) -> dist.TCPStore:
    """Start a rendezvous store in this process on `port`; 0 for any free port.

    Raises:
        UserError: the port is in use, or not permitted.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            why = "something listens there already" if error.errno == errno.EADDRINUSE else error.strerror
            raise UserError(f"--port {port}: {why}; choose another one") from error
    return dist.TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False)
