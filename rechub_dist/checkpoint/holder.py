"""What a lease says of the process that holds it, and what is known of a process."""

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

_LENGTH: Final = 1024  # bytes of a lease: written over in one piece


_Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=_LENGTH)]  # what messages print
_Number = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Holder:
    """What a lease says.

    Attributes:
        token: of this attempt alone.
        launch: of all attempts that one launcher starts; None where it has not said.
        boot: of the host's kernel; with the process namespace, the process and its start it names a process for good.
        started: in clock ticks since the boot.
        since: for people, by the host's own clock.
        seconds: of silence, after which it is stale.
        beat: the count that shows life.
        stopping: it was asked to stop, and is about to save and end.
        released: the holder has let go of it.
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
        """Whether its process is known to have ended: only this kernel can tell, and only of its own processes."""
        if not self.boot or (self.boot, self.namespace) != _kernel():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # another user's; it is there
        found = _process(self.pid)
        return found is not None and (found[0] in "ZX" or found[1] != self.started)


_HOLDER = TypeAdapter(Holder)


def as_bytes(holder: Holder) -> bytes:
    """A lease, as it is written."""
    return json.dumps(asdict(holder)).encode().ljust(_LENGTH - 1) + b"\n"


def parsed(data: bytes) -> Holder | None:
    """A lease, as it was read; None of what is cut short, or was written by a version that says other things."""
    try:
        return _HOLDER.validate_json(data)
    except ValidationError:
        return None


def this_process(seconds: float) -> Holder:
    """A new lease of this process, stale after so many seconds of silence."""
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
    """What the launcher of this process has named itself."""
    return os.environ.get(LAUNCH, "")[:200] or None


def _kernel() -> tuple[str, int]:
    """This boot of this host's kernel, and the namespace of the process numbers here: containers have their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return "", 0


def _process(pid: int) -> tuple[str, int] | None:
    """A process's state and start, in clock ticks since the boot; None where it cannot be told."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return words[0], int(words[19])
