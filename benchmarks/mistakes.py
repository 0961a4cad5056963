"""Mistakes by real commands, and what is said of each: `python benchmarks/mistakes.py [WORD]...`, about twenty minutes.

Each is made in a folder of its own, on one rank and many on two, one command after the other. Every one of them has to
end with exit code 2 and one line that names what is wrong. `--markdown docs/errors.md` writes them down; with words,
which choose sections by their titles or mistakes by theirs, the other rows stay as they are.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from mistaken.of_checkpoints import CHECKPOINTS
from mistaken.of_commands import COMMANDS
from mistaken.of_data import DATA
from mistaken.of_places import PLACES
from mistaken.of_run_files import RUN_FILES
from mistaken.scene import Mistake, Outcome, Scene, Section, outcome

SECTIONS = (RUN_FILES, DATA, PLACES, CHECKPOINTS, COMMANDS)
_COLUMNS = ("| mistake | ranks | what is said | exit code | seconds |", "| --- | --- | --- | --- | --- |")
_HEAD = """# Mistakes, and what is said of them

`python benchmarks/mistakes.py --markdown docs/errors.md` makes each of these mistakes by a real command, in a folder of
its own, and fails if any ends otherwise than with exit code 2 and one line on stderr, without a traceback and without a
restart. Paths are relative to that folder. The seconds are those of the whole command on two cores, of which Python and
torch take a few to start.
"""


def main(
    words: Annotated[list[str] | None, typer.Argument(help="Words of sections' titles, or of mistakes.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables there, row by row.")] = None,
) -> None:
    """Make the mistakes; the exit code is 1 if any ends otherwise than it should."""
    page = Page(markdown)
    tasks = [(one, ranks) for section in SECTIONS for one in chosen(section, words or []) for ranks in one.ranks]
    faults = 0
    with tempfile.TemporaryDirectory(prefix="mistakes-") as scratch:
        trained = train(Path(scratch) / "trained")
        for mistake, ranks in tasks:
            folder = Path(tempfile.mkdtemp(dir=scratch)) / "here"
            result = outcome(mistake, ranks, folder, trained)
            shutil.rmtree(folder.parent)
            print(f"{result.seconds:5.1f} s  {result.ranks}  {result.what}: {result.line}", flush=True)
            if result.fault:
                print(f"FAULT: {result.fault}", flush=True)
            faults += result.fault is not None
            page.add(result)
    if faults:
        raise typer.Exit(1)


def chosen(section: Section, words: list[str]) -> list[Mistake]:
    """The mistakes of a section that words choose: all, by its title, or some, by what they are."""
    if not words or any(word in section.title for word in words):
        return section.mistakes
    return [mistake for mistake in section.mistakes if any(word in mistake.what for word in words)]


def train(folder: Path) -> Path:
    """The output folder of a run that was trained, for scenes to copy."""
    scene = Scene(folder, None)
    subprocess.run([sys.executable, "-m", "rechub_dist", "train", "run.yaml"], cwd=folder, check=True)
    return scene / "out"


class Page:
    """The page with a table a section; rows of mistakes that are not made now stay as they are."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows = rows_of(path.read_text()) if path is not None and path.exists() else {}

    def add(self, one: Outcome) -> None:
        """Put in what came of a mistake; all others stay listed, with what came of them last."""
        cells = (cell(one.what), str(one.ranks), cell(one.line), str(one.code), f"{one.seconds:.1f}")
        self._rows[cells[0], cells[1]] = f"| {' | '.join(cells)} |"
        if self._path is not None:
            self._path.write_text(self._text())

    def _text(self) -> str:
        parts = [_HEAD]
        for section in SECTIONS:
            keys = [(cell(mistake.what), str(ranks)) for mistake in section.mistakes for ranks in mistake.ranks]
            lines = [*_COLUMNS, *(self._rows.get(key, f"| {key[0]} | {key[1]} | | | |") for key in keys)]
            parts.append(f"## {section.title}\n\n" + "".join(f"{line}\n" for line in lines))
        return "\n".join(parts)


def rows_of(text: str) -> dict[tuple[str, str], str]:
    """The rows of all tables of a page, by mistake and number of ranks."""
    rows = (line for line in text.splitlines() if line.startswith("| "))
    return {(row[1].strip(), row[2].strip()): line for line in rows if (row := re.split(r"(?<!\\)\|", line))}


def cell(text: str) -> str:
    """A text as it stands in a table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    typer.run(main)
