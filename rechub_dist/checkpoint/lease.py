"""Leases on a run's folders: only one process at a time may write them, and it proves with heartbeats that it is alive.

A lease is a small file `<generation>.json` in the folder's `.lease/`. Its holder regularly rewrites it with an
incremented counter; a contender watches the counter by its own clock, so that no two clocks are compared. To take over,
a contender creates the file of the next generation, which only one process can do, and deletes the previous one. The
previous holder notices that before it publishes anything.

On mounted file systems, including NFS, the file is created exclusively (O_EXCL). Arrow's object store clients have no
conditional writes: there each contender writes a file under its own name, lists the folder, and withdraws if it finds
another file of this generation. Since listings show earlier writes, at most one of two contenders stays.
"""

from __future__ import annotations

import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Final, NamedTuple, TypeVar

from rechub_dist.checkpoint.folder import Folder
from rechub_dist.checkpoint.holder import Holder, as_bytes, parsed, this_launch, this_process
from rechub_dist.config import RunConfig, StorageConfig
from rechub_dist.data.parquet.storage import join
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.errors import UserError, one_line
from rechub_dist.reporting.logs import LOGGER
from rechub_dist.skips import BadFileError

T = TypeVar("T")

FOLDER: Final = ".lease"
_NAME = re.compile(r"(\d{8})(-[0-9a-f]+)?\.json")
_BEATS = 12  # heartbeats per lease duration
_LOOK_SECONDS = 0.5  # between checks of another process's lease


class LostError(UserError):
    """Another process has taken the folder over."""


class _Seen(NamedTuple):
    """A lease of the newest generation, as read; `holder` is None if it cannot be parsed."""

    place: int
    name: str
    data: bytes
    holder: Holder | None


