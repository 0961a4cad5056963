"""What `rechub-dist` and the entry points of launch/ have in common: shared options, and how a command ends."""

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
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the run file; may be given many times."),
]

AllowCode = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-code",
        metavar="MODULE",
        help="Import this module of yours, which the checkpoint names; may be given many times.",
    ),
]


def is_main() -> bool:
    """Whether this process is rank 0, or no rank at all."""
    return os.environ.get("RANK", "0") == "0"


def run_app(command: typer.Typer) -> int:
    """Run a command; returns its exit code. A user's mistake is one line on stderr and exit code 2.

    So is a package that is not installed, and, with exit code 1, the end of another rank: what has befallen that is
    told there.
    """
    try:
        command()
    except UserError as error:
        return _mistake(error)
    except ImportError as error:
        missing = what_is_missing(error)
        if missing is None:
            LOGGER.exception("this rank fails")
            raise
        return _mistake(missing)
    except Exception as error:
        LOGGER.exception("this rank fails")
        if not _of_another_rank(error):
            raise
        reason = one_line(error).rpartition("] ")[2].partition(". This is typically")[0]
        print(f"rank {os.environ.get('RANK', '0')}: another rank is gone ({reason})", file=sys.stderr, flush=True)
        return 1
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _mistake(error: UserError) -> int:
    LOGGER.error(error)
    if is_main():
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        # The agent ends all ranks as soon as one has ended: leave the main rank the time to print.
        time.sleep(1.0)
    return MISTAKE


def _of_another_rank(error: Exception) -> bool:
    """Whether an exchange has failed; gloo says so by a RuntimeError with the place in its sources."""
    return "/gloo/" in str(error) or any(base.__name__ == "DistError" for base in type(error).__mro__)
