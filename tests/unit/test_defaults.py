"""Defaults are frozen by version: what a run file leaves out means what it meant when it was written."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from rechub_dist.assembly.parts import DEFAULT_DIM
from rechub_dist.config import RunConfig, default_objective, stored_run, versions
from rechub_dist.data.run_file import load_run
from rechub_dist.errors import UserError
from rechub_dist.features import Label, Table
from rechub_dist.models import RecallModel, catalogue
from rechub_dist.schema import KINDS

FOLDER = Path(__file__).parents[1] / "golden"
# What follows from the metric now; `max` whatever the metric was a fault, and is no part of a run's mathematics.
CORRECTED = {"TrainConfig.best_mode"}

RUN = """
output_dir: out
data: {root: data, dataset: {features: {a: {kind: sparse, rows: 5}, b: {kind: dense}}, labels: {click: {}}}}
model: {name: DeepFM, hidden_units: [1]}
"""


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in _sections(part)]


def current() -> dict[str, Any]:
    """Every default by where it stands: sections, features and tables, the models' parameters and training."""
    found: dict[str, Any] = {"embedding.dim": DEFAULT_DIM}
    todo, seen = [RunConfig], set[type[BaseModel]]()
    while todo:
        section = todo.pop()
        seen.add(section)
        for name, field in section.model_fields.items():
            inner = _sections(field.annotation)
            todo += [one for one in inner if one not in seen]
            if not field.is_required() and not inner:
                found[f"{section.__name__}.{name}"] = field.get_default(call_default_factory=True)
            elif not field.is_required() and field.get_default() is None:
                found[f"{section.__name__}.{name}"] = None
    for cls in (*KINDS.values(), Table, Label):
        for part in dataclasses.fields(cls):
            if part.default is not dataclasses.MISSING:
                found[f"{cls.__name__}.{part.name}"] = part.default
    for name, model in catalogue().items():
        for parameter in inspect.signature(model.__init__).parameters.values():
            if parameter.default is not inspect.Parameter.empty:
                found[f"{name}({parameter.name})"] = parameter.default
        found[f"{name}.objectives"] = model.objectives[0]
        if issubclass(model, RecallModel):
            found |= {f"{name}.{key}": getattr(model, key) for key in ("loss", "negatives", "margin")}
    return {name: json.loads(json.dumps(value, default=str)) for name, value in sorted(found.items())}


def test_no_default_has_changed_without_a_version() -> None:
    wanted = json.loads((FOLDER / f"defaults-{versions.VERSION}.json").read_text())
    found = current()
    changed = {name: (wanted[name], found.get(name, "gone")) for name in wanted if wanted[name] != found.get(name)}
    assert not {name: value for name, value in changed.items() if name not in CORRECTED}, (
        "a default means something else now: raise config.versions.VERSION, put the old value into FORMER and write "
        "the defaults of the new version: python tests/unit/test_defaults.py"
    )


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """A next version, in which the defaults of today are the former ones of others."""
    former = {
        "train.epochs": 3,
        "data.shuffle_rows": 1000,
        "data.mix.*.weight": 2.5,
        "model[DeepFM].activation": "gelu",
        "model[DCN].activation": "tanh",
        "objective[pointwise].aux_weight": 0.5,
        "embedding.rules.*.optimizer?.lr": 0.5,
        "warm_start?.step": "newest",
        "data.dataset.features.*[sparse].missing": "drop",
    }
    monkeypatch.setattr(versions, "FORMER", versions.FORMER | {versions.VERSION: former})
    monkeypatch.setattr(versions, "VERSION", versions.VERSION + 1)


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    (tmp_path / "run.yaml").write_text(text)
    return load_run(tmp_path / "run.yaml", overrides)


