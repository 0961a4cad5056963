"""Shared by `rechub-dist` and the entry points of launch/: common options, and error handling with exit codes."""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated

import typer

from rechub_dist.builds import what_is_missing
from rechub_dist.distributed.process import MISTAKE
from rechub_dist.errors import UserError, one_line
from rechub_dist.reporting.logs import LOGGER

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a configuration key; repeatable."),
]

AllowCode = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-code",
        metavar="MODULE",
        help="Allow importing this module, which the checkpoint names; repeatable.",
    ),
]


def is_main() -> bool:
    """Whether this process is rank 0 or not part of a distributed run."""
    return os.environ.get("RANK", "0") == "0"


def run_app(command: typer.Typer) -> int:
    """Run a command and return its exit code.

    A `UserError` or a missing package prints one line on stderr and returns 2. A collective that failed because another
    rank ended prints one line and returns 1; the other rank prints the cause.

    Raises:
        Exception: any other exception of the command.
    """
    try:
        command()
    except UserError as error:
        return _mistake(error)
    except ImportError as error:
        missing = what_is_missing(error)
        if missing is None:
            LOGGER.exception("this rank failed")
            raise
        return _mistake(missing)
    except Exception as error:
        LOGGER.exception("this rank failed")
        if not _of_another_rank(error):
            raise
        reason = one_line(error).rpartition("] ")[2].partition(". This is typically")[0]
        print(f"rank {os.environ.get('RANK', '0')}: another rank has ended ({reason})", file=sys.stderr, flush=True)
        return 1
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _mistake(error: UserError) -> int:
    LOGGER.error(error)
    if is_main():
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        # The agent ends all ranks as soon as one exits: give the main rank time to print.
        time.sleep(1.0)
    return MISTAKE


def _of_another_rank(error: Exception) -> bool:
    """Whether a collective failed. gloo raises a RuntimeError that names its source file."""
    return "/gloo/" in str(error) or any(base.__name__ == "DistError" for base in type(error).__mro__)
