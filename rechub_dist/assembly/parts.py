"""Configuration -> the parts of a run: schema, model, objective, layout, reader specification. Local and pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rechub_dist.assembly.arguments import arguments_of
from rechub_dist.assembly.code import RETRIEVAL, call, metric_classes, model_class, named_loss, own_objective
from rechub_dist.assembly.losses import label_losses
from rechub_dist.assembly.outputs import check_outputs, outputs_for
from rechub_dist.assembly.precision import set_training
from rechub_dist.batch import Batch
from rechub_dist.config import (
    EntireSpaceConfig,
    ObjectiveConfig,
    OwnObjectiveConfig,
    RetrievalConfig,
    RunConfig,
    default_objective,
)
from rechub_dist.config.code import is_code
from rechub_dist.data.spec import BatchSpec
from rechub_dist.distributed.host import host_memory
from rechub_dist.embedding.dense import freeze
from rechub_dist.embedding.layout import REPLICATED, Layout, make_layout
from rechub_dist.embedding.stage import EmbeddingStage
from rechub_dist.errors import UserError, nearest
from rechub_dist.features import FeatureSchema, Label, SequenceFeature, with_width
from rechub_dist.metrics.catalogue import KnownMetrics
from rechub_dist.models import Model, RecallModel
from rechub_dist.objectives import EntireSpaceObjective, Objective, PointwiseObjective, RetrievalObjective
from rechub_dist.schema import parse_schema

OF_OBJECTIVE = "objective/"  # before the names of what is learnt of the objective
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

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """What the dense optimizer trains: the model's parameters by name, the objective's as `objective/<name>`."""
        own = {f"{OF_OBJECTIVE}{name}": value for name, value in self.objective.named_parameters()}
        return {**dict(self.model.named_parameters()), **own}

    def dense_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides the tables, live: the model's parameters and buffers, and what is learnt of
        the objective, by the names of `dense_parameters`.
        """
        own = {f"{OF_OBJECTIVE}{name}": value for name, value in self.objective.learned().items()}
        return {**self.model.state_dict(), **own}

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
class Parts(Plan):
    """The same with its tables, before any rank talks to another."""

    train_module: TrainModule


def plan(config: RunConfig, *, device: str, world_size: int) -> Plan:
    """Everything that can be checked without data and without other ranks; of the model the dense part alone is made.

    Raises:
        UserError: names the key or feature at fault and the fix.
    """
    if not isinstance(config.data.dataset, dict):  # which loading a run file inlines, and so a run stores
        raise UserError("data.dataset: a stored configuration has to hold the schema itself; put back a copy of it")
    schema = parse_schema(config.data.dataset, config.data.root)
    labels = _labels(config, schema)
    model = build_model(config, schema, labels)
    freeze(model, config.optimizer)
    set_training(model, config.train, device)
    if isinstance(model, RecallModel) and config.data.labels is None and not model.num_tasks:
        labels = ()  # whatever the schema has
    chosen = config.objective or default_objective(config, model.objectives[0])
    objective = _objective(config, chosen, model, labels)
    objective.set_metrics(KnownMetrics(metric_classes(config)))
    lookups = (*model.lookups(), *objective.lookups())
    layout = make_layout(lookups, config.embedding, device=device, world_size=world_size)
    trained = (not placed.frozen for placed in layout.tables.values())
    if not any(trained) and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("optimizer.rules and embedding.rules freeze every parameter and table; leave some out")
    _check_whole_gradients(config, layout, objective)
    spec = BatchSpec(
        features=tuple(layout.features.values()),
        dense=model.dense_features(),
        labels=labels,
        weight=schema.weight,
        collections=layout.collections,
        aligned=model.aligned_features(),
        derived=schema.derived,
        keys=objective.row_keys,
    )
    return Plan(config, schema, labels, layout, spec, model, chosen, objective)


def unheeded(found: Plan) -> list[str]:
    """A note where the run file gives the model a length of histories that is not what counts.

    A model cuts a history that is longer than it takes, or refuses it; a shorter one, and one that is a feature of the
    schema, stay as they are. Such run files were accepted from the first version on, so they are not refused.
    """
    histories = [lookup.feature for lookup in found.model.lookups() if isinstance(lookup.feature, SequenceFeature)]
    if not histories or is_code(found.config.model.name):
        return []
    history = max(histories, key=lambda feature: feature.max_length)
    given = {key: found.config.model.parameters.get(key) for key in ("max_seq_len", "max_len", "max_length")}
    return [
        f"note: model.{key} is {length}, but its longest history, {history.name!r}, has max_length "
        f"{history.max_length} in the schema, and that counts; change it there"
        for key, length in given.items()
        if length is not None and length != history.max_length
    ]


