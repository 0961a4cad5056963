"""A part of a benchmark in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def run_alone(script: str, options: Sequence[str], log: Path, seconds: float) -> int | None:
    """Run a Python script, whose output goes to `log`; its exit code, or None if it was not done in time.

    It and whatever it has left running are ended.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, script, *options], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
