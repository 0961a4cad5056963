"""Heartbeat for liveness probes: a file that is touched while this rank makes progress."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

_SECONDS = 5.0


class Health:
    """Context manager that touches `folder/rank-<rank>` every five seconds while `is_healthy()` is true.

    It uses a thread of its own, since touching may hang with the file system.
    """

    def __init__(self, folder: Path, rank: int, is_healthy: Callable[[], bool]) -> None:
        self._file = folder / f"rank-{rank}"
        self._is_healthy = is_healthy
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="rechub-dist-health", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def _run(self) -> None:
        while True:
            if self._is_healthy():
                with suppress(OSError):  # a full disk must not end the rank
                    self._file.parent.mkdir(parents=True, exist_ok=True)
                    self._file.touch()
            if self._end.wait(_SECONDS):
                return
