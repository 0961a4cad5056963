"""`make release` refuses what is not to be released, before it makes anything."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from rechub_tests.makefile import make

ROOT = Path(__file__).parents[2]
GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]

pytestmark = pytest.mark.skipif(not (shutil.which("git") and shutil.which("make")), reason="needs git and make")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the checks look at, committed, with another version than any that there is."""
    for name in ("Makefile", "CHANGELOG.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "rechub_dist").mkdir()
    (tmp_path / "rechub_dist" / "__init__.py").write_text('__version__ = "9.9.9"\n')
    commit(tmp_path)
    return tmp_path


def commit(folder: Path) -> None:
    for line in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*GIT, *line], cwd=folder, check=True)


def refused(folder: Path) -> str:
    done = make("release", folder=folder)
    assert done.returncode == 2
    assert not (folder / "dist").exists()
    [line] = done.stdout.splitlines()
    return line


def test_a_version_without_a_dated_entry(checkout: Path) -> None:
    assert "CHANGELOG.md has no heading '## 9.9.9, YYYY-MM-DD'" in refused(checkout)
    (checkout / "CHANGELOG.md").write_text("## 9.9.9, not yet released\n")
    commit(checkout)
    assert "CHANGELOG.md has no heading" in refused(checkout)


def test_changes_that_are_not_committed(checkout: Path) -> None:
    (checkout / "CHANGELOG.md").write_text("## 9.9.9, 2026-01-31\n")
    assert "commit or remove what git status lists" in refused(checkout)
