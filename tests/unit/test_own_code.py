"""Classes of a user's own: found, checked and refused as ours are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
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
from rechub_dist.features import Feature, Label
from rechub_dist.models import DeepFM, Model, RecallModel
from rechub_dist.objectives import Objective, TaskObjective

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

class Squared(TaskObjective):
    def __init__(self, labels: tuple[Label, ...], model: Model, *, factor: float = 1.0) -> None:
        super().__init__(labels, {})
        self.factor, self.named = factor, type(model).__name__
    def losses(self, output, labels):
        return self.factor * (output.logits.sigmoid() - labels).square().sum(dim=1)
    def predictions(self, output):
        return {label.name: output.logits[:, t].sigmoid() for t, label in enumerate(self.labels)}

class Mean(Squared):
    def losses(self, output, labels):
        return super().losses(output, labels).mean()

class Column(Squared):
    def predictions(self, output):
        return {label.name: output.logits.sigmoid() for label in self.labels}

class Other(Squared):
    def predictions(self, output):
        return {"other": output.logits[:, 0]}

class Lossless(TaskObjective):
    def predictions(self, output): ...

class ForRecall(Squared):
    def __init__(self, labels: tuple[Label, ...], model: RecallModel) -> None: ...

class Nothing(Objective):
    def forward(self, output, embedded, batch): ...
    def weight_sums(self, batch): ...

class Weighted(Squared):
    def __init__(self, labels: tuple[Label, ...], model: Model) -> None:
        super().__init__(labels, model)
        self.weight = nn.Parameter(torch.ones(1))

def sum_of(positive, negative, counts, *, factor: float = 1.0):
    return factor * ((negative - positive[:, None]).sigmoid() * counts).sum(dim=1)

class Count:
    direction = "min"
    group = None
    def __init__(self, above: float = 0.5) -> None:
        self.above, self.count = above, 0.0
    def update(self, rows):
        self.count += float((rows.predictions > self.above).sum())
    def merge(self, ranks): ...
    def compute(self):
        return self.count

class Sideways(Count):
    direction = "sideways"

class Groupless:
    direction = "max"
    def update(self, rows): ...
    def merge(self, ranks): ...
    def compute(self): ...

class Unmerged:
    def update(self, rows): ...

class Depth(Count):
    depth = 0
    def __init__(self, k: int) -> None:
        super().__init__()

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
    (
        ["model.name=own_code_raises:Net"],
        r"cannot be imported: RuntimeError: at home \(.*own_code_raises.py:3\); fix it$",
    ),
    (
        ["model.name=own_code_lacks:Net"],
        r"ModuleNotFoundError: No module named 'no_such.*own_code_lacks.py:2\); fix it$",
    ),
    (["model.name=own_code_syntax:Net"], r"cannot be imported: SyntaxError: .*\(own_code_syntax.py, line 1\); fix it$"),
    (["model.name=own_code_leaves:Net"], r"cannot be imported: SystemExit: 3 \(.*own_code_leaves.py:2\); fix it$"),
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
    (["objective={name: pointwise, loss_arguments: {a: 1}}"], "loss_arguments are those of the loss that loss names"),
    (
        ["objective={name: pointwise, loss: own_code:one}"],
        "own_code:one has to take 2 tensors: logits \\[B\\], labels \\[B\\]",
    ),
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
    (["optimizer.name=own_code:Counting"], "own_code:Counting keeps 'steps' as int, but checkpoints hold tensors"),
    (["optimizer.name=own_code:Growing"], "own_code:Growing keeps state outside of its parameters'"),
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
        UserError, match=r"objective.loss: returns a tensor \[\] for 2 rows; let it return one number a row"
    ):
        mean.losses(Output(logits=logits), labels)


SQUARED = "objective={name: own_code:Squared, arguments: {factor: 3}}"


def test_an_objective_of_ones_own(run_yaml: Path) -> None:
    logits, labels = torch.tensor([[0.3], [-2.0]]), torch.tensor([[1.0], [0.0]])
    parts = built(run_yaml, SQUARED)
    objective: Any = parts.train_module.objective
    assert objective.named == "DeepFM"
    torch.testing.assert_close(
        objective.losses(Output(logits=logits), labels), 3 * (logits.sigmoid() - labels).square()[:, 0]
    )
    assert list(objective.metrics(parts.config.evaluation)) == ["auc", "log_loss", "normalized_entropy", "calibration"]
    found = identity(parts, "data")
    assert found["objective"] == {
        "name": "own_code:Squared", "arguments": {"factor": 3}, "task_weights": {"click": 1.0},
    }  # fmt: skip
    other = identity(built(run_yaml, SQUARED.replace("3", "4")), "data")
    run = {"config": parts.config.dump(), "identity": found}
    assert other_than(run, other, "here", run_yaml.parent) == ["objective.arguments.factor 3 -> 4"]


OBJECTIVES = [
    ("{name: own_code:Net}", "own_code:Net is no objective: derive a class from rechub_dist.objectives.TaskObjective"),
    ("{name: own_code:Lossless}", "own_code:Lossless has no 'losses' of its own, which every TaskObjective needs"),
    ("{name: own_code:Nothing}", "own_code:Nothing has neither tasks nor a ranking"),
    ("{name: own_code:Weighted}", "own_code:Weighted has parameters, and only a model's are trained"),
    ("{name: own_code:ForRecall}", "ForRecall wants a RecallModel, not a DeepFM"),
    ("{name: own_code:Squared, arguments: {facto: 1}}", "unknown key 'objective.arguments.facto': did you mean 'fact"),
    ("{name: own_code:Squared, arguments: {factor: x}}", "objective.arguments.factor: should be float, got 'x'"),
    ("{name: own_code:Squared, factor: 1}", "unknown key 'objective.factor'"),
    ("{name: squared}", "objective: its name must be pointwise, entire_space, retrieval, or that of your own, package"),
]


@pytest.mark.parametrize(("objective", "message"), OBJECTIVES)
def test_objectives_that_do_not_fit(run_yaml: Path, objective: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        built(run_yaml, f"objective={objective}")
    assert "\n" not in str(error.value)


def test_what_an_objective_returns_is_one_number_a_row(run_yaml: Path) -> None:
    output = Output(logits=torch.tensor([[0.3], [-2.0]]))
    batch: Any = SimpleNamespace(
        labels=torch.tensor([[1.0], [0.0]]), weights=None, rows=2, weight_sums=torch.tensor([2.0])
    )
    mean, column, other = (
        built(run_yaml, f"objective={{name: own_code:{name}}}").train_module.objective
        for name in ("Mean", "Column", "Other")
    )
    with pytest.raises(
        UserError, match=r"its losses: returns a tensor \[\] for 2 rows; let it return one number a row"
    ):
        mean(output, None, batch)
    with pytest.raises(UserError, match=r"its prediction of click: returns a tensor \[2, 1\] for 2 rows"):
        column.tasks.scores(output, batch)
    with pytest.raises(UserError, match="predicts other, but scores click"):
        other.tasks.scores(output, batch)


def test_a_loss_of_ones_own_for_a_recall_model(root: Path, run_yaml: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, root, "SASRec")
    chosen = "objective={name: retrieval, loss: own_code:sum_of, loss_arguments: {factor: 2}}"
    objective: Any = built(path, chosen, f"code={run_yaml.parent}").train_module.objective
    positive, negative = torch.tensor([1.0, 2.0]), torch.tensor([[0.0, 3.0], [1.0, 1.0]])
    counts = torch.tensor([[True, False], [True, True]])
    wanted = 2 * torch.stack([torch.tensor(-1.0).sigmoid(), 2 * torch.tensor(-1.0).sigmoid()])
    torch.testing.assert_close(objective._of_scores(positive, negative, counts), wanted)
    assert objective.settings()["loss"] == "own_code:sum_of"
    with pytest.raises(UserError, match=r"own_code:one has to take 3 tensors"):
        built(path, "objective={name: retrieval, loss: own_code:one}", f"code={run_yaml.parent}")
    with pytest.raises(UserError, match=r"unknown name 'bcee' .*did you mean 'bce'"):
        built(path, "objective={name: retrieval, loss: bcee}")


def test_a_metric_of_ones_own(run_yaml: Path) -> None:
    parts = built(
        run_yaml, "evaluation.metrics=[default, {name: own_code:Count, above: 0.2, as: many}, own_code:Count]"
    )
    found = parts.train_module.objective.metrics(parts.config.evaluation)
    assert list(found.items())[-2:] == [("many", "min"), ("Count", "min")]


METRICS = [
    ("own_code:number", "evaluation.metrics: own_code:number is no class"),
    ("own_code:Coun", "evaluation.metrics: module 'own_code' has no 'Coun': did you mean 'Count'"),
    ("own_code:Unmerged", "own_code:Unmerged has no method 'merge', which every metric needs"),
    ("own_code:Sideways", "own_code:Sideways: every metric has an attribute 'direction': 'max' or 'min' or"),
    ("own_code:Groupless", "own_code:Groupless: every metric has an attribute 'group': the column that it groups"),
    ("own_code:Depth", "own_code:Depth is a metric of rankings, which recall models have"),
    ("{name: own_code:Count, abov: 1}", "own_code:Count: unknown key 'abov': did you mean 'above'"),
    ("{name: own_code:Count, above: x}", "own_code:Count.above: should be float, got 'x'"),
    ("{name: own_code:Count, above: 0.1}, own_code:Count", "two metrics are reported as 'Count'; give one another"),
]


def measured(path: Path, override: str) -> None:
    parts = built(path, override)
    parts.train_module.objective.metrics(parts.config.evaluation)


@pytest.mark.parametrize(("metrics", "message"), METRICS)
def test_metrics_that_do_not_fit(run_yaml: Path, metrics: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        measured(run_yaml, f"evaluation.metrics=[{metrics}]")
    assert "\n" not in str(error.value)


def test_what_is_measured_is_no_part_of_a_run(run_yaml: Path, tmp_path: Path) -> None:
    """A checkpoint's metric is not imported to compare runs, but is where it is to measure."""
    config = load_run(run_yaml, ["evaluation.metrics=[own_code:Count]"])
    assert named_code(config.model_dump()) == {"evaluation.metrics.0": "own_code:Count"}
    one = identity(build(config, device="cpu", world_size=1), "data")
    run = {"config": config.dump(), "identity": one}
    assert other_than(run, identity(built(run_yaml), "data"), "here", tmp_path) == []
    with pytest.raises(UserError, match=r"its evaluation\.metrics\.0 is own_code:Count.* add --allow-code own_code"):
        refuse_code(config.model_dump(), [], "here")


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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.hidden_units=[0]"], r"model \(DeepFM\): hidden layers are \[0\]: every width must be at least 1"),
        (["model.hidden_units=[1000000000000]"], "every width must be at most 16,777,216"),
        (
            ["model.hidden_units=[16000000, 16000000]"],
            r"model \(DeepFM\): its weights take .* GiB, and this host has",
        ),
        (["model.dropout_rates=[0.5, 0.5]"], "2 dropout rates"),
        (["model.embedding_dim=100000"], "dim is 100000, must be at most 65,536"),
        (["model.embedding_dim=true"], "model.embedding_dim: should be int, got True"),
        (["model.name=deepfm"], "model.name: no model 'deepfm': did you mean 'DeepFM'"),
        (
            ["embedding.replicate_below=1000000000000", "data.features={user: {kind: sparse, rows: 900000000000}}"],
            "embedding: the replicated tables take .* GiB, and this host has",
        ),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_models_that_cannot_be(tmp_path: Path, overrides: list[str], message: str) -> None:
    features = "user: {kind: sparse, rows: 5}, item: {kind: sparse, rows: 7}"
    model = "{name: DeepFM, features: [user, item], hidden_units: [4], dropout_rates: 0.0, embedding_dim: 4}"
    (tmp_path / "run.yaml").write_text(
        f"output_dir: out\nmodel: {model}\n"
        f"data: {{root: x, dataset: {{features: {{{features}}}, labels: {{y: {{}}}}}}}}\n"
    )
    with pytest.raises(UserError, match=message) as error:
        build(load_run(tmp_path / "run.yaml", overrides), device="cpu", world_size=1)
    assert len(str(error.value)) <= 500
