"""Classes of a user's own: found, checked and refused as ours are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rechub_dist.assembly.arguments import arguments_of
from rechub_dist.assembly.code import dense_optimizer, fingerprints
from rechub_dist.assembly.identity import identity, other_than, recorded
from rechub_dist.assembly.parts import Parts, build
from rechub_dist.config.code import named_code, refuse_code
from rechub_dist.data.run_file import load_run
from rechub_dist.embedded import Output
from rechub_dist.embedding.optim import _room_for_state
from rechub_dist.errors import UserError
from rechub_tests.runs import SCHEMA, run_file

CODE = """
import torch
import torch.nn.functional as F
from torch import nn
from rechub_dist.features import Feature
from rechub_dist.models import DeepFM, Model, RecallModel

class Net(DeepFM):
    def __init__(self, features: list[Feature], hidden_units: list[int], *, scale: dict[str, float] | None = None,
                 pair: tuple[int, int] = (1, 2), anything=None) -> None:
        super().__init__(features, hidden_units, 0.0, 4)
        self.pair = pair

class Bare(Model):
    def __init__(self) -> None:
        super().__init__()

class Recall(RecallModel):
    def lookups(self): ...
    def forward(self, embedded): ...

def half(logits, labels, *, factor: float = 0.5):
    return factor * F.binary_cross_entropy_with_logits(logits, labels, reduction="none")

def mean(logits, labels):
    return F.binary_cross_entropy_with_logits(logits, labels)

def one(logits): ...

class Half:
    def __init__(self, factor: float = 0.5) -> None:
        self.factor = factor
    def __call__(self, logits, labels):
        return half(logits, labels, factor=self.factor)

class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
    def forward(self, logits, labels): ...

