"""Configuration of the data: sources, storage and batching."""

from __future__ import annotations

from typing import Any, Final, Literal, Self

from pydantic import Field, model_validator

from rechub_dist.config.section import MAX_BATCH, MAX_FLOAT, MAX_ROWS, MAX_SECONDS, Section

SHUFFLE_ROWS: Final = 8_000_000
MAX_STREAMS: Final = 64


class MixSource(Section):
    """One source of a mix of training data."""

    path: str = Field(description="folder, file or glob below root")
    weight: float = Field(1.0, gt=0, le=MAX_FLOAT, description="share of a batch's rows, relative to the other weights")
    repeat: bool = Field(
        False,
        description="restart when exhausted; an epoch ends when the first source without repeat is exhausted",
    )


class StorageConfig(Section):
    """Access to files, mainly in object stores: endpoints, timeouts and retries.

    Credentials come from the environment (such as `AWS_ACCESS_KEY_ID`) or from where the store's own tools find them.
    In place of a secret, `options` name an environment variable: `{env: RECHUB_SECRET_NAME}`.
    """

    endpoint: str | None = Field(None, description="address of a server other than AWS's or Google's: http://host:port")
    region: str | None = Field(None, description="S3 region; default: from the environment, else that of the bucket")
    anonymous: bool = Field(False, description="access public S3 or Google buckets without credentials")
    connect_timeout_seconds: float = Field(
        10.0, gt=0, le=MAX_SECONDS, description="S3: seconds to establish a connection"
    )
    request_timeout_seconds: float = Field(
        20.0, gt=0, le=MAX_SECONDS, description="S3: seconds that a request may make no progress"
    )
    client_attempts: int = Field(3, gt=0, le=1_000_000, description="S3: attempts of the client itself per request")
    attempt_seconds: float = Field(
        45.0,
        gt=0,
        le=MAX_SECONDS,
        description="seconds for one attempt to read a row group, after which it counts as failed",
    )
    deadline_seconds: float = Field(
        100.0,
        gt=0,
        le=MAX_SECONDS,
        description="seconds for all attempts to read a row group, after which the run fails; capped at a third of "
        "distributed.timeout_seconds, so that the other ranks do not time out first",
    )
    cache: bool = Field(
        True, description="cache Parquet footers in $XDG_CACHE_HOME/rechub-dist (default ~/.cache/rechub-dist)"
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        repr=False,
        description="more arguments for the file system: pyarrow's, or fsspec's where pyarrow has none; {env: "
        "RECHUB_SECRET_NAME}: the value of that environment variable",
    )


class Selection(Section):
    """The rows of a path that meet conditions on hive partitions (`date=2022-04-25` in the path) or columns.

    Partition keys select files; they do not become columns. Row groups are always decoded whole, so a key that is often
    filtered by is better stored as a partition.
    """

    path: str = Field(description="folder, file, glob or address")
    where: tuple[tuple[str, Literal["=", "==", "!=", "<", "<=", ">", ">=", "in", "not in"], Any], ...] = Field(
        (), description='conditions, which must all hold: [[date, ">=", "2022-04-25"], [country, in, [de, fr]]]'
    )


Source = str | Selection | tuple[str | Selection, ...]


class DataConfig(Section):
    """Where the rows come from, and how they are shuffled and batched."""

    root: str = Field(description="folder of a prepared data set: a path, or an address such as s3://bucket/folder")
    dataset: str | dict[str, Any] | None = Field(
        None, description="schema: a YAML file (relative to the run file) or inline; default <root>/dataset.yaml"
    )
    features: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="more features, such as crosses, or replacements for features of the schema"
    )
    train: Source = Field(
        "train",
        description="train split: folder, file or glob, below root or elsewhere; {path: ..., where: ...}; or a list",
    )
    valid: Source | None = Field("valid", description="validation split; null: none")
    test: Source | None = Field("test", description="test split, evaluated at the end; null: none")
    items: Source = Field("items", description="one row per item, for recall models whose items have several features")
    labels: tuple[str, ...] | None = Field(
        None, description="labels to train on, in this order; default: all labels of the schema"
    )
    batch_size: int = Field(4096, gt=0, le=MAX_BATCH, description="rows of a global batch, over all ranks together")
    eval_batch_size: int | None = Field(
        None, gt=0, le=MAX_BATCH, description="rows of a global batch in evaluation; default: batch_size"
    )
    mix: tuple[MixSource, ...] | None = Field(
        None,
        min_length=1,
        description="instead of train: sources that each contribute a fixed number of rows to every batch; a source "
        "longer than the epoch continues in the next one where it stopped",
    )
    order: Literal["epochs", "sequential-partitions"] = Field(
        "epochs",
        description="epochs: each epoch is a pass over all rows of train; sequential-partitions: one pass over each of "
        "its sub-folders (such as date=2022-04-25) in name order, without batches across sub-folders",
    )
    follow: bool = Field(
        False,
        description="sequential-partitions: wait for new sub-folders; each is read once it contains a file _SUCCESS",
    )
    follow_timeout_seconds: float | None = Field(
        None,
        gt=0,
        le=MAX_SECONDS,
        description="follow: stop after so many seconds without a new sub-folder; null: wait forever",
    )
    drop_last: bool = Field(False, description="drop an incomplete last batch of each pass over train")
    shuffle: bool = Field(True, description="shuffle rows in each epoch, or within each partition")
    shuffle_rows: int = Field(
        SHUFFLE_ROWS,
        gt=0,
        le=MAX_ROWS,
        description="rows that all ranks together hold open for shuffling; up to a quarter more are read ahead",
    )
    max_streams: int = Field(
        MAX_STREAMS,
        gt=0,
        le=1 << 20,
        description="streams of row groups that a batch interleaves; with more ranks than this, raise it to the world "
        "size",
    )
    prefetch: int = Field(4, gt=0, le=1 << 16, description="batches that each rank prepares ahead")
    on_bad_file: Literal["error", "skip"] = Field(
        "error",
        description="a file that is corrupt, missing, replaced or has other columns: end the run, or skip its rows, "
        "count them and list them in skipped.jsonl",
    )
    storage: StorageConfig = StorageConfig()

    @model_validator(mode="after")
    def _follows_partitions(self) -> Self:
        if self.follow and self.order != "sequential-partitions":
            raise ValueError("follow: true needs order: sequential-partitions")
        if self.order == "sequential-partitions" and isinstance(self.train, tuple):
            raise ValueError("order: sequential-partitions needs a single folder as train")
        if self.mix is not None and self.order != "epochs":
            raise ValueError("mix needs order: epochs")
        if self.mix is not None and all(source.repeat for source in self.mix):
            raise ValueError("mix: at least one source must not repeat, so that an epoch ends")
        if self.follow_timeout_seconds is not None and not self.follow:
            raise ValueError("follow_timeout_seconds needs follow: true")
        return self
