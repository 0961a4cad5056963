"""Exit codes, signals that ask this process to stop, its end when its agent dies, and its garbage collector.

Imports nothing heavy, as it is needed before torch is loaded.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

MISTAKE: Final = 2  # a user's: never restarted
STALLED: Final = 3  # ended by the watchdog
PREEMPTED: Final = 75  # of a worker that saved and stopped on request; for the command see `preempted_exit_code`
AGENT_PID: Final = "RECHUB_AGENT_PID"  # environment variable of the workers of our own agent
LAUNCH: Final = "RECHUB_LAUNCH"  # environment variable: the same for all attempts of one launcher, on all hosts

_SAME_REQUEST_SECONDS = 1.0  # the terminal's signal and the agent's copy of it are one request


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a run to save and stop: SIGTERM, SIGINT and, unless it is ignored (nohup), SIGHUP."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT, *(() if ignored else (signal.SIGHUP,)))


class Terminal:
    """The terminal on this process's standard streams, if any: once it is closed, printing to it fails."""

    def __init__(self) -> None:
        self._standard = [number for number in (0, 1, 2) if _is_terminal(number)]

    def leave_if_closed(self) -> None:
        """Redirect the streams to /dev/null if the terminal has been closed."""
        for number in self._standard:
            if not _is_terminal(number):
                nowhere = os.open(os.devnull, os.O_RDWR)
                os.dup2(nowhere, number)
                os.close(nowhere)


def _is_terminal(number: int) -> bool:
    try:
        return os.isatty(number)
    except OSError:
        return False


def preempted_exit_code() -> int:
    """The command's exit code when the run has stopped on request: RECHUB_PREEMPTED_EXIT_CODE, default 0.

    Schedulers that restart a run take 0 for finished, and would not restart this part of it with the others.
    """
    return int(os.environ.get("RECHUB_PREEMPTED_EXIT_CODE", "0"))


def die_with_agent() -> None:
    """Have the kernel kill this worker when the agent that started it dies, so that no orphan keeps training."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    agent = os.environ.get(AGENT_PID)
    if agent is not None and os.getppid() != int(agent):  # it died before the kernel was asked
        os._exit(1)


def quiet_libraries() -> None:
    """Silence library warnings that users can do nothing about; RECHUB_DEBUG=1 keeps them."""
    if os.environ.get("RECHUB_DEBUG"):
        return
    warnings.filterwarnings("ignore")
    for name in (None, "torchrec", "torch", "fbgemm_gpu"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Requests:
    """Counts requests to stop; signals within a second of the first are one request."""

    def __init__(self) -> None:
        self._first: float | None = None

    def note(self) -> int:
        """Note a signal. Returns 1 for the first request, 0 for a repetition of it, 2 for a further one."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            return 1
        return 2 if now - self._first > _SAME_REQUEST_SECONDS else 0


class Stop:
    """Whether this process has been asked to stop, by `ask` or, while it is `listening`, by a signal (`stop_signals`).

    The first request takes effect at the next step; a second signal ends the process at once.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._requests = Requests()

    def ask(self) -> None:
        """Request the stop; from any thread."""
        self._asked.set()

    def asked(self) -> bool:
        """Whether a stop was requested."""
        return self._asked.is_set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within the block. Does nothing outside the main thread.

        After a request the handlers stay for the life of the process: it may be repeated after training.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        terminal = Terminal()

        def ask(number: int, _frame: object) -> None:
            terminal.leave_if_closed()
            self._asked.set()
            if self._requests.note() == 2:
                sys.stderr.write(f"second {signal.Signals(number).name}: not waiting for a checkpoint\n")
                sys.stderr.flush()
                os._exit(128 + number)

        before = {number: signal.signal(number, ask) for number in stop_signals()}
        try:
            yield
        finally:
            if not self.asked():
                for number, handler in before.items():
                    signal.signal(number, handler)


@contextmanager
def settled_objects() -> Iterator[None]:
    """Within the block, Python's garbage collector passes over what there is now.

    It would look through modules and code again and again, for some hundredths of a small step.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
