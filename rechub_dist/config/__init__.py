"""The configuration of a run: one immutable, typed tree, read from strict YAML."""

from rechub_dist.config.data import DataConfig, MixSource, Selection, Source, StorageConfig
from rechub_dist.config.evaluation import EvaluationConfig, MetricConfig
from rechub_dist.config.objectives import (
    EntireSpaceConfig,
    ObjectiveConfig,
    OwnObjectiveConfig,
    PointwiseConfig,
    RetrievalConfig,
    SamplingConfig,
)
from rechub_dist.config.optimization import (
    CommunicationConfig,
    DenseRule,
    EmbeddingConfig,
    OptimizerConfig,
    ScheduleConfig,
    Sharding,
    TableOptimizerConfig,
    TableRule,
)
from rechub_dist.config.run import (
    ModelConfig,
    RunConfig,
    changed,
    default_objective,
    read_run,
    run_from,
    stored_run,
    stored_tree,
)
from rechub_dist.config.section import Section
from rechub_dist.config.strict_yaml import parse_yaml, read_yaml
from rechub_dist.config.training import CheckpointConfig, DistributedConfig, MonitorConfig, TrainConfig
from rechub_dist.config.versions import VERSION
from rechub_dist.config.warm_start import PretrainedConfig, WarmStartConfig

__all__ = [
    "VERSION",
    "CheckpointConfig",
    "CommunicationConfig",
    "DataConfig",
    "DenseRule",
    "DistributedConfig",
    "EmbeddingConfig",
    "EntireSpaceConfig",
    "EvaluationConfig",
    "MetricConfig",
    "MixSource",
    "ModelConfig",
    "MonitorConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "OwnObjectiveConfig",
    "PointwiseConfig",
    "PretrainedConfig",
    "RetrievalConfig",
    "RunConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "Section",
    "Selection",
    "Sharding",
    "Source",
    "StorageConfig",
    "TableOptimizerConfig",
    "TableRule",
    "TrainConfig",
    "WarmStartConfig",
    "changed",
    "default_objective",
    "parse_yaml",
    "read_run",
    "read_yaml",
    "run_from",
    "stored_run",
    "stored_tree",
]
