"""A run's configuration: one frozen tree from strict YAML, changed by `--set a.b=c`, checked before anything runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rechub_dist.errors import UserError, nearest, one_line


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


class MixSource(Section):
    """One of the sources that training batches are mixed of."""

    path: str = Field(description="folder, file or glob below root")
    weight: float = Field(1.0, gt=0, description="its rows in a batch are in proportion to it")
    repeat: bool = Field(
        False,
        description="begin anew as often as needed; an epoch ends with the first of the sources that do not repeat",
    )


class StorageConfig(Section):
    """How files are reached, on object stores above all, and how patiently.

    Credentials come from the environment (`AWS_ACCESS_KEY_ID`, for one) or the places that the store's own tools use.
    """

    endpoint: str | None = Field(None, description="of another server than AWS's or Google's: http://host:port")
    region: str | None = Field(None, description="of S3; default: the environment's, else the bucket's")
    anonymous: bool = Field(False, description="use public S3 or Google buckets without credentials")
    connect_timeout_seconds: float = Field(10.0, gt=0, description="to be connected, on S3")
    request_timeout_seconds: float = Field(20.0, gt=0, description="that a request may stand still, on S3")
    client_attempts: int = Field(3, gt=0, description="attempts of the S3 client itself at one request")
    attempt_seconds: float = Field(45.0, gt=0, description="for one attempt at a row group; then it counts as failed")
    deadline_seconds: float = Field(
        100.0,
        gt=0,
        description="for all attempts at a row group; then it is an error. At most a third of "
        "distributed.timeout_seconds is used, lest the other ranks give up first",
    )
    cache: bool = Field(
        True, description="keep the files' footers in the user's cache folder ($XDG_CACHE_HOME/rechub-dist)"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of pyarrow's file system or, for other addresses, fsspec's"
    )


class Selection(Section):
    """The files of a path whose hive partitions (`date=2022-04-25` in the path) meet conditions.

    Partition keys choose files; they do not become columns.
    """

    path: str = Field(description="folder, file, glob or address")
    where: tuple[tuple[str, Literal["=", "==", "!=", "<", "<=", ">", ">=", "in", "not in"], Any], ...] = Field(
        (), description='conditions, all of which must hold: [[date, ">=", "2022-04-25"], [country, in, [de, fr]]]'
    )


Source = str | Selection | tuple[str | Selection, ...]


class DataConfig(Section):
    """Where the rows come from and how they are dealt into batches."""

    root: str = Field(description="folder of a prepared data set: a path, or an address such as s3://bucket/folder")
    dataset: str | dict[str, Any] | None = Field(
        None, description="the schema: a YAML file (relative to the run file) or inline; default <root>/dataset.yaml"
    )
    features: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="further features (crosses, for one), or others in place of the schema's"
    )
    train: Source = Field(
        "train",
        description="train split: folder, file or glob below root or elsewhere, {path: ..., where: ...}, or a list",
    )
    valid: Source | None = Field("valid", description="validation split; null for none")
    test: Source | None = Field("test", description="test split, evaluated at the end; null for none")
    items: Source = Field("items", description="rows of all items, for recall models whose items have several features")
    labels: tuple[str, ...] | None = Field(None, description="labels to train on, in order; default all of the schema")
    batch_size: int = Field(4096, gt=0, description="rows of a global batch, over all ranks")
    eval_batch_size: int | None = Field(None, gt=0, description="global batch in evaluation; default batch_size")
    mix: tuple[MixSource, ...] | None = Field(
        None,
        min_length=1,
        description="in place of train: sources of which each batch has a fixed number of rows; those that are longer "
        "than an epoch go on in the next one where they are",
    )
    order: Literal["epochs", "sequential-partitions"] = Field(
        "epochs",
        description="epochs: each is a pass over all rows of train; sequential-partitions: one pass over each of its "
        "sub-folders (date=2022-04-25, for one) in the order of their names; a batch has rows of one of them",
    )
    follow: bool = Field(
        False,
        description="sequential-partitions: go on with new sub-folders as soon as each holds a file _SUCCESS",
    )
    follow_timeout_seconds: float | None = Field(
        None, gt=0, description="follow: end after so long without a new sub-folder; null: wait for ever"
    )
    drop_last: bool = Field(False, description="leave the last batch of each pass over train out where it is short")
    shuffle: bool = Field(True, description="shuffle rows anew each epoch, or within each partition")
    shuffle_rows: int = Field(8_000_000, gt=0, description="rows in the shuffle's windows over all ranks")
    prefetch: int = Field(4, gt=0, description="batches a rank prepares ahead")
    on_bad_file: Literal["error", "skip"] = Field(
        "error",
        description="of a file that is corrupt, missing, replaced or has other columns; skip: leave its rows out, "
        "count them and list them in skipped.jsonl",
    )
    storage: StorageConfig = StorageConfig()

    @model_validator(mode="after")
    def _follows_partitions(self) -> Self:
        if self.follow and self.order != "sequential-partitions":
            raise ValueError("follow: true goes with order: sequential-partitions")
        if self.order == "sequential-partitions" and not isinstance(self.train, str):
            raise ValueError("order: sequential-partitions goes with one folder as train")
        if self.mix is not None and self.order != "epochs":
            raise ValueError("mix goes with order: epochs")
        if self.mix is not None and all(source.repeat for source in self.mix):
            raise ValueError("mix: one source at least must not repeat, so that an epoch has an end")
        if self.follow_timeout_seconds is not None and not self.follow:
            raise ValueError("follow_timeout_seconds goes with follow: true")
        return self


class ScheduleConfig(Section):
    """The learning rate over the steps: linear warm-up, then constant, or decay to `final` of the base rate."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int | None = Field(None, gt=0, description="steps until the end of decay; needed by linear and cosine")
    final: float = Field(0.0, ge=0, le=1)


