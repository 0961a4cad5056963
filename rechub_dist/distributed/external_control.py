"""Control of a training from outside: by a process that runs it in a thread, such as a cluster framework's worker."""

from __future__ import annotations

import signal
import threading
from functools import cache
from queue import SimpleQueue
from typing import Any

from rechub_dist.distributed.process import Stop, stop_signals


class ExternalControl:
    """What the hosting process and the training share.

    Attributes:
        stop: asks the training to save and stop.
        records: the records of metrics.jsonl, on the main rank, as they are written.
        ended: set while no training runs.
    """

    def __init__(self) -> None:
        self.stop = Stop()
        self.records: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self.ended = threading.Event()
        self.ended.set()

    def stop_on_signals(self) -> None:
        """Make SIGTERM and SIGHUP ask the training to stop. Call it from the main thread: the training has another."""
        for number in set(stop_signals()) - {signal.SIGINT}:  # the framework handles that one itself
            signal.signal(number, lambda _number, _frame: self.stop.ask())


@cache
def external_control() -> ExternalControl:
    """The instance of this process, always the same."""
    return ExternalControl()
