"""Where the rows come from."""

from __future__ import annotations

from typing import Any, Final, Literal, Self

from pydantic import Field, model_validator

from rechub_dist.config.section import Section

SHUFFLE_ROWS: Final = 8_000_000
MAX_STREAMS: Final = 64


class MixSource(Section):
    """One of the sources that training batches are mixed of."""

    path: str = Field(description="folder, file or glob below root")
    weight: float = Field(1.0, gt=0, description="its rows in a batch are in proportion to it")
    repeat: bool = Field(
        False,
        description="begin anew as often as needed; an epoch ends with the first of the sources that do not repeat",
    )


class StorageConfig(Section):
    """How files are reached, on object stores above all, and how often they are retried.

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
    """The rows of a path that meet conditions, each on a hive partition (`date=2022-04-25` in the path) or a column.

    Partition keys choose files; they do not become columns. Row groups are read whole, so what is often chosen by is
    better a partition.
    """

    path: str = Field(description="folder, file, glob or address")
    where: tuple[tuple[str, Literal["=", "==", "!=", "<", "<=", ">", ">=", "in", "not in"], Any], ...] = Field(
        (), description='conditions, all of which must hold: [[date, ">=", "2022-04-25"], [country, in, [de, fr]]]'
    )


Source = str | Selection | tuple[str | Selection, ...]


class DataConfig(Section):
    """Where the rows come from and how they are put into batches."""

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
    shuffle_rows: int = Field(SHUFFLE_ROWS, gt=0, description="rows in the shuffle's windows over all ranks")
    max_streams: int = Field(
        MAX_STREAMS,
        gt=0,
        description="streams of row groups that a batch interleaves; with more ranks, raise it to their number",
    )
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
        if self.order == "sequential-partitions" and isinstance(self.train, tuple):
            raise ValueError("order: sequential-partitions goes with one folder as train")
        if self.mix is not None and self.order != "epochs":
            raise ValueError("mix goes with order: epochs")
        if self.mix is not None and all(source.repeat for source in self.mix):
            raise ValueError("mix: one source at least must not repeat, so that an epoch has an end")
        if self.follow_timeout_seconds is not None and not self.follow:
            raise ValueError("follow_timeout_seconds goes with follow: true")
        return self