class TableOptimizerConfig(Section):
    """The optimizer of embedding tables.

    `sgd`, `adagrad` and `rowwise_adagrad` mean the same mathematics wherever a table lies. `adam` needs a replicated
    table (it moves rows without a gradient too); `lazy_adam`, which moves looked-up rows only, needs a sharded table on
    CUDA.
    """

    name: Literal["sgd", "adagrad", "rowwise_adagrad", "adam", "lazy_adam"] = "rowwise_adagrad"
    lr: float = Field(0.02, gt=0)
    eps: float = Field(1e-8, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)


Sharding = Literal["table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "replicated"]


class TableRule(Section):
    """Placement, optimizer and initial weights of the tables whose name matches a glob pattern.

    The first rule that matches decides.
    """

    tables: str = Field(description="glob pattern of table names, `*.linear` for instance")
    sharding: Sharding | None = None
    kernel: Literal["fused", "fused_uvm", "fused_uvm_caching"] | None = None
    optimizer: TableOptimizerConfig | None = None
    init_std: float | None = Field(None, ge=0, description="in place of the schema's or the model's")


class EmbeddingConfig(Section):
    """The embedding tables: width, placement, optimizer."""

    dim: int | None = Field(None, gt=0, description="width of tables to which neither schema nor model gives one")
    sharding: Sharding | Literal["auto"] = Field(
        "auto",
        description="of tables without a rule; auto: row_wise from row_wise_above rows, else table_wise",
    )
    row_wise_above: int = Field(1_000_000, gt=0, description="rows from which `auto` shards a table row-wise")
    replicate_below: int = Field(
        0, ge=0, description="tables of fewer rows than this are replicated on every rank (0: none, unless by rule)"
    )
    kernel: Literal["fused", "fused_uvm", "fused_uvm_caching"] = Field(
        "fused", description="compute kernel of sharded tables; the UVM kernels need CUDA"
    )
    optimizer: TableOptimizerConfig = TableOptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    rules: tuple[TableRule, ...] = ()
    memory_per_rank_gb: float | None = Field(
        None, gt=0, description="memory a rank may give to sharded tables; default: its share of this host's"
    )


class OptimizerConfig(Section):
    """The optimizer of the dense parameters."""

    name: Literal["adam", "adamw", "sgd", "adagrad"] = "adam"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    clip_norm: float | None = Field(None, gt=0, description="largest norm of the dense gradient")
    schedule: ScheduleConfig = ScheduleConfig()


class PointwiseConfig(Section):
    """Cross-entropy for classification labels, squared error for regression, summed with weights over the labels."""

    name: Literal["pointwise"] = "pointwise"
    task_weights: dict[str, float] = Field(default_factory=dict, description="by label; 1 where none is given")
    aux_weight: float = Field(1.0, ge=0, description="of the model's own further losses, DIEN's for one")


class EntireSpaceConfig(Section):
    """ESMM's loss over all impressions: that of a click, and that of a click with its conversion."""

    name: Literal["entire_space"] = "entire_space"
    task_weights: dict[str, float] = Field(default_factory=dict)


class SamplingConfig(Section):
    """How negatives are drawn from the items."""

    name: Literal["uniform", "popularity", "file"] = "uniform"
    power: float = Field(0.75, ge=0, description="popularity: items are drawn by their count in train to this power")
    path: Path | None = Field(None, description="file: a .npy array of one weight an item")

    @model_validator(mode="after")
    def _path_for_file(self) -> Self:
        if (self.name == "file") != (self.path is not None):
            raise ValueError("path is for sampling from a file: give name: file and path together")
        return self


class RetrievalConfig(Section):
    """Training of recall models on positives against negatives, and ranking of the whole catalogue in evaluation."""

    name: Literal["retrieval"] = "retrieval"
    loss: Literal["bce", "gbce", "softmax", "bpr", "bpr_max", "top1_max", "hinge"] | None = Field(
        None, description="default: what the model's paper trains it with"
    )
    negatives: Literal["sampled", "in_batch", "in_batch_and_sampled", "full"] | None = Field(
        None,
        description="what a positive is compared with: items drawn for each position, the other positives of the "
        "global batch, both (drawn ones shared by the batch), or all items; default: the model's",
    )
    num_negatives: int = Field(1, gt=0, description="drawn negatives a position; shared ones a row")
    share_negatives: bool = Field(False, description="compare each position with all negatives of the global batch")
    sampling: SamplingConfig = SamplingConfig()
    log_q: bool | None = Field(
        None,
        description="correct a softmax for how often an item is among the candidates; default: where they are shared",
    )
    margin: float | None = Field(None, gt=0, description="of the hinge loss; default: the model's")
    gbce_t: float = Field(0.75, ge=0, le=1, description="calibration of gbce; 0 is bce")
    regularization: float = Field(1.0, ge=0, description="of bpr_max")
    task_weights: dict[str, float] = Field(default_factory=dict, description="auxiliary tasks, by label")
    top_k: tuple[int, ...] = (5, 10, 20)
    exclude_seen: bool = Field(
        True, description="leave the items of the history, as long as the model reads it, out of the ranking"
    )
    sampled_items: int | None = Field(
        None, gt=0, description="rank also among so many drawn items, as older papers do; reported as sampled_..."
    )


ObjectiveConfig = Annotated[PointwiseConfig | EntireSpaceConfig | RetrievalConfig, Field(discriminator="name")]


class TrainConfig(Section):
    """How long to train, when to evaluate and what to report."""

    epochs: int = Field(1, gt=0)
    max_steps: int | None = Field(None, gt=0, description="stop after so many steps, whatever the epoch")
    log_every: int = Field(50, gt=0, description="steps between two training records")
    eval_every: int | None = Field(None, gt=0, description="steps between evaluations; default: every eval_epochs")
    eval_epochs: int = Field(1, gt=0, description="epochs between evaluations where eval_every is not set")
    best_metric: str | None = Field(
        None, description="metric of the valid split that names the best checkpoint; default: the first reported"
    )
    best_mode: Literal["max", "min"] = "max"
    patience: int | None = Field(None, gt=0, description="stop after so many evaluations without a better one")
    histograms: bool = Field(True, description="histograms of predictions and table norms in TensorBoard")


class CheckpointConfig(Section):
    """When to save, and how many to keep besides the best."""

    every_steps: int | None = Field(None, gt=0, description="steps between checkpoints; default: each epoch")
    keep_last: int = Field(2, gt=0)


class DistributedConfig(Section):
    """Process groups and pipeline."""

    timeout_seconds: float = Field(300.0, gt=0, description="how long a rank waits for its peers")
    threads: int | None = Field(None, gt=0, description="torch threads a rank; default: cores / local ranks")
    pipeline: Literal["auto", "base", "sparse_dist"] = Field(
        "auto", description="auto: sparse_dist on CUDA (overlaps id exchange with compute), base on CPU"
    )


class ModelConfig(BaseModel):
    """The model's class name, and its constructor's parameters beside it."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str

    @property
    def parameters(self) -> dict[str, Any]:
        """The constructor's parameters as written in the run file."""
        return dict(self.model_extra or {})


class RunConfig(Section):
    """A whole run."""

    output_dir: Path = Field(description="folder for config, metrics, checkpoints and TensorBoard logs")
    seed: int = Field(2024, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig | None = Field(None, description="default: retrieval for recall models, else pointwise")
    embedding: EmbeddingConfig = EmbeddingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    distributed: DistributedConfig = DistributedConfig()

    @model_validator(mode="after")
    def _one_pass_over_partitions(self) -> Self:
        if self.data.order == "sequential-partitions" and self.train.epochs != 1:
            raise ValueError("data.order: sequential-partitions is one pass; leave train.epochs at 1")
        return self

    @property
    def storage(self) -> StorageConfig:
        """The settings of storage, with a deadline before that of the other ranks."""
        # a third: a row group that is read ahead in vain is tried once more when it is needed
        deadline = min(self.data.storage.deadline_seconds, self.distributed.timeout_seconds / 3)
        return self.data.storage.model_copy(update={"deadline_seconds": deadline})

    def dump(self) -> str:
        """The configuration as YAML that can be launched again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def load_run(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run file, apply `section.key=value` overrides and inline the data set's schema.

    Raises:
        UserError: unreadable or duplicate YAML, unknown keys, wrong types; the message names key and fix.
    """
    tree = read_yaml(path)
    for override in overrides:
        _override(tree, override)
    config = _validate(tree, str(path))
    return resolve_dataset(config, base=path.parent)


def resolve_dataset(config: RunConfig, base: Path) -> RunConfig:
    """The same configuration with the schema inline, so that it does not depend on where the run file lies."""
    dataset = config.data.dataset
    if not isinstance(dataset, dict):
        dataset = _schema(config, base)
    features = {**(dataset.get("features") or {}), **config.data.features}
    data = config.data.model_copy(update={"dataset": {**dataset, "features": features}, "features": {}})
    return config.model_copy(update={"data": data})


def _schema(config: RunConfig, base: Path) -> dict[str, Any]:
    """The tree of the schema's file: named, and relative to `base`, or dataset.yaml of the data's root."""
    from rechub_dist.data.storage import join, read_text  # noqa: PLC0415 - pyarrow is slow to import

    named, root = config.data.dataset, config.data.root
    path = join(root, "dataset.yaml") if named is None else join(str(base), str(named))
    text = read_text(path, config.storage)
    if text is None:
        raise UserError(
            f"data.root: {root} holds no dataset.yaml; prepare the data first (rechub-dist data prepare "
            f"or synthesize), or name the schema in data.dataset"
            if named is None
            else f"data.dataset: no such file: {path}"
        )
    return parse_yaml(text, path)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {override}: write section.key=value")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {override}: {parent!r} is a value, not a section")
        node = child
    try:
        node[leaf] = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not YAML: {one_line(error)}") from error


def _validate(tree: Mapping[str, Any], where: str) -> RunConfig:
    try:
        return RunConfig.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_explain(e) for e in error.errors())) from error


