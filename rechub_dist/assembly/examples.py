"""A small run of any model, derived from its constructor: what `rechub-dist models NAME` prints, ready to run."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from rechub_dist.assembly.arguments import rows_of
from rechub_dist.assembly.parts import build_model
from rechub_dist.config import VERSION, DataConfig, ModelConfig, RunConfig
from rechub_dist.data.prepare.synthetic import synthetic_schema
from rechub_dist.features import FeatureSchema
from rechub_dist.models import Model

ROOT = "data/example"
DATA = {"dense": 2, "sparse": 4, "vocabulary": 100, "labels": 2}
COMMAND = f"rechub-dist data synthesize --out {ROOT} --rows 20000 --sequence " + " ".join(
    f"--{name} {value}" for name, value in DATA.items()
)
PLAIN = ("sparse_0", "sparse_1", "sparse_2", "sparse_3", "dense_0", "dense_1")
SIZES = {
    "max_len": 20,
    "max_seq_len": 20,
    "num_heads": 2,
    "num_layers": 2,
    "cross_num": 2,
    "num_experts": 2,
    "num_shared_experts": 1,
    "num_tasks": 2,
    "num_interests": 2,
    "reduction_ratio": 2,
    "routing_iterations": 3,
}
# What printed run files say of training. Chosen on five data sets (5,760 to 269,272 rows) by valid AUC of DeepFM and
# DCNv2 (docs/models.md, "First settings"): small batches and early stopping reach what few steps of large ones do not.
FIRST_BATCH: Final = 256
TRAINING: Final = {
    "embedding": {"optimizer": {"lr": 0.02}},
    "optimizer": {"lr": 0.002},
    "train": {"epochs": 10, "patience": 2},
}


def batches(size: int) -> dict[str, int]:
    """The keys of `data` for batches of `size` rows in training."""
    return {"batch_size": size, "eval_batch_size": 4096}


def example_schema() -> FeatureSchema:
    """The schema of the data that `COMMAND` generates."""
    return synthetic_schema(sequence=True, **DATA)


def example_parameters(
    cls: type[Model],
    plain: Sequence[str] = PLAIN,
    behaviors: Sequence[str] = ("history",),
    targets: Sequence[str] = ("item",),
) -> dict[str, Any]:
    """A value for each parameter that `cls` requires; features by name.

    Args:
        cls: the model.
        plain: features that any model takes.
        behaviors: sequences for the models that take a history.
        targets: the sparse features that these are matched with, or an item's.
    """
    by_kind = {"SequenceFeature": behaviors, "SparseFeature": targets}
    hints, marked = typing.get_type_hints(cls.__init__), typing.get_type_hints(cls.__init__, include_extras=True)
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name == "self" or rows_of(marked[name]) is not None or parameter.default is not inspect.Parameter.empty:
            continue
        hint = hints[name]
        kind, elements = typing.get_origin(hint), [getattr(a, "__name__", "") for a in typing.get_args(hint)]
        if name == "user_features":  # of a tower, which reads the history as well
            found[name] = [*plain, *behaviors[:1]]
        elif name == "item_features":
            found[name] = list(targets[:1])
        elif name.endswith("features"):
            found[name] = list(by_kind.get(elements[0], plain))
        elif kind is typing.Literal:
            found[name] = typing.get_args(hint)[0]
        elif name == "task_types":
            found[name] = ["classification"] * SIZES["num_tasks"]
        elif kind is list:
            found[name] = [32, 16]
        else:
            found[name] = {int: SIZES.get(name, 16), str: "relu"}.get(hint, 0.1)
    return found


def example_model(cls: type[Model]) -> Model:
    """The model on the example's data."""
    config = RunConfig(
        output_dir=Path(f"runs/{cls.__name__.lower()}_example"),
        data=DataConfig(root=ROOT),
        model=ModelConfig(name=cls.__name__, **example_parameters(cls)),
    )
    return build_model(config, example_schema())


def example_run(cls: type[Model]) -> str:
    """A minimal run file."""
    name = cls.__name__
    data: dict[str, Any] = {"root": ROOT, **batches(FIRST_BATCH)}
    if tasks := example_model(cls).num_tasks:
        data["labels"] = [label.name for label in example_schema().labels[:tasks]]
    tree = {
        "version": VERSION,
        "output_dir": f"runs/{name.lower()}_example",
        "data": data,
        "model": {"name": name, **example_parameters(cls)},
        **TRAINING,
    }
    body = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110)
    return f"# Data to run this on: {COMMAND}\n{body}"
