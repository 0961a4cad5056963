"""`rechub-dist config`: the keys of run files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rechub_dist.cli.keys import Key, page, run_keys
from rechub_dist.cli.main import app
from rechub_dist.config import RunConfig
from rechub_dist.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.fixture(scope="module")
def keys() -> dict[str, Key]:
    return {key.path: key for top in run_keys() for key in top.all()}


def told(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["config", *arguments], catch_exceptions=False, env={"COLUMNS": "100"})
    assert done.exit_code == 0
    return done.stdout


def test_the_page_is_what_the_types_say() -> None:
    assert PAGE.read_text() == page(run_keys()) + "\n", "rechub-dist config --markdown > docs/configuration.md"


def test_every_key_is_there_and_has_a_meaning(keys: dict[str, Key]) -> None:
    assert set(RunConfig.model_fields) <= set(keys)
    without = [path for path, key in keys.items() if not key.meaning and path.rpartition(".")[2] not in ("name", "as")]
    assert without == []


@pytest.mark.parametrize(
    ("path", "takes", "default"),
    [
        ("train.patience", "integer > 0 or null", "null"),
        ("output_dir", "text", None),
        ("train.precision", "fp32, bf16", "fp32"),
        ("embedding.rules[].tables", "text", None),
        ("evaluation.top_k", "list of integer > 0", "[5, 10, 20]"),
        ("optimizer.betas", "list of 2: number >= 0 and < 1", "[0.9, 0.999]"),
        ("objective[pointwise].label_losses.NAME.loss", "text", None),
        ("data.storage.cache", "true or false", "true"),
        ("embedding.dropout", "number >= 0 and < 1", "0.0"),
    ],
)
def test_what_keys_take(keys: dict[str, Key], path: str, takes: str, default: str | None) -> None:
    assert keys[path].type.startswith(takes)
    assert keys[path].default == default


def test_defaults_are_those_of_the_configuration(keys: dict[str, Key]) -> None:
    config: Any = RunConfig.model_validate(
        {"output_dir": Path("x"), "data": {"root": "x"}, "model": {"name": "DeepFM"}}
    )
    assert keys["train.epochs"].default == str(config.train.epochs)
    assert keys["distributed.timeout_seconds"].default == str(config.distributed.timeout_seconds)
    assert keys["embedding.optimizer.name"].default == config.embedding.optimizer.name


def test_the_command() -> None:
    assert "embedding  section" in told()
    assert "embedding.optimizer.lr  number > 0; default: 0.02" in told("embedding.optimizer")
    one = told("train.patience")
    assert one.startswith("train.patience  integer > 0 or null; default: null")
    assert "early stopping" in one
    assert "output_dir  text; required" in told()
    with pytest.raises(UserError, match=r"did you mean 'train\.patience'"):
        told("train.patienc")
