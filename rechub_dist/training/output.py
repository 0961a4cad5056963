"""A run's output folder: whose it is, and the configuration in it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rechub_dist.config import RunConfig
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.errors import UserError

T = TypeVar("T")

_OURS = ("config.yaml", "metrics.jsonl")  # what a run overwrites, or cuts off, in its output folder
_MARK = "# The configuration of the run in this folder, written by rechub_dist; it can be launched again."


def _is_ours(folder: Path) -> bool:
    """Whether these files are a run's: the mark says so; earlier versions wrote both of them, and checkpoints."""
    config = folder / "config.yaml"
    if config.is_file() and config.read_text(encoding="utf-8", errors="replace").startswith(_MARK):
        return True
    return all((folder / name).exists() for name in _OURS) or any((folder / "checkpoints").glob("step-*"))


def refuse_foreign(folder: Path) -> None:
    """Refuse to overwrite, in an output folder, what no run has written."""
    there = [folder / name for name in _OURS if os.path.lexists(folder / name)]
    # To open a pipe would be to wait for who writes to it.
    foreign = [path for path in there if not path.is_file()] or ([] if _is_ours(folder) else there)
    if foreign:
        raise UserError(
            f"output_dir: {foreign[0]} is there already, and not from a run: it would be overwritten; choose another "
            f"folder, or move that file"
        )


def written(work: Callable[[], T]) -> T:
    """The result of work that writes in the output folder. Raises UserError where it cannot."""
    try:
        return work()
    except OSError as error:
        raise UserError(
            f"output_dir: {error.filename or 'a file'} cannot be written: {error.strerror or error}; move what is "
            f"there, or choose another folder"
        ) from error


def make_output(config: RunConfig, rt: Runtime) -> None:
    """The output folder with config.yaml in it, and proof that this rank can write there."""
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        probe = config.output_dir / f".writable-{secrets.token_hex(8)}"  # nobody's file
        probe.write_text("")
        probe.unlink()
        if rt.is_main:
            write_config(config)
    except OSError as error:
        raise UserError(
            f"output_dir: {config.output_dir} cannot be written: {error.strerror}; choose another folder"
        ) from error


def write_config(config: RunConfig) -> None:
    """Write the configuration into the output folder, with the mark of a run."""
    config.output_dir.mkdir(parents=True, exist_ok=True)
    temporary = config.output_dir / ".config.yaml.tmp"
    temporary.write_text(f"{_MARK}\n{config.dump()}", encoding="utf-8")
    temporary.replace(config.output_dir / "config.yaml")
