"""How a server listens, and what it takes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MIB: Final = 1 << 20
BODY_SECONDS: Final = 30.0  # within which a request's body must have come


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
        address, port: where it listens; port 0 is any free one.
        token: that requests must bring; None for none.
        trusted_hosts: names of this host that browsers may have used; empty: any.
        threads: that score.
        batch_rows: rows scored at once, more or less.
        batch_wait: seconds that an incomplete batch waits for further requests.
        queue: requests in the server at once; further ones are sent away.
        memory: bytes of the bodies of these.
        max_rows, max_bytes: of one request.
        deadline: seconds within which a request must have its answer; None: any number.
        watch: seconds between looks at the folders; None: never.
        grace: seconds that requests may go on for after SIGTERM.
    """

    address: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    trusted_hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")
    threads: int = 2
    batch_rows: int = 1024
    batch_wait: float = 0.0
    queue: int = 256
    memory: int = 256 * MIB
    max_rows: int = 4096
    max_bytes: int = 16 * MIB
    deadline: float | None = None
    watch: float | None = None
    grace: int = 30
