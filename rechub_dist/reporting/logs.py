"""Log files, one per rank."""

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
# Outside a run there is no log; messages are reported in other ways.
LOGGER.addHandler(logging.NullHandler())
LOGGER.propagate = False


class _Log(WatchedFileHandler):
    """A log file that is recreated, with its folder, if somebody deletes it."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # messages are reported elsewhere as well
            Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            super().emit(record)


class _Lines(JsonFormatter):
    """Writes JSON lines, in which secrets are hidden: a client library may log an address, or an exception show one."""

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        found = super().process_log_record(log_data)
        return {name: redacted(value) if isinstance(value, str) else value for name, value in found.items()}


def log_to(folder: Path, rank: int, *, json_lines: bool = False) -> None:
    """Write this process's log, including warnings of Python and libraries, to `folder/rank-<rank>.jsonl`.

    Each line is a JSON object with `time` (ISO 8601), `level`, `logger`, `rank`, `host` and `message`, and `exc_info`
    for exceptions. With RECHUB_DEBUG in the environment everything goes to stderr as well.

    Args:
        folder: created if missing.
        rank: of this process.
        json_lines: on the main rank, also write our own messages to stderr as JSON lines.

    Raises:
        OSError: the folder cannot be created.
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
    logging.raiseExceptions = False  # on a full disk; messages are reported elsewhere as well
    warnings.simplefilter("default")
    debug = bool(os.environ.get("RECHUB_DEBUG"))
    if debug or (json_lines and rank == 0):
        console = logging.StreamHandler(sys.stderr)
        console.setFormatter(formatter)
        (root if debug else LOGGER).addHandler(console)
