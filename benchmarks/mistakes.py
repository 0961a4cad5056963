"""Mistakes by real commands, and what is said of each: `python benchmarks/mistakes.py [WORD]...`, about ten minutes.

Each is made in a folder of its own, on one rank and many on two, two commands at a time. Every one of them has to end
with exit code 2 and one line that names what is wrong. `--markdown docs/errors.md` writes them down; with words, which
choose sections by their titles, the other sections stay as they are.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
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
_AT_ONCE = 2
_HEAD = """# Mistakes, and what is said of them

`python benchmarks/mistakes.py --markdown docs/errors.md` makes each of these mistakes by a real command, in a folder of
its own, and fails if any ends otherwise than with exit code 2 and one line on stderr, without a traceback and without a
restart. Paths are relative to that folder. The seconds are those of the whole command on two busy cores, of which
Python and torch take a few to start.
"""


def main(
    words: Annotated[list[str] | None, typer.Argument(help="Words of sections' titles, or of mistakes.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables there.")] = None,
) -> None:
    """Make the mistakes; the exit code is 1 if any ends otherwise than it should."""
    with tempfile.TemporaryDirectory(prefix="mistakes-") as scratch:
        trained = train(Path(scratch) / "trained")
        found = {section.title: _made(chosen(section, words or []), Path(scratch), trained) for section in SECTIONS}
    if markdown is not None:
        markdown.write_text(document(found, markdown.read_text() if markdown.exists() else ""))
    if any(one.fault for outcomes in found.values() for one in outcomes):
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


def _made(mistakes: list[Mistake], scratch: Path, trained: Path) -> list[Outcome]:
    tasks = [(mistake, ranks) for mistake in mistakes for ranks in mistake.ranks]

    def one(task: tuple[Mistake, int]) -> Outcome:
        folder = Path(tempfile.mkdtemp(dir=scratch)) / "here"
        result = outcome(*task, folder, trained)
        shutil.rmtree(folder.parent)
        print(f"{result.seconds:5.1f} s  {result.ranks}  {result.what}: {result.line}", flush=True)
        if result.fault:
            print(f"FAULT: {result.fault}", flush=True)
        return result

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(one, tasks))


def document(found: dict[str, list[Outcome]], before: str) -> str:
    """The page with a table a section; that of a section of which not all were made is kept."""
    parts = dict(re.findall(r"^## (.*)\n\n((?:\|.*\n)+)", before, re.MULTILINE))
    for section in SECTIONS:
        outcomes = found[section.title]
        if len(outcomes) == sum(len(mistake.ranks) for mistake in section.mistakes):
            lines = ["| mistake | ranks | what is said | exit code | seconds |", "| --- | --- | --- | --- | --- |"]
            lines += [
                f"| {_cell(one.what)} | {one.ranks} | {_cell(one.line)} | {one.code} | {one.seconds:.1f} |"
                for one in outcomes
            ]
            parts[section.title] = "".join(f"{line}\n" for line in lines)
    tables = [f"## {section.title}\n\n{parts[section.title]}" for section in SECTIONS if section.title in parts]
    return "\n".join([_HEAD, *tables])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    typer.run(main)
