"""The readers of a run's splits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rechub_dist.build import Parts
from rechub_dist.config import MixSource, RunConfig
from rechub_dist.data.columns import check_schema
from rechub_dist.data.counts import count_positives
from rechub_dist.data.layout_quality import layout_warning
from rechub_dist.data.manifest import Manifest
from rechub_dist.data.mix import Mix
from rechub_dist.data.reader import ParquetReader
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.errors import UserError
from rechub_dist.features import SequenceFeature, SparseFeature
from rechub_dist.objectives import RetrievalObjective
from rechub_dist.objectives.retrieval import NEGATIVES
from rechub_dist.passes import Epochs, Partitions, Passes


def with_draws(parts: Parts, rt: Runtime) -> Parts:
    """The parts of a run whose negatives may depend on the train split's items; called on every rank.

    Raises:
        UserError: no such data, or data or a file of weights that does not fit.
    """
    objective, config = parts.step.objective, parts.config
    if not isinstance(objective, RetrievalObjective):
        return parts
    if objective.needs_counts and config.data.follow:
        raise UserError(
            "data.follow: how often an item is in train is not known while it grows; use objective.sampling uniform or "
            "file, and objective.log_q: false"
        )
    if objective.needs_counts:
        item, history = objective.item.feature, objective.learned_history
        assert isinstance(item, SparseFeature) and isinstance(history, SequenceFeature | None)  # noqa: PT018
        objective.set_counts(_counts(config, rt, item, history))
    weights = rt.together(objective.draw_weights)
    if weights is None:
        return parts
    return replace(parts, spec=replace(parts.spec, cumulative={NEGATIVES: np.cumsum(weights)}))


def _counts(config: RunConfig, rt: Runtime, item: SparseFeature, history: SequenceFeature | None) -> Tensor:
    """How often each item is a positive in what is trained on, [items], over all ranks; called on every rank."""
    data = config.data
    sources = data.mix or (MixSource(path=data.train),)
    manifests = [rt.together(lambda s=source: Manifest.read(str(data.root / s.path))) for source in sources]  # type: ignore[misc]
    counts = [
        rt.add_up(rt.together(lambda m=manifest: count_positives(m, item, history, rt.rank, rt.world_size)))  # type: ignore[misc]
        for manifest in manifests
    ]
    if data.mix is None:
        return counts[0]
    # a source's rows come as often as its weight says, however many they are
    rows, weights = sum(manifest.rows for manifest in manifests), sum(source.weight for source in sources)
    shares = [
        count.double() * (source.weight / weights * rows / manifest.rows)
        for count, source, manifest in zip(counts, sources, manifests, strict=True)
    ]
    return torch.stack(shares).sum(dim=0)


def open_reader(config: RunConfig, parts: Parts, rt: Runtime, split: str) -> ParquetReader:
    """This rank's reader of a split, `train` shuffled as configured, any other for evaluation.

    Raises:
        UserError: no such data, or data that does not fit the schema.
    """
    data = config.data
    path = data.root / str(getattr(data, split))
    return _reader(config, parts, rt, Manifest.read(str(path)), training=split == "train")


def open_passes(config: RunConfig, parts: Parts, rt: Runtime) -> Passes:
    """What this rank trains on; called on every rank.

    Raises:
        UserError: no such data, or data that does not fit the schema.
    """
    data = config.data
    if data.order == "sequential-partitions":
        path = f"{data.root / data.train}"

        def partition(name: str) -> ParquetReader:
            return rt.together(lambda: _reader(config, parts, rt, Manifest.read(f"{path}/{name}"), training=True))

        passes: Passes = Partitions(
            path, partition, rt, follow=data.follow, timeout_seconds=data.follow_timeout_seconds
        )
    elif data.mix is not None:
        passes = rt.together(lambda: _mixed(config, parts, rt))
    else:
        reader = rt.together(lambda: open_reader(config, parts, rt, "train"))
        passes = Epochs(reader, config.train.epochs, reader.manifest.fingerprint())
    if not passes.steps and not data.follow:
        raise UserError(
            f"{data.root / data.train}: there is no batch of {data.batch_size} rows in it; lower data.batch_size, or "
            "leave data.drop_last out"
        )
    return passes


def _mixed(config: RunConfig, parts: Parts, rt: Runtime) -> Epochs:
    """Epochs over a mix of sources."""
    assert config.data.mix is not None
    sources = config.data.mix
    manifests = [Manifest.read(str(config.data.root / source.path)) for source in sources]
    for manifest in manifests:
        check_schema(manifest.schema, parts.spec, manifest.path)
        if not manifest.filesystem.equals(manifests[0].filesystem):
            raise UserError(f"data.mix: {manifest.path} is in another store than {manifests[0].path}; copy one of them")
    mix = Mix(
        groups=tuple(len(manifest.counts) for manifest in manifests),
        weights=tuple(source.weight for source in sources),
        repeat=tuple(source.repeat for source in sources),
    )
    files = tuple(file for manifest in manifests for file in manifest.files)
    united = replace(manifests[0], path=", ".join(manifest.path for manifest in manifests), files=files)
    try:
        reader = _reader(config, parts, rt, united, training=True, mix=mix)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"data.mix: {error}; raise data.batch_size or its weight, or give it more rows") from error
    data = [
        {"data": manifest.fingerprint(), "weight": source.weight, "repeat": source.repeat}
        for manifest, source in zip(manifests, sources, strict=True)
    ]
    return Epochs(reader, config.train.epochs, data)


def warning_of(config: RunConfig, reader: ParquetReader) -> str | None:
    """What is to be told of how the training data lies, as one line; None where nothing is."""
    data, manifest = config.data, reader.manifest
    if not data.shuffle or data.mix is not None:
        return None
    return layout_warning(
        manifest.path, manifest.counts, data.batch_size, reader.world_size, shuffle_rows=data.shuffle_rows
    )


def evaluation_reader(config: RunConfig, parts: Parts, rt: Runtime, path: Path) -> ParquetReader:
    """This rank's reader of any data, unshuffled."""
    return _reader(config, parts, rt, Manifest.read(str(path)), training=False)


def _reader(
    config: RunConfig, parts: Parts, rt: Runtime, manifest: Manifest, *, training: bool, mix: Mix | None = None
) -> ParquetReader:
    data, spec = config.data, parts.spec
    if not training:
        drawn = {lookup.feature.name for lookup in parts.step.objective.lookups()}
        spec = replace(spec, idle=frozenset(drawn))
    size = data.batch_size if training else (data.eval_batch_size or data.batch_size)
    return ParquetReader(
        manifest,
        spec,
        batch_size=size,
        rank=rt.rank,
        world_size=rt.world_size,
        shuffle=data.shuffle and training,
        seed=config.seed,
        shuffle_rows=data.shuffle_rows,
        prefetch=data.prefetch,
        drop_last=data.drop_last and training,
        mix=mix,
        # In evaluation the order is free, and a lane a rank lets each open its own row groups only.
        lanes=None if training else rt.world_size,
    )


def optional_reader(config: RunConfig, parts: Parts, rt: Runtime, split: str) -> ParquetReader | None:
    """The split's reader, unless the configuration leaves it out, or it is the default and not there."""
    name = getattr(config.data, split)
    if name is None or (name == split and not (config.data.root / name).exists()):
        return None
    return open_reader(config, parts, rt, split)
