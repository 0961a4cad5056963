"""The commands and the Python of the documentation, page by page, in a folder with what the pages speak of.

What other tests run, and what none runs, is listed in tests/rechub_tests/unrun.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rechub_tests.blocks import ROOT, Block, Command, blocks, commands, own_test, pages, reason, unrun
from rechub_tests.serving import serving
from rechub_tests.workshop import STAGES, make_workshop, scope

pytestmark = pytest.mark.slow


def left() -> dict[str, list[Command | Block]]:
    """By page, what no other test runs; of a command on several pages the first, in each kind of folder."""
    found: dict[str, list[Command | Block]] = {}
    seen: set[tuple[str, ...]] = set()
    for page in pages():
        for block in blocks(page):
            if own_test(block) or unrun(block):
                continue
            if block.language == "python":
                found.setdefault(page, []).append(block)
            for command in commands(block) if block.is_shell else ():
                if not reason(command) and (command.words not in seen or page in STAGES):
                    found.setdefault(page, []).append(command)
                    seen.add(command.words)
    return {
        page: rest for page, rest in found.items() if not all(isinstance(c, Command) and c.is_setting for c in rest)
    }


LEFT = left()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documented") / "workshop"
    make_workshop(folder)
    return folder


@pytest.fixture
def folder(workshop: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it, which one is in."""
    shutil.copytree(workshop, tmp_path / "here", symlinks=True)
    with contextlib.chdir(tmp_path / "here"):
        yield tmp_path / "here"


def typed(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """What the commands say. A manifest goes nowhere: there is no cluster to apply it to."""
    env = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env |= {"COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    text = re.sub(r"\| kubectl apply -f -", "> manifests.yaml", text)
    shell = subprocess.Popen(
        ["bash", "-e"], text=True, cwd=folder, env=env, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = shell.communicate(text)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(text, shell.returncode, out, err)


@pytest.mark.parametrize("page", LEFT)
def test_a_page(folder: Path, page: str) -> None:
    STAGES.get(page, lambda: None)()
    settings, failed = "", []
    for one in LEFT[page]:
        if isinstance(one, Block):
            exec(compile(one.text, one.name, "exec"), scope(page))
        elif one.is_setting:
            settings += f"{one.text}\n"
        elif one.words[:2] == ("rechub-dist", "serve"):
            arguments = re.sub(r"--port \d+ ?", "", " ".join(one.words[2:])).split()
            with serving(folder / "log", *arguments, env={"SERVING_TOKEN": "a token"}) as server:
                assert server.client().get("/ready").status_code == 200
        else:
            done = typed(folder, settings + one.text)
            if done.returncode:
                failed.append(f"{one.block.name}: {one.text}\n{done.stdout[-1500:]}{done.stderr[-2500:]}")
    assert not failed, "\n\n".join(failed)
