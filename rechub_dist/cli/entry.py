"""Shared by `rechub-dist` and the entry points of launch/: common options, and error handling with exit codes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main

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


# Click's; newer typers bring their own copy of it.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


def is_main() -> bool:
    """Whether this process is rank 0 or not part of a distributed run."""
    return os.environ.get("RANK", "0") == "0"


def run_app(command: typer.Typer) -> int:
    """Run a command and return its exit code.

    A `UserError`, a missing package, or an option or argument that the command does not have prints one line on stderr
    and returns 2: the main rank prints it, or, where not all ranks have agreed on it, the first one of each host that
    sees it. A collective that failed because another rank ended prints one line and returns 1; the other rank prints
    the cause.

    Raises:
        Exception: any other exception of the command.
    """
    try:
        # Not `command()`, which would print usage errors in a box and replace sys.excepthook.
        ended = typer.main.get_command(command)(standalone_mode=False)
    except UserError as error:
        return _mistake(error)
    except _USAGE_ERROR as error:
        return _usage(error)
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
    return ended if isinstance(ended, int) else 0  # the code of a `typer.Exit`; commands return None


def _mistake(error: UserError) -> int:
    LOGGER.error(error)
    if is_main() if error.on_all_ranks else _is_first_here():
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        # The agent ends all ranks as soon as one exits: give the rank that prints time to do so.
        time.sleep(1.0)
    return MISTAKE


def _is_first_here() -> bool:
    """Whether no other rank of this host has printed an error. A mistake that not all ranks see is told once, too."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")  # ATTEMPT/LOCAL_RANK/error.json, in a folder of the agent's
    if own is None:
        return True
    try:
        (Path(own).parents[1] / "told").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _usage(error: Any) -> int:
    message = one_line(error.format_message()).removesuffix(".")
    if not message:  # a command without arguments, whose help has been printed
        return MISTAKE
    where = f" (see {error.ctx.command_path} --help)" if error.ctx is not None else ""
    return _mistake(UserError(message + where))


def _of_another_rank(error: Exception) -> bool:
    """Whether a collective failed. gloo raises a RuntimeError that names its source file."""
    return "/gloo/" in str(error) or any(base.__name__ == "DistError" for base in type(error).__mro__)
