"""How a run proceeds: its length, checkpoints and process groups."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rechub_dist.config.data import StorageConfig
from rechub_dist.config.section import Section


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
    best_mode: Literal["max", "min"] | None = Field(
        None,
        description="max or min in place of the metric's own: losses and errors are the better, the lower they are, "
        "calibration the nearer to 1, all others the higher",
    )
    patience: int | None = Field(None, gt=0, description="stop after so many evaluations without a better one")
    on_non_finite: Literal["stop", "skip"] = Field(
        "stop", description="a step whose loss is not finite: end the run, or leave weights as they are and go on"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of the model's matrix products in training; bf16: by autocast, while weights, tables, losses and "
        "evaluation stay in fp32",
    )
    tf32: bool = Field(False, description="fp32 matrix products in training as TF32; needs a GPU, Ampere or newer")
    compile: bool = Field(
        False, description="compile the model for training by torch.compile: minutes at first; needs a C++ compiler"
    )
    max_loss: float | None = Field(None, gt=0, description="a loss beyond it is treated like one that is not finite")
    trace_rows: bool = Field(False, description="write which stored rows each step trained on, below output_dir/rows")
    histograms: bool = Field(True, description="histograms of predictions and table norms in TensorBoard")


class CheckpointConfig(Section):
    """When and where to save, and what to keep besides the best."""

    every_steps: int | None = Field(None, gt=0, description="steps between checkpoints; default: each epoch")
    keep_last: int = Field(2, gt=0, description="the newest ones to keep")
    keep_every: int | None = Field(None, gt=0, description="keep those of every so many steps for good, too")
    folder: str | None = Field(
        None, description="path or address, s3://bucket/run for one; default <output_dir>/checkpoints"
    )
    asynchronous: bool = Field(
        True,
        description="copy to host memory and train on while that is written; false: no copy, training waits",
    )
    storage: StorageConfig | None = Field(None, description="of folder and warm_start; default: data.storage")


class MonitorConfig(Section):
    """What a run tells machines."""

    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="serve Prometheus metrics: a rank at this port plus its number on the host"
    )
    profile_every: int | None = Field(
        1000, gt=1, description="steps between two whose time is divided: data, embedding, dense, communication"
    )
    json_lines: bool = Field(False, description="what the main rank tells on stderr as JSON, for log collectors")


class DistributedConfig(Section):
    """Process groups and pipeline."""

    timeout_seconds: float = Field(300.0, gt=0, description="how long a rank waits for its peers")
    stall_seconds: float | None = Field(
        None, gt=0, description="end a rank that makes no progress for so long; default: 0.8 timeout_seconds"
    )
    lease_seconds: float = Field(
        60.0, ge=1, description="silence after which whoever holds output_dir and checkpoint.folder counts as gone"
    )
    threads: int | None = Field(None, gt=0, description="torch threads a rank; default: cores / local ranks")
    bucket_mb: int = Field(
        25, gt=0, description="dense gradients, in MB, that ranks exchange at once while backward computes the others"
    )
    pipeline: Literal["auto", "base", "sparse_dist"] = Field(
        "auto",
        description="auto: base on CPU; on CUDA sparse_dist, which overlaps id exchange with compute, and where tables "
        "have kernel fused_uvm_caching, fetches their rows into the cache meanwhile (unless on_non_finite: skip)",
    )