class Counting(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["steps"] = 1

class Growing(torch.optim.SGD):
    def step(self, closure=None):
        self.param_groups[0]["weight_decay"] += 1

number = 3
"""
BAD = {
    "own_code_raises": "import rechub_dist\n\nraise RuntimeError('at\\nhome')\n",
    "own_code_lacks": "import math\nimport no_such_package_at_all\n",
    "own_code_syntax": "def f(:\n",
    "own_code_leaves": "import sys\nsys.exit(3)\n",
    "json": "x = 1\n",  # is in use under this name
    "own_code_hints": (
        "from __future__ import annotations\nfrom rechub_dist.models import DeepFM\n"
        "class Net(DeepFM):\n    def __init__(self, features: list[Featur]) -> None: ...\n"
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "dataset.yaml").write_text(json.dumps(SCHEMA))
    return folder


@pytest.fixture(scope="module")
def run_yaml(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    path = run_file(folder, root, "DeepFM", model={"features": ["user", "item", "age"]})
    (folder / "own_code.py").write_text(CODE)
    for name, text in BAD.items():
        (folder / f"{name}.py").write_text(text)
    return path


NET = ("model={name: own_code:Net, features: [user, age], hidden_units: [4]}",)


def built(path: Path, *overrides: str) -> Parts:
    return build(load_run(path, overrides), device="cpu", world_size=1)


def test_a_model_beside_the_run_file(run_yaml: Path) -> None:
    before = list(sys.path)
    parts = built(run_yaml, *NET, "model.scale={a: 1}", "model.pair=[3, 4]", "model.anything=[1, x]")
    assert type(parts.train_module.model).__qualname__ == "Net"
    assert parts.train_module.model.pair == (3, 4)
    assert sys.path == before
    assert load_run(run_yaml, NET).code == run_yaml.parent
    assert load_run(run_yaml).code is None
    digests = fingerprints(parts.config)  # by which ranks with another file refuse to train together
    assert list(digests) == ["own_code:Net"]
    (run_yaml.parent / "own_code.py").write_text(CODE + "\n")
    assert fingerprints(parts.config) != digests


WRONG = [
    (["model.name=own_cod:Net"], "model.name: no module 'own_cod' in .*, nor installed: did you mean 'own_code'?"),
    (["model.name=own_code.deeper:Net"], "model.name: no module 'own_code.deeper' in .*, nor installed"),
    (["model.name=own_code:Ne"], "model.name: module 'own_code' has no 'Ne': did you mean 'Net'?"),
    (["model.name=own_code:half"], "model.name: own_code:half is no model: derive a class from"),
    (["model.name=own_code:Bare"], "model.name: own_code:Bare has no 'lookups' of its own, which every Model needs"),
    (["model.name=own_code:Recall"], "own_code:Recall has no 'user' of its own, which every RecallModel needs"),
    (["model.name=own code:Net"], "model.name: 'own code:Net' is not the name of a class or function"),
    (["model.name=own_code_raises:Net"], r"cannot be imported: RuntimeError: at home \(.*own_code_raises.py:3\)$"),
    (["model.name=own_code_lacks:Net"], r"ModuleNotFoundError: No module named 'no_such.*own_code_lacks.py:2\)$"),
    (["model.name=own_code_syntax:Net"], r"cannot be imported: SyntaxError: .*\(own_code_syntax.py, line 1\)$"),
    (["model.name=own_code_leaves:Net"], r"cannot be imported: SystemExit: 3 \(.*own_code_leaves.py:2\)$"),
    (
        ["model={name: own_code_hints:Net, features: [user]}"],
        "the annotations of Net cannot be read: name 'Featur' is not defined",
    ),
    (["model.name=json:Net"], "model.name: 'json' is .*json.py, but .* is in use under this name; rename yours"),
    ([*NET, "model.hidden_unit=[3]"], "unknown key 'model.hidden_unit': did you mean 'hidden_units'?"),
    ([*NET, "model.hidden_units=[a]"], r"model.hidden_units: should be list\[int\], got \['a'\]"),
    ([*NET, "model.features=[usr]"], "model.features: the data set has no feature 'usr': did you mean 'user'?"),
    ([*NET, "model.scale={a: b}"], r"model.scale: should be dict\[str, float\] \| None"),
    ([*NET, "model.pair=[1]"], r"model.pair: should be tuple\[int, int\], got \[1\]"),
    (["objective={name: pointwise, loss: half}"], r"objective.pointwise.loss: unknown name 'half' \(write"),
    (["objective={name: pointwise, loss_arguments: {a: 1}}"], "loss_arguments are for your own loss"),
    (["objective={name: pointwise, loss: own_code:one}"], "own_code:one has to take two tensors"),
    (["objective={name: pointwise, loss: own_code:number}"], "own_code:number is neither a function nor a class"),
    (["objective={name: pointwise, loss: own_code:Trained}"], "own_code:Trained has parameters, and only a model's"),
    (["objective={name: pointwise, loss: own_code:Net}"], "missing key 'objective.loss_arguments.features'"),
    (
        ["objective={name: pointwise, loss: own_code:half, loss_arguments: {factr: 1}}"],
        "unknown key 'objective.loss_arguments.factr': did you mean 'factor'?",
    ),
    (
        ["objective={name: pointwise, loss: own_code:Half, loss_arguments: {factor: x}}"],
        "objective.loss_arguments.factor: should be float, got 'x'",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG, ids=lambda value: str(value)[-45:])
def test_a_mistake_is_one_line(run_yaml: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        built(run_yaml, *overrides)
    assert "\n" not in str(error.value)


OPTIMIZERS = [
    (
        ["optimizer.name=adm"],
        r"optimizer.name: unknown name 'adm' \(write .* package.module:Name\); did you mean 'adam'\?",
    ),
    (["optimizer.name=torch.optim:RAdm"], "module 'torch.optim' has no 'RAdm': did you mean 'RAdam'?"),
    (["optimizer.name=torch.optim:LBFGS"], "computes the loss several times a step"),
    (["optimizer.name=own_code:Net"], "own_code:Net is no torch.optim.Optimizer"),
    (["optimizer.arguments={a: 1}"], "arguments are for a package.module:Class; adam takes its parameters beside lr"),
    (["optimizer.name=torch.optim:RAdam", "optimizer.weight_decay=0.1"], "write optimizer.arguments: {weight_decay"),
    (["optimizer.name=torch.optim:RAdam", "optimizer.arguments={lr: 1}"], "unknown key 'optimizer.arguments.lr'"),
    (["optimizer.name=torch.optim:RAdam", "optimizer.arguments={eps: x}"], "optimizer.arguments.eps: should be float"),
    (["optimizer.name=torch.optim:RAdam", "optimizer.arguments={eps: -1}"], "optimizer.arguments: Invalid epsilon"),
    (["optimizer.name=own_code:Counting"], "own_code:Counting keeps 'steps' as int, and a checkpoint holds tensors"),
    (["optimizer.name=own_code:Growing"], "own_code:Growing keeps state beside its parameters'"),
]


def made(config: Any, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    make = dense_optimizer(config)
    assert make is not None
    optimizer = make(parameters)
    _room_for_state(optimizer, config.optimizer.name)
    return optimizer


@pytest.mark.parametrize(("overrides", "message"), OPTIMIZERS, ids=lambda value: str(value)[-45:])
def test_optimizers_that_do_not_fit(run_yaml: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(load_run(run_yaml, overrides), [torch.nn.Parameter(torch.ones(2))])


@pytest.mark.parametrize(
    "name", ["RAdam", "NAdam", "Adamax", "Adadelta", "RMSprop", "Rprop", "ASGD", "Adafactor", "SGD"]
)
def test_torchs_optimizers_can_be_saved(run_yaml: Path, name: str) -> None:
    given = ["optimizer.arguments={momentum: 0.9}"] if name == "SGD" else []
    config = load_run(run_yaml, [f"optimizer.name=torch.optim:{name}", *given])
    assert not named_code(config.model_dump())  # it is there in any case
    parameter, frozen = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(1), requires_grad=False)
    optimizer = made(config, [parameter, frozen])
    assert not optimizer.state[frozen]
    assert torch.equal(parameter, torch.ones(3, 2))
    assert optimizer.param_groups[0]["lr"] == config.optimizer.lr
    assert optimizer.state[parameter]


def test_a_loss_of_ones_own(run_yaml: Path) -> None:
    logits, labels = torch.tensor([[0.3], [-2.0]]), torch.tensor([[1.0], [0.0]])
    ours = built(run_yaml).train_module.objective.losses(Output(logits=logits), labels)
    for chosen in ("{loss: own_code:half}", "{loss: own_code:Half, loss_arguments: {factor: 0.5}}"):
        objective = built(run_yaml, f"objective={{name: pointwise, {chosen[1:]}").train_module.objective
        torch.testing.assert_close(objective.losses(Output(logits=logits), labels), ours / 2)
    mean = built(run_yaml, "objective={name: pointwise, loss: own_code:mean}").train_module.objective
    with pytest.raises(
        UserError, match=r"objective.loss: returns a tensor \[\] for 2 rows; let it return one loss a row"
    ):
        mean.losses(Output(logits=logits), labels)


def test_only_a_run_file_is_taken_at_its_word(run_yaml: Path) -> None:
    config = load_run(run_yaml, NET)
    one = identity(build(config, device="cpu", world_size=1), "data")
    run = {"config": config.dump(), "identity": one}
    assert one["model"]["name"] == "own_code:Net"
    assert other_than(run, one, "here", config.code) == []
    with pytest.raises(
        UserError, match=r"its model.name is own_code:Net, .* not imported by default.*--allow-code own_code$"
    ):
        recorded(run, "here")
    assert recorded(run, "here", ["own_code"], config.code) == one
    other = {**run, "config": config.dump().replace("own_code:Net", "elsewhere.code:Net")}
    assert other_than(other, one, "here") == ['model.name "elsewhere.code:Net" -> "own_code:Net"']
    tree = {"model": {"name": "a.b:C"}, "objective": {"loss": "d:e"}, "optimizer": {"name": "f:G"}}
    refuse_code(tree, ["a", "d"], "here")
    with pytest.raises(UserError, match=r"add --allow-code a.b --allow-code d --set code=x$"):
        refuse_code(tree, ["a.b.c", "dd"], "here", "x")


def test_a_parameter_without_annotation_takes_what_is_written() -> None:
    def function(a, *rest, b=2, **more): ...  # type: ignore[no-untyped-def]

    assert arguments_of("x", function, {"a": [1, "y"]}) == {"a": [1, "y"]}
    with pytest.raises(UserError, match=r"unknown key 'x.more': valid: a, b"):
        arguments_of("x", function, {"more": 1})
