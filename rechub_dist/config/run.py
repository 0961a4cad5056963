"""The configuration of a run: read from a run file, overridden by `--set a.b=c`, validated before anything runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from rechub_dist.config.code import check_name, is_code
from rechub_dist.config.data import DataConfig, StorageConfig
from rechub_dist.config.evaluation import DEFAULT, EvaluationConfig, from_objective
from rechub_dist.config.locations import Location, with_locations
from rechub_dist.config.objectives import OWN, ObjectiveConfig
from rechub_dist.config.optimization import EmbeddingConfig, OptimizerConfig
from rechub_dist.config.secrets import refuse_secret_value, refuse_secrets
from rechub_dist.config.section import Section
from rechub_dist.config.strict_yaml import MAX_DEPTH, dump_yaml, parse_value, parse_yaml, read_yaml
from rechub_dist.config.training import CheckpointConfig, DistributedConfig, MonitorConfig, TrainConfig
from rechub_dist.config.versions import RENAMED, with_current_keys, with_finite_limits, with_former_defaults
from rechub_dist.config.warm_start import WarmStartConfig
from rechub_dist.errors import UserError, nearest, shortened, shown
from rechub_dist.redaction import is_secret, without_secrets
from rechub_dist.typed import complaint

_MOST = 3  # mistakes that one line tells


class ModelConfig(BaseModel):
    """The model's class name, or package.module:Class of your own; further keys are its constructor's parameters."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str

    @field_validator("name")
    @classmethod
    def _is_named(cls, given: str) -> str:
        return check_name(given, ()) if is_code(given) else given  # model names are checked later

    @property
    def parameters(self) -> dict[str, Any]:
        """The constructor's parameters, as written in the run file."""
        return dict(self.model_extra or {})


