"""The files of `rechub-dist examples`: run files, schemas, plans, spaces, and the scripts and manifests of launch/."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rechub_dist.errors import UserError, nearest

_PACKAGE = Path(__file__).parents[1]
_CONFIGS = _PACKAGE / "configs"
_KINDS = {"runs": "run files", "spaces": "search spaces", "datasets": "schemas", "plans": "plans of imports"}


def list_examples(console: Console) -> None:
    """Print the files by kind, each with its leading comment."""
    for kind, title in _KINDS.items():
        table = Table("file", "", title=title, title_justify="left")
        for file in sorted((_CONFIGS / kind).glob("*.yaml")):
            lines = file.read_text(encoding="utf-8").splitlines()
            comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
            table.add_row(f"{kind}/{file.stem}", " ".join(line.removeprefix("# ") for line in comment))
        console.print(table)


def read_example(name: str) -> str:
    """Return a file's text. `name` is `runs/deepfm_synthetic`, or just `deepfm_synthetic` for a run file.

    Raises:
        UserError: there is no such file.
    """
    known = {f"{kind}/{file.stem}": file for kind in _KINDS for file in (_CONFIGS / kind).glob("*.yaml")}
    wanted = name.removesuffix(".yaml").removeprefix("configs/")
    file = known.get(wanted) or known.get(f"runs/{wanted}")
    if file is None:
        short = [key.removeprefix("runs/") for key in known]
        raise UserError(f"{name}: no such example; {nearest(wanted, short)}")
    return file.read_text(encoding="utf-8")


def copy_examples(out: Path) -> None:
    """Copy configs/ and the non-Python files of launch/ (shell, Slurm, Kubernetes) to a new or empty folder.

    Raises:
        UserError: `out` is not empty, or not a folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists already; name a new or empty folder")
    python = shutil.ignore_patterns("*.py", "__pycache__")
    for name in ("configs", "launch"):
        shutil.copytree(_PACKAGE / name, out / name, ignore=python)
