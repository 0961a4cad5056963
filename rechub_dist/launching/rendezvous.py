"""The rendezvous store of a run: its address, whether this host keeps it, and what listens there."""

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

_DEFAULT_ROUTE = ("198.51.100.1", "2001:db8::1")  # addresses for documentation: nothing is sent there
_CONNECT_SECONDS = 3.0
_RETRY_SECONDS = 1.0  # between two looks for a store that is to come
_ANSWER_SECONDS = 20.0  # for a rendezvous store to answer; another service may never do


class UnknownHostError(UserError):
    """A host's name stands for no address here."""


def parse_address(rendezvous: str) -> tuple[str, int]:
    """Host and port of HOST:PORT, HOST or [IPv6]:PORT.

    Raises:
        UserError: it is neither.
    """
    try:
        parts = urlsplit(f"//{rendezvous}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.path or parts.query or parts.username:
        raise UserError(f"--rdzv {rendezvous}: write HOST:PORT, an IPv6 address in brackets: [fd00::1]:{RENDEZVOUS}")
    return host, RENDEZVOUS if port is None else port


def addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
    """What a host's name stands for here: address family and address, in the order in which they are tried.

    Raises:
        UnknownHostError: nothing.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise UnknownHostError(f"--rdzv: the host {host!r} is not known here: {error.strerror}") from error
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


def is_here(host: str, port: int) -> bool:
    """Whether a host's name or address is this host's: a socket can be bound to it, to 127.0.1.1 as well."""
    for family, address in addresses(host, port):
        with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
            return True
    return False


def listens(host: str, port: int) -> bool:
    """Whether a rendezvous store listens there already.

    Raises:
        UserError: something else does.
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
                f"--rdzv: what listens on port {port} of {host} is no rendezvous store; choose another port, the same "
                f"on all hosts, or end that service"
            )
        return True
    return False


def await_rendezvous(host: str, port: int, seconds: float) -> None:
    """Wait until it is known who keeps the rendezvous store: the name is this host's own, or a store listens there.

    For hosts that start in any order under names that are known only once their host runs. Returns after `seconds`
    whatever is there.

    Raises:
        UserError: what listens is no rendezvous store.
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
    """Whether it returns in time. It has a thread of its own: torch waits for a service that says nothing for ever."""
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
    """Without stderr: torch's own account of a failed connection is a page of addresses."""
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
    """The network interface and address by which this host reaches the rendezvous store, and so the other hosts.

    A host's own name often stands for an address that others cannot reach, or for none.

    Args:
        host: of the store.
        port: of the store.
        others: whether there are other hosts: then a loopback address is of no use to them.

    Returns:
        None for each where it cannot be told.

    Raises:
        UserError: the store has a name that does not resolve.
    """
    for family, address in addresses(host, port):
        local = _source_address(family, address, port or 1)
        if local is not None and others and (local.startswith("127.") or local == "::1"):
            local = _source_address(family, _DEFAULT_ROUTE[family == socket.AF_INET6], 1)
        if local is not None:
            return _interface_of(local), local
    return None, None


def _source_address(family: socket.AddressFamily, address: str, port: int) -> str | None:
    """This host's own address for packets to another one."""
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
    """A rendezvous store of this process on `port`; 0 for any.

    Raises:
        UserError: the port is taken, or must not be used.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            why = "something listens there already" if error.errno == errno.EADDRINUSE else error.strerror
            raise UserError(f"--port {port}: {why}; choose another one") from error
    return dist.TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False)
