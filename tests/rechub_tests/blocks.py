"""The blocks of code in the documentation, the commands in them, and which of them no test runs.

PYTHONPATH=tests .venv/bin/python -m rechub_tests.blocks    # what runs them, and what is not run, with the reason
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rechub_tests.unrun import BLOCKS, CHECKED, COMMANDS, PROGRAMS, RUN_BY

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "examples/**/*.md")
SHELLS = ("sh", "bash", "console")
EVERYWHERE = "tests/distributed/test_documented_commands.py"
_BLOCK = re.compile(r"^([ \t]*)(`{3,})([^\n]*)\n(.*?)^\1\2[ \t]*$", re.MULTILINE | re.DOTALL)
_SETTING = re.compile(r"\w+=.*", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """What stands between two lines of backticks; `line` is that of the first."""

    page: str
    line: int
    language: str
    text: str

    @property
    def is_shell(self) -> bool:
        return self.language in SHELLS

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a block: as it is written, perhaps on several lines, and in words, without its comment."""

    block: Block
    text: str
    words: tuple[str, ...]

    @property
    def is_setting(self) -> bool:
        """Of a variable, for the commands after it."""
        return _SETTING.fullmatch(self.words[-1]) is not None and len(self.words) <= 1 + (self.words[0] == "export")


def pages() -> list[str]:
    """Paths in the checkout; the page of all commands is the last, since it repeats those of others."""
    found = [path.relative_to(ROOT).as_posix() for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    return sorted(found, key=lambda page: page == "docs/commands.md")


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[3].strip(), found[4])
        for found in _BLOCK.finditer(text)
    ]


def every_block() -> list[Block]:
    return [block for page in pages() for block in blocks(page)]


def commands(block: Block) -> Iterator[Command]:
    """Those of a shell block; what a backslash or an open quote goes on with belongs to the line before."""
    lines: list[str] = []
    for line in block.text.splitlines():
        lines.append(line)
        text = "\n".join(lines)
        try:
            words = () if line.endswith("\\") else in_words(text)
        except ValueError:
            continue
        if words:
            yield Command(block, text.strip(), words)
        if words or not line.endswith("\\"):
            lines = []
    assert not lines, f"{block.name} ends within a command"


def in_words(command: str) -> tuple[str, ...]:
    return tuple(shlex.split(command.replace("\\\n", " "), comments=True))


def own_test(block: Block) -> str | None:
    """The test that runs this very block, other than the one that runs all that is left."""
    fitting = (test for page, start, test in RUN_BY if page == block.page and begins(block, start))
    return next(fitting, None)


def reason(command: Command) -> str | None:
    """Why no test runs a command; None if one does."""
    for page, start, why in COMMANDS:
        if page == command.block.page and command.text.startswith(start):
            return why
    return PROGRAMS.get(command.words[0])


def unrun(block: Block) -> str | None:
    """Why no test runs a block that is not of commands; None if one does."""
    return next((why for page, start, why in BLOCKS if page == block.page and begins(block, start)), None)


def checked(block: Block) -> str | None:
    """What a block that nobody can run is compared with."""
    fitting = (what for page, language, what in CHECKED if language == block.language and Path(block.page).match(page))
    return next(fitting, None)


def begins(block: Block, start: str) -> bool:
    """Whether a block begins with a text; any block of a shell if it is empty."""
    return block.text.lstrip().startswith(start) if start else block.is_shell


def _listed() -> Iterator[tuple[str, str]]:
    """What becomes of each block and each command that is not run."""
    for block in every_block():
        if own_test(block):
            yield "run", block.name
        elif block.is_shell:
            reasons = [(command, reason(command)) for command in commands(block) if not command.is_setting]
            yield ("run" if all(why is None for _, why in reasons) else "run in part or not run"), block.name
            yield from ((f"command not run: {why}", f"{block.name}: {one.text}") for one, why in reasons if why)
        elif block.language == "yaml":
            yield "checked: read as configuration", block.name
        elif why := unrun(block):
            yield f"block not run: {why}", block.name
        else:
            yield f"checked: {checked(block)}" if checked(block) else "run", block.name


if __name__ == "__main__":
    everything = list(_listed())
    for kind, count in sorted(Counter(kind for kind, _ in everything).items()):
        print(f"{count:4d}  {kind}")
        if "not run" in kind:
            print("".join(f"          {name.splitlines()[0]}\n" for what, name in everything if what == kind), end="")
