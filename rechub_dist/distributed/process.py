"""This process among others: its exit codes, signals that ask it to stop, and its end with that of its agent.

Imports nothing heavy: it is in force before torch is loaded.
"""

from __future__ import annotations

import ctypes
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
PREEMPTED: Final = 75  # of a worker that has saved and ended as it was asked to; the command: `preempted_exit_code`
AGENT_PID: Final = "RECHUB_AGENT_PID"  # in the environment of our own agent's workers
LAUNCH: Final = "RECHUB_LAUNCH"  # in the environment: the same for all attempts of one launcher, on all hosts

_SAME_REQUEST_SECONDS = 1.0  # a process group's signal and the agent's own of it are one request


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a run to save and stop: SIGTERM, SIGINT and, unless nohup has it ignored, SIGHUP."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT, *(() if ignored else (signal.SIGHUP,)))


class Terminal:
    """What this process prints to, if that is a terminal: when it is closed, a line to it would be an error."""

    def __init__(self) -> None:
        self._standard = [number for number in (0, 1, 2) if _is_terminal(number)]

    def leave_if_closed(self) -> None:
        """Print to nowhere from here on, if it is closed by now."""
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
    """What the command exits with when the run has stopped as it was asked to: RECHUB_PREEMPTED_EXIT_CODE, else 0.

    A scheduler that keeps a run going takes 0 for done, and would not start this part of it again with the others.
    """
    return int(os.environ.get("RECHUB_PREEMPTED_EXIT_CODE", "0"))


def die_with_agent() -> None:
    """Ask the kernel to end this worker when the agent that started it is killed, so that no orphan trains on."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    agent = os.environ.get(AGENT_PID)
    if agent is not None and os.getppid() != int(agent):  # it died before the kernel was asked
        os._exit(1)


def quiet_libraries() -> None:
    """Turn off library chatter that a user can do nothing about; RECHUB_DEBUG=1 lets it through."""
    if os.environ.get("RECHUB_DEBUG"):
        return
    warnings.filterwarnings("ignore")
    for name in (None, "torchrec", "torch", "fbgemm_gpu"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Requests:
    """Counts requests to stop; signals that come together are one."""

    def __init__(self) -> None:
        self._first: float | None = None

    def note(self) -> int:
        """Note a signal: 1 for the first request, 0 for a repetition of it, 2 for a further request."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            return 1
        return 2 if now - self._first > _SAME_REQUEST_SECONDS else 0


class Stop:
    """Whether SIGTERM, SIGINT or SIGHUP (see `stop_signals`) has asked this process to stop, while it is `listening`.

    The first request is taken up at the next step; a second one is not waited for.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._requests = Requests()

    def ask(self) -> None:
        """Ask it to stop, from any thread."""
        self._asked.set()

    def asked(self) -> bool:
        """Whether it was."""
        return self._asked.is_set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals. Only the main thread can; in another one nothing changes.

        Once asked, this goes on up to the end of the process: a repetition of the request may come after training.
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
