"""Configuration -> the parts of a run: schema, model, objective, layout, reader specification. Local and pure."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rechub_dist.assembly.precision import set_training
from rechub_dist.batch import Batch
from rechub_dist.config import EntireSpaceConfig, ObjectiveConfig, RetrievalConfig, RunConfig, default_objective
from rechub_dist.data.spec import BatchSpec
from rechub_dist.embedding.layout import Layout, make_layout
from rechub_dist.embedding.stage import EmbeddingStage
from rechub_dist.errors import UserError, nearest
from rechub_dist.features import Feature, FeatureSchema, Label, with_width
from rechub_dist.models import Model, RecallModel, catalogue
from rechub_dist.objectives import EntireSpaceObjective, Objective, PointwiseObjective, RetrievalObjective
from rechub_dist.schema import parse_schema

DEFAULT_DIM = 16  # of tables to which schema, model and run give no width


class TrainModule(nn.Module):
    """Stage, model and objective, wired: batch -> (loss times world size, detached local loss).

    The factor undoes the division by the world size that DDP and the sharded tables apply to gradients; the
    objective's loss is already this rank's part of the global loss.
    """

    def __init__(self, stage: EmbeddingStage, model: Model, objective: Objective, world_size: int) -> None:
        super().__init__()
        self.stage = stage
        self.model = model
        self.objective = objective
        self.world_size = world_size

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One forward pass; wiring only, so that it can be traced."""
        embedded = self.stage(batch)
        loss = self.objective(self.model(embedded), embedded, batch)
        return loss * self.world_size, loss.detach()

    def sequences(self) -> tuple[str, ...]:
        """The features that the model computes as padded sequences."""
        found = (lookup.feature.name for lookup in self.model.lookups() if lookup.pooling is None)
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Plan:
    """What a configuration describes: everything but the tables."""

    config: RunConfig
    schema: FeatureSchema
    labels: tuple[Label, ...]
    layout: Layout
    spec: BatchSpec
    model: Model
    chosen: ObjectiveConfig  # the objective's configuration
    objective: Objective


@dataclass(frozen=True)
class Parts:
    """What a configuration describes, before any rank talks to another."""

    config: RunConfig
    schema: FeatureSchema
    labels: tuple[Label, ...]
    layout: Layout
    spec: BatchSpec
    train_module: TrainModule
    plan: Plan


def plan(config: RunConfig, *, device: str, world_size: int) -> Plan:
    """Everything that can be checked without data and without other ranks; of the model the dense part alone is made.

    Raises:
        UserError: names the key or feature at fault and the fix.
    """
    assert isinstance(config.data.dataset, dict), "the schema is inlined when a run is loaded"
    schema = parse_schema(config.data.dataset, config.data.root)
    model = build_model(config, schema)
    set_training(model, config.train, device)
    labels = _labels(config, schema)
    if isinstance(model, RecallModel) and config.data.labels is None and not model.num_tasks:
        labels = ()  # whatever the schema has
    chosen = config.objective or default_objective(config, model.objectives[0])
    objective = _objective(config, chosen, model, labels)
    lookups = (*model.lookups(), *objective.lookups())
    layout = make_layout(lookups, config.embedding, device=device, world_size=world_size)
    spec = BatchSpec(
        features=tuple(layout.features.values()),
        dense=model.dense_features(),
        labels=labels,
        weight=schema.weight,
        collections=layout.collections,
        aligned=model.aligned_features(),
    )
    return Plan(config, schema, labels, layout, spec, model, chosen, objective)


def build(config: RunConfig, *, device: str, world_size: int) -> Parts:
    """What a run is made of, with initial weights; raises as `plan`."""
    torch.manual_seed(config.seed)
    found = plan(config, device=device, world_size=world_size)
    stage = EmbeddingStage(found.layout, found.model.dense_features(), config.seed)
    step = TrainModule(stage, found.model, found.objective, world_size)
    return Parts(config, found.schema, found.labels, found.layout, found.spec, step, found)


def build_model(config: RunConfig, schema: FeatureSchema) -> Model:
    """The model that `model:` names, with feature names turned into the schema's features.

    Raises:
        UserError: an unknown model, parameter or feature; a missing or ill-typed parameter; whatever the model refuses.
    """
    models = catalogue()
    if config.model.name not in models:
        raise UserError(f"model.name: no model {config.model.name!r}: {nearest(config.model.name, models)}")
    cls = models[config.model.name]
    where = f"model ({cls.__name__})"
    signature = inspect.signature(cls.__init__)
    valid = [name for name in signature.parameters if name != "self"]
    given = config.model.parameters
    for name in given:
        if name not in valid:
            raise UserError(f"unknown key 'model.{name}': {nearest(name, valid)}")
    hints = typing.get_type_hints(cls.__init__)
    schema = _with_widths(config, cls, schema)
    arguments = {name: _argument(f"model.{name}", value, hints.get(name), schema) for name, value in given.items()}
    for name, parameter in signature.parameters.items():
        if name == "self" or name in arguments:
            continue
        if name in ("history", "item") and isinstance(parameter.default, str):
            arguments[name] = _argument(f"model.{name}", parameter.default, hints.get(name), schema)
        elif parameter.default is inspect.Parameter.empty and name != "item_num":
            raise UserError(f"missing key 'model.{name}': {cls.__name__} needs {', '.join(valid)}")
    if "item_num" in valid and "item_num" not in arguments:
        arguments["item_num"] = arguments["history"].table.rows
    try:
        return cls(**arguments)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error