def _explain(error: Any) -> str:
    loc = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        return f"unknown key {'.'.join(loc)!r}: {nearest(loc[-1], _fields(loc[:-1]))}"
    if error["type"] == "missing":
        return f"missing key {'.'.join(loc)!r}"
    if error["type"] == "value_error" and isinstance(error["input"], dict):  # of a section: it says what is wrong
        return ": ".join([part for part in (".".join(loc),) if part] + [str(error["ctx"]["error"])])
    return f"{'.'.join(loc)}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _fields(path: list[str]) -> list[str]:
    """The valid keys of the section at `path`."""
    classes: list[type[BaseModel]] = [RunConfig]
    for part in path:
        annotations = [c.model_fields[part].annotation for c in classes if part in c.model_fields]
        if annotations:
            classes = _sections(annotations[0])
        # Otherwise a list index, or the tag of a union: the classes stay the candidates.
        tagged = [c for c in classes if "name" in c.model_fields and c.model_fields["name"].default == part]
        classes = tagged or classes
    return sorted({name for c in classes for name in c.model_fields})


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [c for argument in getattr(annotation, "__args__", ()) for c in _sections(argument)]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; duplicate keys are refused, and 1e-3 is a number.

    Raises:
        UserError: the file is missing, is no YAML, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, path: str) -> dict[str, Any]:
    """As `read_yaml`, of the text of the file `path`."""
    try:
        tree = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not valid YAML: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no mapping of keys to values")
    return tree


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


# PyYAML follows YAML 1.1, where 1e-3 is a string.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)
