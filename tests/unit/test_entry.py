"""What a command prints of a mistake, and on which rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from rechub_dist.cli.entry import run_app
from rechub_dist.errors import UserError


def app_that(error: Exception | None = None, code: int | None = None) -> typer.Typer:
    """A command that raises an error, or ends with a code."""
    app = typer.Typer()

    @app.command()
    def work(number: int = 0) -> None:  # noqa: ARG001 - an option to misuse
        if error is not None:
            raise error
        if code is not None:
            raise typer.Exit(code)

    return app


@pytest.fixture(autouse=True)
def _command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["work"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--nummer", "1"], "error: No such option: --nummer"),
        (["--number", "x"], "error: Invalid value for '--number': "),
        (["more"], "error: Got unexpected extra argument"),
    ],
)
def test_a_mistaken_option_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["work", *arguments])
    assert run_app(app_that()) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(line)
    assert told.endswith("work --help)")


def test_help_is_asked_for_by_a_command_without_arguments() -> None:
    done = subprocess.run([sys.executable, "-m", "rechub_dist", "data"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error" not in done.stdout + done.stderr
    assert "synthesize" in done.stdout + done.stderr


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_exit_code_is_that_of_the_command(code: int) -> None:
    assert run_app(app_that(code=code)) == code
    assert run_app(app_that()) == 0


def test_a_command_leaves_the_hook_for_exceptions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def hook(*_: object) -> None:
        """Ours, which hides secrets."""

    monkeypatch.setattr(sys, "excepthook", hook)
    with pytest.raises(ZeroDivisionError):
        run_app(app_that(ZeroDivisionError()))
    assert sys.excepthook is hook


def test_a_mistake_that_one_rank_sees_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    told = []
    for rank in ("3", "0", "2"):
        (tmp_path / rank).mkdir()
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        assert run_app(app_that(UserError("rank 3 is number 4 on this host"))) == 2
        told.append(capsys.readouterr().err)
    assert told == ["error: rank 3 is number 4 on this host\n", "", ""]
    agreed = UserError("what all have agreed on")
    agreed.on_all_ranks = True
    for rank in ("2", "0"):
        monkeypatch.setenv("RANK", rank)
        assert run_app(app_that(agreed)) == 2
        told.append(capsys.readouterr().err)
    assert told[3:] == ["", "error: what all have agreed on\n"]


def test_a_rank_whose_run_file_is_not_there_says_so(tmp_path: Path) -> None:
    """One that no agent of ours has started."""
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "rechub_dist", "train", "run.yaml"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: run.yaml: cannot be read: No such file or directory; check the path\n"
