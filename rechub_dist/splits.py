"""The readers of a run's splits."""

from __future__ import annotations

from pathlib import Path

from rechub_dist.build import Parts
from rechub_dist.config import RunConfig
from rechub_dist.data.manifest import Manifest
from rechub_dist.data.reader import ParquetReader
from rechub_dist.distributed.runtime import Runtime


def open_reader(config: RunConfig, parts: Parts, rt: Runtime, split: str) -> ParquetReader:
    """This rank's reader of a split, `train` shuffled as configured, any other for evaluation.

    Raises:
        UserError: no such data, or data that does not fit the schema.
    """
    data = config.data
    path = data.root / str(getattr(data, split))
    return _reader(config, parts, rt, Manifest.read(str(path)), training=split == "train")


def evaluation_reader(config: RunConfig, parts: Parts, rt: Runtime, path: Path) -> ParquetReader:
    """This rank's reader of any data, unshuffled."""
    return _reader(config, parts, rt, Manifest.read(str(path)), training=False)


def _reader(config: RunConfig, parts: Parts, rt: Runtime, manifest: Manifest, *, training: bool) -> ParquetReader:
    data = config.data
    size = data.batch_size if training else (data.eval_batch_size or data.batch_size)
    return ParquetReader(
        manifest,
        parts.spec,
        batch_size=size,
        rank=rt.rank,
        world_size=rt.world_size,
        shuffle=data.shuffle and training,
        seed=config.seed,
        shuffle_rows=data.shuffle_rows,
        prefetch=data.prefetch,
        # In evaluation the order is free, and a lane a rank lets each open its own row groups only.
        lanes=None if training else rt.world_size,
    )


def optional_reader(config: RunConfig, parts: Parts, rt: Runtime, split: str) -> ParquetReader | None:
    """The split's reader, unless the configuration leaves it out, or it is the default and not there."""
    name = getattr(config.data, split)
    if name is None or (name == split and not (config.data.root / name).exists()):
        return None
    return open_reader(config, parts, rt, split)