def _check_whole_gradients(config: RunConfig, layout: Layout, objective: Objective) -> None:
    """Refuse what needs the gradients of a whole batch in one place, where there are none."""
    asked = {"train.accumulate": config.train.accumulate > 1, "embedding.clip_norm": config.embedding.clip_norm}
    sharded = [name for name, table in layout.tables.items() if table.collection != REPLICATED and not table.frozen]
    if key := next((key for key, wanted in asked.items() if wanted and sharded), None):
        raise UserError(
            f"{key}: table {sharded[0]!r} is sharded, and a sharded table is updated within each backward pass, so "
            f"there is no gradient to clip or add to; replicate all (embedding.sharding: replicated), or leave it out"
        )
    if config.train.accumulate > 1 and any(table.collection != REPLICATED for table in layout.tables.values()):
        raise UserError("train.accumulate: needs frozen tables replicated, too; set sharding: replicated")
    if config.train.accumulate > 1 and objective.whole_batch:
        raise UserError(
            "train.accumulate: the objective compares rows of the whole batch, which is not there in parts: choose "
            "negatives: sampled, not shared, and neither group_loss nor a task_weighting by gradients, or leave it out"
        )


def build(config: RunConfig, *, device: str, world_size: int) -> Parts:
    """What a run is made of, with initial weights; raises as `plan`."""
    torch.manual_seed(config.seed)
    found = plan(config, device=device, world_size=world_size)
    replicated = [placed.table for placed in found.layout.tables_in(REPLICATED)]
    needed = sum(table.rows * table.stored_dim * 4 for table in replicated)
    _check_memory("embedding: the replicated tables", needed, "replicate smaller ones, and shard these")
    stage = EmbeddingStage(found.layout, found.model.dense_features(), config.seed)
    return Parts(**vars(found), train_module=TrainModule(stage, found.model, found.objective, world_size))


def build_model(config: RunConfig, schema: FeatureSchema, labels: tuple[Label, ...] = ()) -> Model:
    """The model that `model:` names, with feature names turned into the schema's features, and outputs for the labels.

    Raises:
        UserError: an unknown model, parameter or feature; a missing or ill-typed parameter; whatever the model refuses.
    """
    cls = model_class(config)
    schema = _with_widths(config, cls, schema)
    where = f"model ({cls.__name__})"
    arguments = arguments_of("model", cls, {**outputs_for(labels, cls), **config.model.parameters}, schema)
    if not is_code(config.model.name):  # a class of the user's own may do other things when it is made
        _check_size(where, cls, arguments)
    model: Model = call(where, cls, **arguments)
    return model


def _check_size(where: str, cls: type[Model], arguments: dict[str, Any]) -> None:
    """Refuse a model whose weights no memory here holds, before any of them is made."""
    with torch.device("meta"):
        model = call(where, cls, **arguments)
    needed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    _check_memory(f"{where}: its weights", needed, "lower its widths (hidden units, embedding_dim) or number of layers")


def _check_memory(what: str, needed: int, fix: str) -> None:
    """Refuse what the host's memory does not hold; to find out by making it would stop other work on the host."""
    memory = host_memory()
    if needed > memory:
        raise UserError(f"{what} take {needed / 2**30:,.0f} GiB, and this host has {memory / 2**30:,.0f} GiB; {fix}")


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


def _labels(config: RunConfig, schema: FeatureSchema) -> tuple[Label, ...]:
    by_name = {label.name: label for label in schema.labels}
    wanted = config.data.labels if config.data.labels is not None else tuple(by_name)
    for name in wanted:
        if name not in by_name:
            raise UserError(f"data.labels: the data set has no label {name!r}: {nearest(name, by_name)}")
    return tuple(by_name[name] for name in wanted)


def _objective(config: RunConfig, chosen: ObjectiveConfig, model: Model, labels: tuple[Label, ...]) -> Objective:
    name = config.model.name
    if not isinstance(chosen, OwnObjectiveConfig) and chosen.name not in model.objectives:
        raise UserError(f"objective.name: {name} is trained by {' or '.join(model.objectives)}, not by {chosen.name}")
    if len(labels) != model.num_tasks:
        raise UserError(
            f"data.labels: {len(labels)} label(s) ({', '.join(label.name for label in labels)}), but {name} as "
            f"configured has {model.num_tasks} task(s); name as many labels as it has tasks"
        )
    for label, kind in zip(labels, model.task_types or (), strict=model.task_types is not None):
        if label.type != kind:
            raise UserError(
                f"model.task_types: {kind} for label {label.name!r}, which is of type {label.type}; make them alike"
            )
    check_outputs(name, model, labels)
    if isinstance(chosen, OwnObjectiveConfig):
        return own_objective(config, chosen, model, labels)
    if isinstance(chosen, RetrievalConfig):
        assert isinstance(model, RecallModel)
        if chosen.temperature is not None and "temperature" in config.model.parameters:
            raise UserError(
                f"objective.temperature: takes the place of {name}'s own; give it alone, or model.temperature alone"
            )
        return RetrievalObjective(chosen, model, labels, named_loss(config, chosen, RETRIEVAL))
    if isinstance(chosen, EntireSpaceConfig):
        return EntireSpaceObjective(chosen, labels)
    if chosen.weighs_gradients and config.train.compile:
        raise UserError(
            f"train.compile: what is compiled has one backward pass a step, and objective.task_weighting: "
            f"{chosen.task_weighting} makes one for each label; leave one of them out"
        )
    return PointwiseObjective(chosen, labels, label_losses(config, chosen, labels), model.shared_parameters())
