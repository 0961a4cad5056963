"""The content of a lease: which process holds it, and whether that process is alive."""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rechub_dist.distributed.process import LAUNCH

_LENGTH: Final = 1024  # bytes of a lease: fixed, so that it is overwritten in a single write


_Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=_LENGTH)]  # what messages print
_Number = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Holder:
    """The holder of a lease.

    Attributes:
        token: unique per attempt.
        launch: shared by all attempts of one launch; None if the launcher does not set it.
        host: host name.
        boot: boot id of the host's kernel; with namespace, pid and started it identifies a process uniquely.
        namespace: inode of the PID namespace.
        pid: process id.
        started: start of the process, in clock ticks since boot.
        since: when the lease was taken, by the host's clock; for messages only.
        seconds: time without a heartbeat after which the lease expires.
        beat: heartbeat counter.
        stopping: the holder was asked to stop, and is about to save and end.
        released: the holder has released the lease.
    """

    token: _Line
    launch: str | None
    host: _Line
    boot: str
    namespace: _Number
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    started: _Number
    since: _Line
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    beat: _Number = 0
    stopping: bool = False
    released: bool = False

    def is_dead(self) -> bool:
        """Whether the process is known to have ended; only known for processes of this kernel and PID namespace."""
        if not self.boot or (self.boot, self.namespace) != _kernel():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # exists, but belongs to another user
        found = _process(self.pid)
        return found is not None and (found[0] in "ZX" or found[1] != self.started)


_HOLDER = TypeAdapter(Holder)


def as_bytes(holder: Holder) -> bytes:
    """Serialise a lease to its fixed length."""
    return json.dumps(asdict(holder)).encode().ljust(_LENGTH - 1) + b"\n"


def parsed(data: bytes) -> Holder | None:
    """Parse a lease; None if it is truncated or has the format of another version."""
    try:
        return _HOLDER.validate_json(data)
    except ValidationError:
        return None


def this_process(seconds: float) -> Holder:
    """A new lease of this process that expires after `seconds` without a heartbeat."""
    boot, namespace = _kernel()
    own = _process(os.getpid())
    return Holder(
        token=secrets.token_hex(8),
        launch=this_launch(),
        host=socket.gethostname(),
        boot=boot if own else "",
        namespace=namespace,
        pid=os.getpid(),
        started=own[1] if own else 0,
        since=datetime.now().astimezone().isoformat(timespec="seconds"),
        seconds=seconds,
    )


def this_launch() -> str | None:
    """The launch id in the environment, at most 200 characters; None if unset."""
    return os.environ.get(LAUNCH, "")[:200] or None


def _kernel() -> tuple[str, int]:
    """The kernel's boot id and the inode of the PID namespace; ('', 0) if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return "", 0


def _process(pid: int) -> tuple[str, int] | None:
    """A process's state letter and start time in clock ticks since boot; None if unknown."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return words[0], int(words[19])