@pytest.mark.usefixtures("second")
def test_a_file_without_a_version_means_the_first(tmp_path: Path) -> None:
    config = load(tmp_path, RUN, "embedding.rules=[{tables: a}, {tables: b, optimizer: {name: sgd}}]")
    assert (config.version, config.train.epochs, config.data.shuffle_rows) == (1, 3, 1000)
    assert config.model.parameters == {"hidden_units": [1], "activation": "gelu"}
    assert config.objective is None
    assert default_objective(config, "pointwise").model_dump()["aux_weight"] == 0.5
    assert config.warm_start is None
    assert [rule.optimizer and rule.optimizer.lr for rule in config.embedding.rules] == [None, 0.5]
    assert isinstance(config.data.dataset, dict)
    assert config.data.dataset["features"] == {
        "a": {"kind": "sparse", "rows": 5, "missing": "drop"},
        "b": {"kind": "dense"},
    }
    assert load(tmp_path, config.dump()) == config  # resolved, so that no version matters


@pytest.mark.usefixtures("second")
def test_what_is_written_stays_and_a_newer_version_has_its_own(tmp_path: Path) -> None:
    given = ["train.epochs=4", "model.activation=relu", "objective={name: pointwise}", "warm_start={from: x}"]
    config = load(tmp_path, RUN, *given)
    assert (config.train.epochs, config.model.parameters["activation"]) == (4, "relu")
    assert config.objective is not None
    assert config.objective.model_dump()["aux_weight"] == 0.5
    assert config.warm_start is not None
    assert config.warm_start.step == "newest"
    config = load(tmp_path, f"version: {versions.VERSION}{RUN}")
    assert (config.train.epochs, config.data.shuffle_rows) == (1, 8_000_000)
    assert default_objective(config, "pointwise").model_dump()["aux_weight"] == 1.0
    assert config.model.parameters == {"hidden_units": [1]}


def test_mind_trains_as_it_serves_from_the_second_version_on(tmp_path: Path) -> None:
    mind = "\nmodel: {name: MIND, num_interests: 2, routing_iterations: 1, hidden_size: 4, embedding_dim: 4}\n"
    text = RUN.replace("\nmodel: {name: DeepFM, hidden_units: [1]}\n", mind)
    assert load(tmp_path, text).model.parameters["readout"] == "attention"
    assert stored_run(text, "here").model.parameters["readout"] == "attention"
    assert "readout" not in load(tmp_path, f"version: 2{text}").model.parameters
    assert load(tmp_path, text, "model.readout=best").model.parameters["readout"] == "best"


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("3", r"run\.yaml: version: 3 needs a newer rechub_dist: this one knows versions up to 2; upgrade it"),
        ("0", "version: must be an integer from 1 up, got 0"),
        ("new", "version: must be an integer from 1 up, got 'new'"),
    ],
)
def test_versions_that_there_are_not(tmp_path: Path, version: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, f"version: {version}{RUN}")


def test_a_stored_configuration_with_an_unknown_key_is_of_a_newer_version() -> None:
    with pytest.raises(UserError, match=r"here: unknown key 'future'.*; if a newer rechub_dist wrote it, upgrade"):
        stored_run(f"{RUN}\nfuture: {{a: 1}}\n", "here")


def test_evaluation_settings_stand_by_themselves_or_in_their_old_place(tmp_path: Path) -> None:
    recall = RUN + "objective: {name: retrieval, top_k: [3], exclude_seen: false}\n"
    new = load(tmp_path, RUN + "objective: {name: retrieval}\nevaluation: {top_k: [3], exclude_seen: false}\n")
    assert load(tmp_path, recall) == new
    assert new.evaluation.top_k == (3,)
    assert load(tmp_path, recall, "evaluation.sampled_items=7").evaluation.sampled_items == 7
    assert load(tmp_path, recall, "evaluation.top_k=[3]") == new
    message = r"objective\.top_k is \[3\], evaluation\.top_k \[4\]; keep only evaluation\.top_k"
    with pytest.raises(UserError, match=message):
        load(tmp_path, recall, "evaluation.top_k=[4]")
    with pytest.raises(UserError, match=r"unknown key 'objective\.pointwise\.top_k'"):
        load(tmp_path, RUN + "objective: {name: pointwise, top_k: [3]}\n")


if __name__ == "__main__":
    with (FOLDER / f"defaults-{versions.VERSION}.json").open("x") as file:
        file.write(json.dumps(current(), indent=1) + "\n")
