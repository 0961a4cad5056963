"""Control of a training from outside: by a process that runs it in a thread, such as a cluster framework's worker."""

from __future__ import annotations

import signal
import threading
from functools import cache
from queue import SimpleQueue
from typing import Any

from rechub_dist.distributed.process import Stop, stop_signals


class ExternalControl:
    """What such a process and the training in it share.

    Attributes:
        stop: asks the training to save and stop.
        records: what the main rank writes to metrics.jsonl, as it is written.
        ended: set while no training runs.
    """

    def __init__(self) -> None:
        self.stop = Stop()
        self.records: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self.ended = threading.Event()
        self.ended.set()

    def stop_on_signals(self) -> None:
        """Have SIGTERM and SIGHUP ask the training to stop; for the main thread, which the training does not have."""
        for number in set(stop_signals()) - {signal.SIGINT}:  # that one the framework keeps for itself
            signal.signal(number, lambda _number, _frame: self.stop.ask())


@cache
def external_control() -> ExternalControl:
    """The one of this process."""
    return ExternalControl()