def _with_widths(config: RunConfig, cls: type[Model], schema: FeatureSchema) -> FeatureSchema:
    """The run's `embedding.dim` for tables without a width, unless the model sets widths itself."""
    dim = config.embedding.dim
    if cls.table_width is not None:
        own = config.model.parameters.get(cls.table_width)
        if dim is not None and own is not None and dim != own:
            raise UserError(f"embedding.dim is {dim}, but model.{cls.table_width} is {own}; leave embedding.dim out")
        return schema
    dim = dim or DEFAULT_DIM
    return dataclasses.replace(schema, features=tuple(with_width(feature, dim) for feature in schema.features))


_KINDS: tuple[Any, ...] = typing.get_args(Feature)


def _argument(where: str, value: Any, hint: Any, schema: FeatureSchema) -> Any:
    """A YAML value as the constructor's annotation wants it: names become features, plain values are type-checked."""
    kinds = _feature_kinds(hint)
    if not kinds:
        _check_type(where, value, hint)
        return value
    if value is None and type(None) in typing.get_args(hint):
        return None
    if list in {typing.get_origin(option) for option in (hint, *typing.get_args(hint))}:
        if not isinstance(value, list):
            raise UserError(f"{where}: write a list of feature names, got {value!r}")
        return [_feature(where, name, kinds, schema) for name in value]
    return _feature(where, value, kinds, schema)


def _feature(where: str, name: Any, kinds: set[Any], schema: FeatureSchema) -> Feature:
    names = [feature.name for feature in schema.features]
    if name not in names:
        raise UserError(f"{where}: the data set has no feature {name!r}: {nearest(str(name), names)}")
    feature = schema[name]
    if type(feature) not in kinds:
        wanted = " or ".join(sorted(kind.kind for kind in kinds))
        raise UserError(f"{where}: feature {name!r} is {feature.kind}, but a {wanted} feature is needed here")
    return feature


def _feature_kinds(hint: Any) -> set[Any]:
    if hint in _KINDS:
        return {hint}
    return {kind for argument in typing.get_args(hint) for kind in _feature_kinds(argument)}


def _check_type(where: str, value: Any, hint: Any) -> None:
    """Type-check a plain value against an annotation of numbers, strings, lists and unions."""
    if not _fits(value, hint):
        name = getattr(hint, "__name__", None) if typing.get_origin(hint) is None else str(hint).replace("typing.", "")
        raise UserError(f"{where}: should be {name or hint}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, typing.get_args(hint)[0]) for v in value)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is not None:
        return any(_fits(value, argument) for argument in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def _labels(config: RunConfig, schema: FeatureSchema) -> tuple[Label, ...]:
    by_name = {label.name: label for label in schema.labels}
    wanted = config.data.labels if config.data.labels is not None else tuple(by_name)
    for name in wanted:
        if name not in by_name:
            raise UserError(f"data.labels: the data set has no label {name!r}: {nearest(name, by_name)}")
    return tuple(by_name[name] for name in wanted)


def _objective(config: RunConfig, chosen: ObjectiveConfig, model: Model, labels: tuple[Label, ...]) -> Objective:
    name = config.model.name
    if chosen.name not in model.objectives:
        raise UserError(f"objective.name: {name} is trained by {' or '.join(model.objectives)}, not by {chosen.name}")
    if len(labels) != model.num_tasks:
        raise UserError(
            f"data.labels: {len(labels)} label(s) ({', '.join(label.name for label in labels)}), but {name} as "
            f"configured has {model.num_tasks} task(s); name as many labels as it has tasks"
        )
    for label, kind in zip(labels, model.task_types or (), strict=model.task_types is not None):
        if label.type != kind:
            raise UserError(f"model.task_types: {kind} for label {label.name!r}, which is of type {label.type}")
    if isinstance(chosen, RetrievalConfig):
        assert isinstance(model, RecallModel)
        return RetrievalObjective(chosen, model, labels)
    if isinstance(chosen, EntireSpaceConfig):
        return EntireSpaceObjective(chosen, labels)
    return PointwiseObjective(chosen, labels)
