"""Configuration of the training loop, checkpoints, monitoring and process groups."""

from __future__ import annotations

import itertools
from typing import Literal

from pydantic import Field, field_validator

from rechub_dist.config.data import StorageConfig
from rechub_dist.config.section import MAX_COUNT, MAX_FLOAT, MAX_SECONDS, Section


class RateChange(Section):
    """A factor of all learning rates, relative to what the schedules say, from a step on."""

    step: int = Field(ge=0, le=MAX_COUNT, description="how many steps have been done when it begins")
    factor: float = Field(ge=0, le=MAX_FLOAT, description="of all learning rates from then on")


class TrainConfig(Section):
    """How long to train, when to evaluate and what to report."""

    epochs: int = Field(1, gt=0, le=MAX_COUNT, description="passes over the training data")
    max_steps: int | None = Field(
        None, gt=0, le=MAX_COUNT, description="stop after so many steps, even within an epoch"
    )
    log_every: int = Field(50, gt=0, le=MAX_COUNT, description="steps between training records")
    eval_every: int | None = Field(
        None, gt=0, le=MAX_COUNT, description="steps between evaluations; default: every eval_epochs epochs"
    )
    eval_epochs: int = Field(1, gt=0, le=MAX_COUNT, description="epochs between evaluations if eval_every is not set")
    best_metric: str | None = Field(
        None, description="valid metric that selects the best checkpoint; default: the first reported"
    )
    best_mode: Literal["max", "min"] | None = Field(
        None,
        description="overrides what is best for best_metric; default: lowest for losses and errors, nearest to 1 for "
        "calibration, highest for all others",
    )
    patience: int | None = Field(
        None, gt=0, le=MAX_COUNT, description="early stopping: stop after so many evaluations without improvement"
    )
    on_non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="non-finite guard, for a step whose loss is NaN or infinite: end the run, or skip the update",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="precision of the model's matrix products in training; bf16: by autocast, with weights, tables, "
        "losses and evaluation in fp32",
    )
    tf32: bool = Field(
        False, description="compute fp32 matrix products in training in TF32; needs an Ampere or newer GPU"
    )
    compile: bool = Field(
        False,
        description="torch.compile the model for training; the first step may take minutes; needs a C++ compiler",
    )
    accumulate: int = Field(
        1,
        gt=0,
        le=MAX_COUNT,
        description="compute a batch in so many parts, whose gradients add up, to save memory; replicated tables only",
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of an exponential moving average of the dense parameters, which is evaluated and exported",
    )
    max_loss: float | None = Field(None, gt=0, description="treat a loss above this as non-finite")
    lr_changes: tuple[RateChange, ...] = Field(
        (),
        description="factors of all learning rates from a step on, until the next one; may be changed when a run "
        "resumes, for steps that it has not done",
    )
    trace_rows: bool = Field(False, description="log the stored rows that each step trained on, below output_dir/rows")
    histograms: bool = Field(True, description="write histograms of predictions and of table row norms to TensorBoard")

    @field_validator("lr_changes")
    @classmethod
    def _one_after_the_other(cls, given: tuple[RateChange, ...]) -> tuple[RateChange, ...]:
        if any(later.step <= change.step for change, later in itertools.pairwise(given)):
            raise ValueError("the steps must rise")
        return given


class CheckpointConfig(Section):
    """When and where to save checkpoints, and which to keep besides the best."""

    every_steps: int | None = Field(
        None, gt=0, le=MAX_COUNT, description="steps between checkpoints; default: every epoch"
    )
    keep_last: int = Field(2, gt=0, le=MAX_COUNT, description="number of newest checkpoints to keep")
    keep_every: int | None = Field(
        None, gt=0, le=MAX_COUNT, description="also keep every checkpoint whose step is a multiple of this"
    )
    folder: str | None = Field(
        None, description="path or address, such as s3://bucket/run; default: <output_dir>/checkpoints"
    )
    asynchronous: bool = Field(
        True,
        description="copy the state to host memory, then write it while training continues; false: training waits",
    )
    copy_gb: float | None = Field(
        None,
        ge=0,
        le=1 << 20,
        description="GiB of host memory for a rank's copy; the rest of its state is written before training goes on; "
        "default: its share of half of the host's free memory",
    )
    storage: StorageConfig | None = Field(
        None, description="storage settings of folder and warm_start; default: data.storage"
    )


class MonitorConfig(Section):
    """Monitoring: metrics endpoint, profiling and log format."""

    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="serve Prometheus metrics; each rank on this port plus its local rank"
    )
    metrics_address: str = Field(
        "127.0.0.1", description="address on which metrics_port is served; 0.0.0.0: all of the host, as in pods"
    )
    profile_every: int | None = Field(
        1000,
        gt=1,
        le=MAX_COUNT,
        description="profile one step in so many: time for data, embedding, dense and communication; null: never",
    )
    profile_steps: int | None = Field(
        None,
        gt=0,
        le=1000,
        description="trace so many steps after the first 10 and print where their time goes; as train --profile",
    )
    json_lines: bool = Field(False, description="log rank 0's messages to stderr as JSON lines")


class DistributedConfig(Section):
    """Process groups, timeouts and the training pipeline."""

    timeout_seconds: float = Field(300.0, gt=0, le=MAX_SECONDS, description="timeout of collectives")
    stall_seconds: float | None = Field(
        None,
        gt=0,
        le=MAX_SECONDS,
        description="end a rank after so long without progress; default: 0.8 timeout_seconds",
    )
    lease_seconds: float = Field(
        60.0,
        ge=1,
        le=MAX_SECONDS,
        description="seconds without a heartbeat after which a lease on output_dir or checkpoint.folder expires",
    )
    threads: int | None = Field(
        None, gt=0, le=4096, description="torch threads per rank; default: cores / local world size"
    )
    bucket_mb: int = Field(
        25, gt=0, le=1 << 20, description="size of DDP's gradient buckets in MB, all-reduced while backward continues"
    )
    pipeline: Literal["auto", "base", "sparse_dist"] = Field(
        "auto",
        description="training pipeline; auto: base on CPU, sparse_dist on CUDA, which overlaps the all-to-all of ids "
        "with compute and prefetches rows of fused_uvm_caching tables into the cache (not with on_non_finite: skip)",
    )
