"""The readers of a run's splits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from rechub_dist.build import Parts
from rechub_dist.config import RunConfig, Selection, Source
from rechub_dist.data.counts import count_positives
from rechub_dist.data.manifest import Manifest
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.storage import exists, join
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.errors import UserError
from rechub_dist.features import SequenceFeature, SparseFeature
from rechub_dist.objectives import RetrievalObjective
from rechub_dist.objectives.retrieval import NEGATIVES


def with_draws(parts: Parts, rt: Runtime) -> Parts:
    """The parts of a run whose negatives may depend on the train split's items; called on every rank.

    Raises:
        UserError: no such data, or data or a file of weights that does not fit.
    """
    objective, config = parts.step.objective, parts.config
    if not isinstance(objective, RetrievalObjective):
        return parts
    if objective.needs_counts:
        manifest = read_manifest(config, rt, config.data.train)
        item, history = objective.item.feature, objective.learned_history
        assert isinstance(item, SparseFeature) and isinstance(history, SequenceFeature | None)  # noqa: PT018
        counts = rt.together(lambda: count_positives(manifest, item, history, rt.rank, rt.world_size))
        objective.set_counts(rt.add_up(counts))
    weights = rt.together(objective.draw_weights)
    if weights is None:
        return parts
    return replace(parts, spec=replace(parts.spec, cumulative={NEGATIVES: np.cumsum(weights)}))


def read_manifest(config: RunConfig, rt: Runtime, source: Source, *, may_skip: bool = True) -> Manifest:
    """The manifest of files below the data's root, the same on every rank; called on every rank.

    Each rank lists and reads for itself (hosts may have copies of their own), then all compare.

    Raises:
        UserError: no such data, bad files (which are left out if the configuration and `may_skip` say so), or ranks
            that see different files.
    """

    def below(item: str | Selection) -> str | Selection:
        if isinstance(item, Selection):
            return item.model_copy(update={"path": join(config.data.root, item.path)})
        return join(config.data.root, item)

    sources = [below(item) for item in (source if isinstance(source, tuple) else (source,))]
    skip = may_skip and config.data.on_bad_file == "skip"
    manifest = rt.together(lambda: Manifest.read(sources, config.storage, skip_bad=skip))
    seen = rt.gather_list([(manifest.fingerprint(), str(manifest.schema), len(manifest.files), manifest.rows)])
    for rank, other in enumerate(seen):
        if other[:2] != seen[0][:2]:
            raise UserError(
                f"{manifest.path}: rank 0 sees {seen[0][2]} file(s) of {seen[0][3]:,} rows, rank {rank} {other[2]} of "
                f"{other[3]:,}, with other names, row groups or columns; give all hosts the same data"
            )
    return manifest


def open_reader(config: RunConfig, parts: Parts, rt: Runtime, split: str) -> ParquetReader:
    """This rank's reader of a split, `train` shuffled as configured, any other for evaluation; called on every rank.

    Raises:
        UserError: no such data, or data that does not fit the schema.
    """
    manifest = read_manifest(config, rt, getattr(config.data, split))
    return rt.together(lambda: _reader(config, parts, rt, manifest, training=split == "train"))


def evaluation_reader(config: RunConfig, parts: Parts, rt: Runtime, path: str) -> ParquetReader:
    """This rank's reader of any data (not below the root), unshuffled; called on every rank."""
    manifest = read_manifest(config, rt, path if "://" in path else str(Path(path).absolute()))
    return rt.together(lambda: _reader(config, parts, rt, manifest, training=False))


def _reader(config: RunConfig, parts: Parts, rt: Runtime, manifest: Manifest, *, training: bool) -> ParquetReader:
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
        # In evaluation the order is free, and a lane a rank lets each open its own row groups only.
        lanes=None if training else rt.world_size,
    )


def optional_reader(config: RunConfig, parts: Parts, rt: Runtime, split: str) -> ParquetReader | None:
    """The split's reader, unless the configuration leaves it out, or it is the default and not there.

    Called on every rank.
    """
    name = getattr(config.data, split)
    path = join(config.data.root, split)
    if name is None or (name == split and not rt.together(lambda: exists(path, config.storage))):
        return None
    return open_reader(config, parts, rt, split)
