"""Tables, optimizers and schedules."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rechub_dist.config.code import check_name, is_code
from rechub_dist.config.section import Section


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
    cache_load_factor: float | None = Field(None, gt=0, lt=1, description="in place of embedding.cache_load_factor")
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
    cache_load_factor: float = Field(
        0.2, gt=0, lt=1, description="of tables with kernel fused_uvm_caching: the part of rows that the GPU caches"
    )
    optimizer: TableOptimizerConfig = TableOptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    rules: tuple[TableRule, ...] = ()
    memory_per_rank_gb: float | None = Field(
        None,
        gt=0,
        description="memory a rank may give to sharded tables, of its GPU if it has one; default: four fifths of the "
        "GPU's, less what the rank's own parameters take, or of its share of this host's",
    )


DENSE_OPTIMIZERS = ("adam", "adamw", "sgd", "adagrad")


class OptimizerConfig(Section):
    """The optimizer of the dense parameters."""

    name: str = Field(
        "adam",
        description="adam, adamw, sgd, adagrad, or package.module:Class of a torch.optim.Optimizer: torch.optim:RAdam",
    )
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="of a package.module:Class besides lr; weight_decay, betas and eps go here too",
    )
    clip_norm: float | None = Field(None, gt=0, description="largest norm of the dense gradient")
    schedule: ScheduleConfig = ScheduleConfig()

    @field_validator("name")
    @classmethod
    def _is_known(cls, given: str) -> str:
        return check_name(given, DENSE_OPTIMIZERS)

    @model_validator(mode="after")
    def _arguments_of_a_class(self) -> Self:
        if self.arguments and not is_code(self.name):
            raise ValueError(f"arguments are those of a package.module:Class; {self.name} has its keys beside lr")
        return self
