"""docs/commands.md has every command, as the code has it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from rechub_dist.cli.command_page import page

TEXT = (Path(__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")


def test_the_page_is_what_the_code_says() -> None:
    assert page() + "\n" == TEXT, "python -m rechub_dist.cli.command_page > docs/commands.md"


def test_it_has_the_options_that_help_has() -> None:
    line = [sys.executable, "-m", "rechub_dist", "train", "--help"]
    told = subprocess.run(line, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"}).stdout
    section = TEXT.partition("\n## rechub-dist train\n")[2].partition("\n## ")[0]
    options = r"(?<![\w-])--[a-z][a-z-]*"
    assert set(re.findall(options, section)) | {"--help"} == set(re.findall(options, told))
