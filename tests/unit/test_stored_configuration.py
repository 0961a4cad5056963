"""Configurations that older versions have stored load, whatever run files may no longer say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rechub_dist.assembly.parts import build
from rechub_dist.checkpoint.find import find_folder
from rechub_dist.checkpoint.manifest import MANIFEST
from rechub_dist.config import read_run, run_from, stored_run, stored_tree
from rechub_dist.config.section import MAX_SECONDS
from rechub_dist.errors import UserError

FORMATS = sorted((Path(__file__).parents[1] / "golden").glob("format-*/*/out/checkpoints/step-*"))


@pytest.fixture(params=[pytest.param(path, id=path.parents[2].name) for path in FORMATS])
def text(request: pytest.FixtureRequest) -> str:
    """The configuration of a checkpoint that an older version has written."""
    found: str = json.loads((request.param / MANIFEST).read_text())["manifest"]["run"]["config"]
    return found


def with_limits(tree: dict[str, Any]) -> dict[str, Any]:
    """Every limit that could be infinite, as older versions wrote it."""
    infinite = float("inf")
    tree["optimizer"]["clip_norm"] = infinite
    tree["train"]["max_loss"] = infinite
    tree["data"]["storage"] |= {"deadline_seconds": infinite}
    tree["distributed"]["stall_seconds"] = infinite
    return tree


def test_infinite_limits_are_none(text: str, tmp_path: Path) -> None:
    tree = with_limits(yaml.safe_load(text))
    old = yaml.safe_dump(tree)
    assert "clip_norm: .inf" in old
    found = stored_run(old, "step 8")
    assert found.optimizer.clip_norm is None
    assert found.train.max_loss is None
    assert found.data.storage.deadline_seconds == found.distributed.stall_seconds == MAX_SECONDS
    path = tmp_path / "config.yaml"  # what is stored now is a run file
    path.write_text(found.dump())
    assert read_run(path) == found
    path.write_text(old)
    with pytest.raises(UserError, match=r"config\.yaml, line \d+: '\.inf' is not a finite number"):
        read_run(path)
    (tmp_path / "checkpoints" / "step-0000000008").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-0000000008" / MANIFEST).touch()
    assert find_folder(str(tmp_path), None)[0].settings.deadline_seconds == MAX_SECONDS


def test_other_numbers_that_are_not_finite_stay_or_are_refused(text: str) -> None:
    tree = yaml.safe_load(text)
    tree["model"]["temperature"] = float("inf")  # of a model of one's own
    assert stored_run(yaml.safe_dump(tree), "step 8").model.parameters["temperature"] == float("inf")
    tree["optimizer"]["lr"] = float("nan")
    with pytest.raises(UserError, match=r"step 8: optimizer\.lr: .* got nan"):
        stored_run(yaml.safe_dump(tree), "step 8")


@pytest.mark.parametrize("name", [True, None, 7, 1.5])
def test_names_that_are_no_text_have_been_stored_as_text(text: str, name: object) -> None:
    """Such as `on:` in a schema, which YAML takes for true."""
    tree = yaml.safe_load(text)
    tree["data"]["dataset"]["features"][name] = {"kind": "dense"}
    dumped = run_from(tree).dump()
    assert (
        json.dumps({name: 0}).partition(":")[0].strip('{"') in stored_tree(dumped, "x")["data"]["dataset"]["features"]
    )
    assert stored_run(dumped, "step 8").dump() == dumped


@pytest.mark.parametrize("dataset", [None, "dataset.yaml"])
def test_the_schema_is_stored_with_it(text: str, dataset: str | None) -> None:
    tree = yaml.safe_load(text)
    tree["data"]["dataset"] = dataset
    with pytest.raises(UserError, match=r"^data\.dataset: a stored configuration has to hold the schema itself"):
        build(stored_run(yaml.safe_dump(tree), "step 8"), device="cpu", world_size=1)


@pytest.mark.parametrize("damaged", ["{", "- a", "", "\x00"])
def test_what_is_no_configuration_says_what_to_do(damaged: str) -> None:
    with pytest.raises(UserError, match=r"step 8.*: put back a copy, or remove it$"):
        stored_run(damaged, "step 8")
