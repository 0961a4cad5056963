"""The addresses on which processes listen, as the kernel's tables have them."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_LISTEN = "0A"  # the state of a socket in /proc/net/tcp


def listening(pid: int) -> set[tuple[str, int]]:
    """(address, port) of every listening TCP socket of a process and its descendants."""
    inodes = {inode for process in _tree(pid) for inode in _sockets(process)}
    found = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path("/proc/net", table).read_text(encoding="ascii").splitlines()[1:]:
                words = line.split()
                if words[3] == _LISTEN and words[9] in inodes:
                    address, port = words[1].split(":")
                    found.add((_address(address), int(port, 16)))
    return found


def others_reach(sockets: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """Those that other hosts can reach."""
    return {(address, port) for address, port in sockets if not ipaddress.ip_address(address).is_loopback}


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text(encoding="ascii").split():
                yield from _tree(int(child))


def _sockets(pid: int) -> Iterator[str]:
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                target = os.readlink(descriptor)
                if target.startswith("socket:["):
                    yield target[8:-1]


def _address(text: str) -> str:
    """The kernel writes addresses as 32-bit words in the host's byte order."""
    words = (int(text[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(text), 8))
    found = ipaddress.ip_address(b"".join(words))
    mapped = getattr(found, "ipv4_mapped", None)  # an IPv6 socket that serves IPv4 as well
    return str(mapped or found)
