"""`make` as a user's shell runs it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_OF_THE_MAKEFILE = ("TORCH", "ACCELERATOR", "EXTRAS", "VENV", "PYTHON")


def make(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run make in a folder, without what the make that runs the tests hands to the makes below it."""
    given = ("MAKE", "MFLAGS", *_OF_THE_MAKEFILE)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(given)}
    return subprocess.run(
        ["make", *arguments], capture_output=True, text=True, env=environment, cwd=folder, check=False
    )
