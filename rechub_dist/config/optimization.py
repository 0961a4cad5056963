"""Configuration of embedding tables, optimizers and learning rate schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rechub_dist.config.code import check_name, is_code
from rechub_dist.config.section import MAX_COUNT, MAX_FLOAT, MAX_ROWS, ROW_WISE_ABOVE, Section
from rechub_dist.features import MAX_DIM

Beta = Annotated[float, Field(ge=0, lt=1)]


DECAYS = ("linear", "cosine", "polynomial", "one_cycle")  # schedules over `decay_steps`
REDUCTIONS = ("step", "exponential", "plateau")  # schedules by factors of `gamma`
# What the keys that only some schedules have are for.
_OF_SCHEDULES = {
    "period": ("step", "exponential"),
    "gamma": REDUCTIONS,
    "power": ("polynomial",),
    "pct_start": ("one_cycle",),
    "div_factor": ("one_cycle",),
    "patience": ("plateau",),
}


class ScheduleConfig(Section):
    """Learning rate schedule: linear warm-up, then constant or decay to `final` times the base rate.

    With t steps since the warm-up, d = min(1, t / decay_steps) and f = final, the rate is the base rate times

    - constant: 1
    - linear: f + (1 - f) (1 - d); polynomial: f + (1 - f) (1 - d)^power; cosine: f + (1 - f) (1 + cos(pi d)) / 2
    - step: gamma^floor(t / period), exponential: gamma^(t / period), neither below f
    - one_cycle: by half a cosine wave from 1 / div_factor up to 1 at d = pct_start, and by another one down to f
    - plateau: gamma for each time that `patience` evaluations in a row have not improved on the best, not below f
    """

    name: Literal["constant", "linear", "cosine", "step", "exponential", "polynomial", "one_cycle", "plateau"] = Field(
        "constant", description="its shape; the formulas are above"
    )
    warmup_steps: int = Field(0, ge=0, le=MAX_COUNT, description="steps of linear warm-up")
    decay_steps: int | None = Field(
        None,
        gt=0,
        le=MAX_COUNT,
        description=f"{', '.join(DECAYS)}: steps of the decay, after warm-up; default: the rest of the run",
    )
    final: float = Field(0.0, ge=0, le=1, description="learning rate after the decay, relative to the base rate")
    period: int | None = Field(None, gt=0, le=MAX_COUNT, description="step, exponential: steps per factor of gamma")
    gamma: float = Field(0.1, gt=0, lt=1, description="step, exponential, plateau: factor of a reduction")
    power: float = Field(1.0, gt=0, le=100, description="polynomial: exponent")
    pct_start: float = Field(0.3, gt=0, lt=1, description="one_cycle: share of decay_steps in which the rate rises")
    div_factor: float = Field(25.0, ge=1, le=MAX_FLOAT, description="one_cycle: base rate divided by the first one")
    patience: int = Field(
        3, gt=0, le=MAX_COUNT, description="plateau: evaluations without a better train.best_metric per factor of gamma"
    )

    @model_validator(mode="after")
    def _keys_of_its_own(self) -> Self:
        for key, names in _OF_SCHEDULES.items():
            if self.name not in names and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for {', '.join(names)}, not for {self.name}; leave it out")
        if self.name in _OF_SCHEDULES["period"] and self.period is None:
            raise ValueError(f"{self.name} needs period, the number of steps per factor of gamma")
        if self.name == "one_cycle" and self.warmup_steps:
            raise ValueError("one_cycle has a warm-up of its own (pct_start); leave warmup_steps out")
        return self


TABLE_OPTIMIZERS = (
    "sgd",
    "adagrad",
    "rowwise_adagrad",
    "adam",
    "lazy_adam",
    "partial_rowwise_adam",
    "momentum_sgd",
    "momentum_adagrad",
    "ftrl",
)
_OF_TABLE_OPTIMIZERS = {
    "initial_accumulator": ("adagrad", "rowwise_adagrad", "momentum_adagrad", "ftrl"),
    "momentum": ("momentum_sgd", "momentum_adagrad"),
    "l1": ("ftrl",),
    "l2": ("ftrl",),
    "beta": ("ftrl",),
}


class TableOptimizerConfig(Section):
    """The optimizer of embedding tables.

    `sgd`, `adagrad` and `rowwise_adagrad` compute the same updates under every sharding. The others need a replicated
    table: `adam` and `momentum_sgd` (which also update rows without a gradient), `momentum_adagrad`, `ftrl`, and a
    `package.module:Class` of a torch optimizer; or a sharded one on CUDA: `lazy_adam` and `partial_rowwise_adam`, which
    update only looked-up rows, the latter with one second moment a row.

    Weight decay is of the rows that a step looks up: one that no batch reads keeps its weights. Only `adam` decays all
    rows at each step, as it updates all.
    """

    name: str = Field(
        "rowwise_adagrad",
        description=f"{', '.join(TABLE_OPTIMIZERS)}, or package.module:Class of a torch optimizer",
    )
    lr: float = Field(0.02, gt=0, le=MAX_FLOAT, description="base learning rate")
    eps: float = Field(1e-8, gt=0, le=MAX_FLOAT, description="the Adagrads and the Adams: in divisors")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="the Adams: decay of both moments")
    weight_decay: float = Field(
        0.0,
        ge=0,
        le=MAX_FLOAT,
        description="weight decay of looked-up rows; sharded tables have it with rowwise_adagrad and on CUDA",
    )
    decay: Literal["l2", "decoupled"] = Field(
        "l2",
        description="l2: weight_decay times the weights is added to the gradient; decoupled: weights are multiplied by "
        "1 - lr weight_decay",
    )
    initial_accumulator: float = Field(
        0.0, ge=0, le=MAX_FLOAT, description="the Adagrads, ftrl: initial sum of squared gradients"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum_sgd, momentum_adagrad: momentum")
    l1: float = Field(0.0, ge=0, le=MAX_FLOAT, description="ftrl: weight of the absolute values; makes weights zero")
    l2: float = Field(0.0, ge=0, le=MAX_FLOAT, description="ftrl: weight of half the squares")
    beta: float = Field(1.0, ge=0, le=MAX_FLOAT, description="ftrl: makes the first steps smaller")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="arguments of a package.module:Class besides lr, eps and betas included"
    )

    @field_validator("name")
    @classmethod
    def _is_known(cls, given: str) -> str:
        return check_name(given, TABLE_OPTIMIZERS)

    @model_validator(mode="after")
    def _keys_of_its_own(self) -> Self:
        own = is_code(self.name)
        if self.arguments and not own:
            raise ValueError(f"arguments are for a package.module:Class; {self.name} takes its parameters beside lr")
        for key, names in _OF_TABLE_OPTIMIZERS.items():
            if self.name not in names and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for {', '.join(names)}, not for {self.name}; leave it out")
        if self.weight_decay and (own or self.name == "ftrl"):
            raise ValueError(f"{self.name} takes no weight_decay; write {'arguments' if own else 'l1 and l2'} instead")
        return self


Sharding = Literal["table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "replicated"]


def _of_a_kernel(given: Any) -> Any:
    if given == "bf16":
        raise ValueError("no kernel trains tables in bf16; use fp16 or fp32")
    return given


TablePrecision = Annotated[Literal["fp32", "fp16"], BeforeValidator(_of_a_kernel)]


class TableRule(Section):
    """Sharding, optimizer and initial weights of the tables whose name matches a glob pattern.

    The first matching rule applies.
    """

    tables: str = Field(description="glob pattern of table names, such as *.linear")
    sharding: Sharding | None = Field(None, description="as in embedding; default: that of embedding")
    kernel: Literal["fused", "fused_uvm", "fused_uvm_caching"] | None = Field(
        None, description="as in embedding; default: that of embedding"
    )
    cache_load_factor: float | None = Field(None, gt=0, lt=1, description="overrides embedding.cache_load_factor")
    precision: TablePrecision | None = Field(None, description="overrides embedding.precision")
    optimizer: TableOptimizerConfig | None = Field(None, description="overrides embedding.optimizer, as a whole")
    init_std: float | None = Field(
        None,
        ge=0,
        le=MAX_FLOAT,
        description="standard deviation of initial weights; overrides the schema and the model",
    )
    frozen: bool = Field(False, description="keep the initial (or warm-started) weights; it has no optimizer then")
    dropout: float | None = Field(None, ge=0, lt=1, description="overrides embedding.dropout")

    @model_validator(mode="after")
    def _frozen_without_optimizer(self) -> Self:
        if self.frozen and self.optimizer is not None:
            raise ValueError("a frozen table has no optimizer; leave out one of both")
        return self


def _of_a_codec(given: Any) -> Any:
    if given == "int8":
        raise ValueError(
            "TorchRec's codec for int8 fails under row_wise, and wherever a message is no multiple of 32 numbers; "
            "use fp16, or bf16 on CUDA"
        )
    return given


Exchanged = Annotated[Literal["fp32", "fp16", "bf16"], BeforeValidator(_of_a_codec)]


class CommunicationConfig(Section):
    """The precision in which vectors and gradients of sharded tables travel between ranks; all else is fp32."""

    forward: Exchanged = Field("fp32", description="of looked-up vectors; bf16 needs CUDA")
    backward: Exchanged = Field("fp32", description="of their gradients; bf16 needs CUDA")
    gradient_scale: float = Field(
        1.0,
        gt=0,
        le=65536,
        description="backward: fp16: multiplies gradients before they are sent, and divides them afterwards",
    )

    @model_validator(mode="after")
    def _scale_of_fp16(self) -> Self:
        if self.gradient_scale != 1 and self.backward != "fp16":
            raise ValueError(f"gradient_scale is for backward: fp16, not for {self.backward}; leave it out")
        return self


class EmbeddingConfig(Section):
    """The embedding tables: width, sharding, optimizer."""

    dim: int | None = Field(
        None, gt=0, le=MAX_DIM, description="width of tables for which neither schema nor model sets one"
    )
    sharding: Sharding | Literal["auto"] = Field(
        "auto",
        description="sharding of tables without a rule; auto: row_wise from row_wise_above rows up, else table_wise",
    )
    row_wise_above: int = Field(
        ROW_WISE_ABOVE, gt=0, le=MAX_ROWS, description="number of rows from which auto shards a table row-wise"
    )
    replicate_below: int = Field(
        0, ge=0, le=MAX_ROWS, description="replicate tables with fewer rows than this on every rank; 0: only by rule"
    )
    kernel: Literal["fused", "fused_uvm", "fused_uvm_caching"] = Field(
        "fused", description="compute kernel of sharded tables; the UVM kernels need CUDA"
    )
    cache_load_factor: float = Field(
        0.2, gt=0, lt=1, description="kernel fused_uvm_caching: fraction of a table's rows that the GPU caches"
    )
    precision: TablePrecision = Field(
        "fp32",
        description="of the weights of sharded tables: fp32 or fp16; replicated tables, optimizer states and what is "
        "looked up are fp32",
    )
    optimizer: TableOptimizerConfig = Field(TableOptimizerConfig(), description="of tables without a rule for it")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="of all tables' learning rates")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="in training, zero each element of looked-up vectors with this probability, and divide the others "
        "by 1 less it",
    )
    rules: tuple[TableRule, ...] = Field((), description="overrides for single tables; the first match applies")
    clip_norm: float | None = Field(
        None, gt=0, le=MAX_FLOAT, description="clip the norm of the tables' gradient to this; replicated tables only"
    )
    communication: CommunicationConfig = Field(
        CommunicationConfig(), description="precision of what sharded tables exchange"
    )
    memory_per_rank_gb: float | None = Field(
        None,
        gt=0,
        le=1 << 20,
        description="GiB that a rank may use for sharded tables, of GPU memory on CUDA, else of host memory; default: "
        "80% of the GPU's memory less what the rank's own parameters take, or 80% of its share of the host's memory",
    )
    plan: Path | None = Field(
        None,
        description="in training, put shards on the ranks that this plan has (rechub-dist plan --save, or that of a "
        "checkpoint); refused where tables or number of ranks are others; default: a new plan",
    )


DENSE_OPTIMIZERS = ("adam", "adamw", "sgd", "adagrad", "momentum_adagrad")


class DenseRule(Section):
    """Settings of the dense parameters whose name matches a glob pattern. The first matching rule applies."""

    parameters: str = Field(description="glob pattern of names of dense parameters, such as *.bias")
    lr: float | None = Field(None, gt=0, le=MAX_FLOAT, description="overrides optimizer.lr")
    weight_decay: float | None = Field(None, ge=0, le=MAX_FLOAT, description="overrides optimizer.weight_decay")
    frozen: bool = Field(False, description="keep the initial (or warm-started) values")

    @model_validator(mode="after")
    def _frozen_without_settings(self) -> Self:
        if self.frozen and (self.lr, self.weight_decay) != (None, None):
            raise ValueError("frozen parameters have neither lr nor weight_decay; leave out one of both")
        return self


class OptimizerConfig(Section):
    """The optimizer of the dense parameters."""

    name: str = Field(
        "adam",
        description="adam, adamw, sgd, adagrad, momentum_adagrad, or package.module:Class of a torch optimizer: "
        "torch.optim:RAdam",
    )
    lr: float = Field(1e-3, gt=0, le=MAX_FLOAT, description="base learning rate")
    weight_decay: float = Field(
        0.0, ge=0, le=MAX_FLOAT, description="added to gradients, times the parameter; adamw: apart from gradients"
    )
    weight_decay_of: Literal["all", "matrices"] = Field(
        "all", description="matrices: only of parameters of two or more dimensions, not of biases and norms"
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="adam, adamw: decay of both moments")
    eps: float = Field(1e-8, gt=0, le=MAX_FLOAT, description="adam, adamw and the Adagrads: in divisors")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum_adagrad: momentum")
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of a package.module:Class besides lr, including weight_decay, betas and eps",
    )
    clip_norm: float | None = Field(None, gt=0, le=MAX_FLOAT, description="clip the norm of the dense gradient to this")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="of the learning rate; below")
    rules: tuple[DenseRule, ...] = Field((), description="overrides for single parameters; the first match applies")

    @field_validator("name")
    @classmethod
    def _is_known(cls, given: str) -> str:
        return check_name(given, DENSE_OPTIMIZERS)

    @model_validator(mode="after")
    def _keys_of_its_own(self) -> Self:
        if self.arguments and not is_code(self.name):
            raise ValueError(f"arguments are for a package.module:Class; {self.name} takes its parameters beside lr")
        if self.name != "momentum_adagrad" and self.momentum != type(self).model_fields["momentum"].default:
            raise ValueError(f"momentum is for momentum_adagrad, not for {self.name}; leave it out")
        return self