class RunConfig(Section):
    """The configuration of a run."""

    version: int = Field(1, ge=1, description="version of the defaults that omitted keys have; default: 1")
    output_dir: Path = Field(description="local folder for config.yaml, metrics, logs, checkpoints and TensorBoard")
    seed: int = Field(2024, ge=0, lt=1 << 63, description="seed of initial weights, row order, dropout and negatives")
    code: Path | None = Field(
        None,
        description="folder with the code that package.module:Name refers to; default: the run file's folder",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if available, else cpu")
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig | None = Field(None, description="default: retrieval for recall models, else pointwise")
    evaluation: EvaluationConfig = EvaluationConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    distributed: DistributedConfig = DistributedConfig()
    monitor: MonitorConfig = MonitorConfig()
    warm_start: WarmStartConfig | None = Field(None, description="initial weights from another run or from files")

    @field_validator("output_dir", mode="before")
    @classmethod
    def _is_local(cls, given: Any) -> Any:
        if "://" in str(given):
            raise ValueError(
                f"{given} is an address, but logs and metrics need a local folder; set one, and set "
                "checkpoint.folder to the address"
            )
        return given

    @model_validator(mode="after")
    def _one_pass_over_partitions(self) -> Self:
        if self.data.order == "sequential-partitions" and self.train.epochs != 1:
            raise ValueError("data.order: sequential-partitions makes one pass; leave train.epochs at 1")
        return self

    @property
    def storage(self) -> StorageConfig:
        """The data's storage settings, with a deadline that expires before the other ranks' timeout."""
        # a third: a row group whose read-ahead failed is tried once more when it is needed
        deadline = min(self.data.storage.deadline_seconds, self.distributed.timeout_seconds / 3)
        return self.data.storage.model_copy(update={"deadline_seconds": deadline})

    @property
    def checkpoint_storage(self) -> StorageConfig:
        """The checkpoints' storage settings."""
        return self.checkpoint.storage or self.data.storage

    @property
    def checkpoint_folder(self) -> str:
        """The checkpoint folder: a path or an address."""
        return self.checkpoint.folder or str(self.output_dir / "checkpoints")

    def anchored(self, folder: Path) -> RunConfig:
        """The same run with relative paths resolved against `folder`, for processes in another working directory."""

        def anchored(place: Location) -> str:
            return place.address if "://" in place.address or place.below_root else str(folder / place.address)

        return with_locations(self, anchored)

    def dump(self) -> str:
        """The complete configuration as YAML, a valid run file, without secrets."""
        return dump_yaml(_public(self.model_dump(mode="json", by_alias=True)), width=120)

    def dump_given(self) -> str:
        """As `dump`, without keys that were not set."""
        return dump_yaml(_public(self.model_dump(mode="json", by_alias=True, exclude_unset=True)), width=110)

    def dump_changed(self) -> str:
        """As `dump`, without keys that have their defaults."""
        return dump_yaml(_public(self.model_dump(mode="json", by_alias=True, exclude_defaults=True)), width=110)


def _public(tree: dict[str, Any]) -> dict[str, Any]:
    """A dumped run without the secrets of its storages: those of runs that were begun before they were refused."""
    for section in ("data", "checkpoint"):
        storage = tree.get(section, {}).get("storage")
        if storage and storage.get("options"):
            storage["options"] = without_secrets(storage["options"])
    return tree


def read_run(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run file, apply `section.key=value` overrides and validate it. The data is not read, nor the schema.

    Raises:
        UserError: the file cannot be read, or has unknown keys, invalid values or secrets; names the key.
    """
    tree = read_yaml(path)
    refuse_secrets(tree, str(path))
    return _changed(tree, str(path), overrides)


def run_from(tree: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """As `read_run`, from a run file's content as a tree, which is not modified.

    Raises:
        UserError: as `read_run`.
    """
    refuse_secrets(tree, "the run")
    return _changed(copy.deepcopy(dict(tree)), "the run", overrides)


def _changed(tree: dict[str, Any], where: str, overrides: Iterable[str]) -> RunConfig:
    try:
        tree = with_current_keys(tree)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    for one in overrides:
        override(tree, one)
    return _validate(tree, where)


def changed(config: RunConfig, values: Mapping[str, Any], where: str) -> RunConfig:
    """Return the run with other values for dotted keys; `where` names their source in errors.

    Raises:
        UserError: an unknown key, or a value of the wrong type.
    """
    tree = config.model_dump(mode="json", by_alias=True)
    for key, value in values.items():
        _put(tree, key, value, f"{where}: {key}")
    return _validate(tree, where)


def with_metrics(config: RunConfig, more: Iterable[str]) -> RunConfig:
    """Return the run with more metrics to report: names, or YAML with a name and parameters.

    Raises:
        UserError: an item is neither.
    """
    found = [parse_value(text, f"--metric {shortened(text, 120)}") for text in more]
    if not found:
        return config
    own = config.evaluation.model_dump(mode="json", by_alias=True, exclude_unset=True).get("metrics", [DEFAULT])
    return changed(config, {"evaluation.metrics": [*own, *found]}, "--metric")


def stored_run(text: str, where: str, overrides: Iterable[str] = ()) -> RunConfig:
    """Parse the configuration stored in the checkpoint `where`. Omitted keys have the defaults of its version.

    Raises:
        UserError: it is damaged, has keys or values that this version does not know, or an override is invalid.
    """
    tree = stored_tree(text, where)
    try:
        found = _validate(tree, where)
    except UserError as error:
        raise UserError(f"{error}; if a newer rechub_dist wrote it, upgrade this one") from error
    changes = list(overrides)
    return _changed(tree, where, changes) if changes else found


def stored_tree(text: str | bytes, where: str) -> dict[str, Any]:
    """The content of the configuration that a run has stored at `where`, as YAML, whatever version wrote it.

    Raises:
        UserError: it is not one.
    """
    try:
        return with_finite_limits(parse_yaml(text, where, finite=False))
    except UserError as error:
        raise UserError(
            f"{error}; no run has stored this as its configuration: put back a copy, or remove it"
        ) from error


def default_objective(config: RunConfig, name: str) -> ObjectiveConfig:
    """The objective of that name with the defaults of the run's version."""
    tree = with_former_defaults({"version": config.version, "objective": {"name": name}})
    found: ObjectiveConfig = TypeAdapter(ObjectiveConfig).validate_python(tree["objective"])
    return found


def override(tree: dict[str, Any], given: str) -> None:
    """Set a key of a tree, as `--set section.key=value` does. Raises UserError."""
    key, equals, text = given.partition("=")
    where = f"--set {shortened(given, 120)}"
    if not equals or not all(key.split(".")) or key.count(".") > MAX_DEPTH:
        raise UserError(f"{where}: write section.key=value")
    if is_secret(key.rpartition(".")[2], text):  # which an error would quote
        where = f"--set {key}"
    value = parse_value(text, where)
    refuse_secret_value(key, value, "--set")
    _put(tree, key, value, where)


def _put(tree: dict[str, Any], key: str, value: Any, where: str) -> None:
    *parents, leaf = RENAMED.get(key, key).split(".")
    node = tree
    for parent in parents:
        if (child := node.get(parent)) is None:  # not given, or given as null: `objective: null`
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"{where}: {parent!r} is a value, not a section; leave out what follows it")
        node = child
    node[leaf] = value


def _validate(tree: Mapping[str, Any], where: str) -> RunConfig:
    try:
        tree = from_objective(with_former_defaults(with_current_keys(tree)))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    try:
        text = json.dumps(tree, default=str)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: no tree of plain values with names as keys: {error}") from error
    try:
        return RunConfig.model_validate_json(text)
    except ValidationError as error:
        found = error.errors()
        more = f"; and {len(found) - _MOST} more" if len(found) > _MOST else ""
        raise UserError(f"{where}: {'; '.join(_explain(e) for e in found[:_MOST])}{more}") from error


def _explain(error: Any) -> str:
    loc = [str(part) for part in error["loc"] if part != OWN]  # the tag of a union, no key
    if error["type"] == "extra_forbidden":
        return f"unknown key {shown('.'.join(loc))}: {nearest(loc[-1], _fields(loc[:-1]))}"
    return complaint(".".join(loc), error)


def _fields(path: list[str]) -> list[str]:
    """The valid keys of the section at `path`."""
    classes: list[type[BaseModel]] = [RunConfig]
    for part in path:
        annotations = [c.model_fields[part].annotation for c in classes if part in c.model_fields]
        if annotations:
            classes = _sections(annotations[0])
        # Otherwise a list index or the tag of a union: the candidates stay the same.
        tagged = [c for c in classes if "name" in c.model_fields and c.model_fields["name"].default == part]
        classes = tagged or classes
    return sorted({field.alias or name for c in classes for name, field in c.model_fields.items()})


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [c for argument in getattr(annotation, "__args__", ()) for c in _sections(argument)]
