"""What each rank has to say, in a file of its own."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from contextlib import suppress
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from rechub_dist.redaction import redacted

LOGGER = logging.getLogger("rechub_dist")
# Outside of a run there is no log: what is to be told is told by other means.
LOGGER.addHandler(logging.NullHandler())
LOGGER.propagate = False


class _Log(WatchedFileHandler):
    """A log that is begun anew where somebody has removed it, with its folder."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # what is to be told is told elsewhere as well
            Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            super().emit(record)


class _Lines(JsonFormatter):
    """Writes JSON lines, in which secrets are hidden: a client library may log an address, or an exception show one."""

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        found = super().process_log_record(log_data)
        return {name: redacted(value) if isinstance(value, str) else value for name, value in found.items()}


def log_to(folder: Path, rank: int, *, json_lines: bool = False) -> None:
    """Write what this process logs, and warnings of Python and libraries, to `folder/rank-<rank>.jsonl`.

    A line is a JSON object of `time` (ISO 8601), `level`, `logger`, `rank`, `host` and `message`, and `exc_info` where
    there is an exception. With RECHUB_DEBUG in the environment all of it goes to stderr as well.

    Args:
        folder: made if it is missing.
        rank: of this process.
        json_lines: the main rank's own messages go to stderr as such lines, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    formatter = _Lines(
        "{asctime}{levelname}{name}{message}",
        style="{",
        datefmt="%Y-%m-%dT%H:%M:%S%z",
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        static_fields={"rank": rank, "host": socket.gethostname()},
    )
    handler = _Log(folder / f"rank-{rank}.jsonl", encoding="utf-8")
    handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in root.handlers:
        old.close()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    LOGGER.setLevel(logging.INFO)
    LOGGER.handlers, LOGGER.propagate = [], True
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # of a full disk: what is to be told is told elsewhere as well
    warnings.simplefilter("default")
    debug = bool(os.environ.get("RECHUB_DEBUG"))
    if debug or (json_lines and rank == 0):
        console = logging.StreamHandler(sys.stderr)
        console.setFormatter(formatter)
        (root if debug else LOGGER).addHandler(console)