class Lease:
    """The lease on a run's output folder and checkpoint folder.

    Inactive until `take`; then a thread of the main rank writes heartbeats until `release`.

    Attributes:
        stopping: returns whether this run was asked to stop; contenders then wait for it.
    """

    stopping: Callable[[], bool]

    def __init__(self, config: RunConfig, rt: Runtime, *, take_over: bool = False) -> None:
        self._rt = rt
        self.stopping = lambda: False
        self._seconds = config.distributed.lease_seconds
        self._take_over = take_over
        self._wanted = (
            ("output_dir", str(config.output_dir), StorageConfig()),
            ("checkpoint.folder", config.checkpoint_folder, config.checkpoint_storage),
        )
        self._places: list[_Place] = []
        self._own: Holder | None = None
        self._ended: set[str] = set()  # tokens of holders known to have ended
        self._seen: list[_Seen] = []
        self._looked = 0.0
        self._watched: dict[tuple[int, str], tuple[bytes, float]] = {}
        self._said: set[str] = set()
        self._lost: LostError | None = None
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Take the lease, waiting if it is unknown whether its holder is alive. Writes nothing before that.

        Collective: call on every rank. The lease is free at once if its holder released it, is known to have ended (on
        the host of one of these ranks), or is an earlier attempt of the same launch; otherwise once it has expired.

        Raises:
            UserError: on all ranks: the holder is alive, or a folder cannot be written.
        """
        self._rt.from_main(self._open)
        while True:
            self._seen = self._rt.from_main(self._look)
            dead = [found.holder.token for found in self._seen if found.holder is not None and found.holder.is_dead()]
            self._ended |= set(self._rt.gather_list(dead))
            if self._rt.from_main(self._try):
                break
        if self._rt.is_main:
            self._thread = threading.Thread(target=self._show_life, name="rechub-dist-lease", daemon=True)
            self._thread.start()

    def check(self) -> None:
        """Check on the main rank that the lease is still held; does nothing on other ranks. Ignores store failures.

        Raises:
            LostError: another process has taken over, or the lease was released.
        """
        try:
            self.fence()
        except LostError:
            raise
        except (OSError, UserError):
            pass  # the store fails: `fence` checks again before publishing

    def fence(self) -> None:
        """As `check`, but also fails if the store does: call before publishing anything.

        Raises:
            LostError: as `check`.
            UserError, OSError: the store fails.
        """
        if self._own is None:
            return
        with self._lock:
            if self._lost is None:
                try:
                    for place in self._places:
                        place.verify(self._own)
                except LostError as error:
                    self._lost = error
            if self._lost is not None:
                raise self._lost

    def guard(self, items: Iterator[T]) -> Iterator[T]:
        """Yield the items while the lease is held.

        Raises:
            LostError: as `check`. The store is queried only after a long pause between items, for example because the
                process was stopped; otherwise the heartbeat thread detects the loss.
        """
        last = _now()
        for item in items:
            if self._lost is not None:
                raise self._lost
            if _now() - last > self._seconds / 2:
                self.check()
            last = _now()
            yield item

    def release(self) -> None:
        """Release the lease at the end of a run, even if `take` failed. Not collective."""
        self._end.set()
        if self._thread is None or self._own is None:
            return
        self._thread.join(timeout=self._seconds)
        with self._lock, suppress(OSError, UserError):
            if self._lost is None:
                self._lost = LostError(f"{self._wanted[0][0]}: the lease was released")
                for place in self._places:
                    place.write(replace(self._own, released=True))

    def _open(self) -> None:
        self._own = this_process(self._seconds)
        found = {_known_as(address): _Place(what, address, settings) for what, address, settings in self._wanted}
        self._places = list(found.values())

    def _look(self) -> list[_Seen]:
        """Read all leases of the newest generation, on the main rank."""
        if self._looked:
            time.sleep(_LOOK_SECONDS * random.uniform(0.5, 1.5))
        self._looked = _now()
        return [found for number, place in enumerate(self._places) for found in place.look(number)]

    def _try(self) -> bool:
        """Try to take the lease, on the main rank; returns whether it succeeded.

        Raises:
            UserError: the holder is alive.
        """
        own, seen = self._own, self._seen
        assert own is not None
        if self._take_over:  # from the current holders only, not from later ones
            self._ended |= {found.holder.token if found.holder else found.name for found in seen}
            self._take_over = False
        free = [self._is_free(found) for found in seen]  # evaluate all, so that each is watched from the first check
        if not all(free):
            return False
        claimed: list[_Place] = []
        try:
            for number, place in enumerate(self._places):
                if not place.claim(own, [found.name for found in seen if found.place == number]):
                    return False  # another contender was faster
                claimed.append(place)
        finally:
            if len(claimed) < len(self._places):
                for place in claimed:
                    place.write(replace(own, released=True))
        return True

    def _is_free(self, seen: _Seen) -> bool:
        holder, place = seen.holder, self._places[seen.place]
        token = holder.token if holder else seen.name
        if token in self._ended or (holder and (holder.released or (holder.launch and holder.launch == this_launch()))):
            return True
        # Measured from after the first check to before this one, so that a pause of this process does not count.
        before, since = self._watched.setdefault((seen.place, seen.name), (seen.data, _now()))
        silent = self._looked - since
        who = f"process {holder.pid} on {holder.host}, since {holder.since}" if holder else "an unknown process"
        seconds = holder.seconds if holder else self._seconds
        if seen.data != before and holder and holder.stopping:
            self._watched[seen.place, seen.name] = (seen.data, _now())
            self._say(
                token, f"{place.what}: {place.address} is held by {who}; it is about to save and end, waiting for it"
            )
            return False
        if seen.data != before:
            raise UserError(
                f"{place.what}: {place.address} is in use by {who}; it is alive (its lease expires after {seconds:g} s "
                f"without a heartbeat): stop it, choose another {place.what}, or take the folder over with --take-over"
            )
        if 1.5 * seconds / _BEATS < silent < seconds:
            until = datetime.now().astimezone().timestamp() + seconds - silent
            at = datetime.fromtimestamp(until).strftime("%H:%M:%S")
            self._say(
                token,
                f"{place.what}: {place.address} is held by {who}, without a heartbeat now; this run begins at {at}, "
                f"when its lease expires after {seconds:g} s; --take-over does not wait",
            )
        return silent >= seconds

    def _say(self, token: str, message: str) -> None:
        """Print a line about a holder to stderr, once."""
        if token not in self._said:
            self._said.add(token)
            print(message, file=sys.stderr, flush=True)

    def _show_life(self) -> None:
        assert self._own is not None
        while not self._end.wait(self._seconds / _BEATS):
            try:
                self.fence()
                self._own = replace(self._own, beat=self._own.beat + 1, stopping=self.stopping())
                for place in self._places:
                    place.write(self._own)
            except LostError:
                return  # reported by the next step or save
            except Exception as error:
                # Whatever the store's client raises: harmless as long as no other process wants the folder.
                LOGGER.warning("the lease's heartbeat could not be written: %s", one_line(error))


class _Place:
    """A folder with a lease; `what` is the run file's key for it."""

    def __init__(self, what: str, address: str, settings: StorageConfig) -> None:
        self.what = what
        self._folder = Folder(join(_known_as(address), FOLDER), settings)
        self.address = address
        self._name = ""

    def look(self, number: int) -> list[_Seen]:
        """The leases of the newest generation; several if contenders race on an object store."""
        try:
            names = self._names()
        except BadFileError:
            names = []  # a problem with the folder is reported on writing
        newest = max(map(_generation, names), default=0)
        found = []
        for name in names:
            if _generation(name) == newest:
                with suppress(UserError):  # deleted meanwhile
                    data = bytes(self._folder.read(name))
                    found.append(_Seen(number, name, data, parsed(data)))
        return found

    def claim(self, holder: Holder, before: list[str]) -> bool:
        """Create the lease of the generation after `before`; False if another contender was faster.

        Raises:
            UserError: the folder cannot be written.
        """
        generation = 1 + max(map(_generation, before), default=0)
        name = f"{generation:08d}{'' if self._folder.local else f'-{holder.token}'}.json"
        try:
            if not self._folder.create(name, as_bytes(holder)):
                return False
            names = self._names()
            if any(_generation(other) >= generation for other in names if other != name):
                self._folder.delete(name)
                return False
            for other in names:
                if other != name:
                    self._folder.delete(other)
        except UserError:
            raise
        except Exception as error:  # whatever the store's client raises
            reason = (isinstance(error, OSError) and error.strerror) or one_line(error)[:300] or type(error).__name__
            where = getattr(error, "filename", None) or self.address
            raise UserError(f"{self.what}: {where} cannot be written: {reason}; choose another folder") from error
        self._name = name
        return True

    def verify(self, holder: Holder) -> None:
        """Check that the lease is still held; a lease that was deleted, perhaps with its folder, is created again.

        Raises:
            LostError: another process holds it.
            UserError, OSError: the store fails.
        """
        names = self._names()
        others = [name for name in names if name != self._name and _generation(name) >= _generation(self._name)]
        if not others and self._is_there(names):
            return
        if not others and self.claim(holder, [*names, self._name]):
            return
        taken = next((found.holder for found in self.look(0) if found.name != self._name), None)
        by = f"process {taken.pid} on {taken.host} since {taken.since}" if taken else "another process"
        raise LostError(
            f"{self.what}: {self.address} was taken over by {by}, after this run missed its heartbeats or with "
            "--take-over; this run ends without saving, and the other one resumes from the last checkpoint"
        )

    def write(self, holder: Holder) -> None:
        """Write a heartbeat, or the release."""
        self._folder.overwrite(self._name, as_bytes(holder))

    def _is_there(self, names: list[str]) -> bool:
        if not self._folder.local:
            return self._name in names
        # Opened rather than looked up: NFS contacts its server for an open, while names may be cached.
        return self._folder.is_open_to_read(self._name)

    def _names(self) -> list[str]:
        return [name for name in self._folder.files() if _NAME.fullmatch(name)]


def _known_as(address: str) -> str:
    return address if "://" in address else os.path.realpath(address)


def _generation(name: str) -> int:
    return int(name[:8])


def _now() -> float:
    """Monotonic seconds, including time while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
