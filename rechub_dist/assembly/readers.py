"""The readers of a run's splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rechub_dist.assembly.parts import Parts
from rechub_dist.batch import Batch
from rechub_dist.config import MixSource, RunConfig, Selection, Source
from rechub_dist.data.columns.extremes import check_extremes
from rechub_dist.data.columns.fit import check_schema, file_columns, reading
from rechub_dist.data.counts import count_positives
from rechub_dist.data.order.mix import Mix
from rechub_dist.data.order.quality import layout_warning
from rechub_dist.data.parquet.kinds import agree
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.storage import exists, is_remote, join
from rechub_dist.data.passes import Epochs, Partitions, Passes
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.spec import BatchSpec
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.errors import UserError
from rechub_dist.features import CrossFeature, SequenceFeature, SparseFeature
from rechub_dist.objectives.negatives import NEGATIVES
from rechub_dist.objectives.ranking import Ranking


def with_draws(parts: Parts, rt: Runtime) -> Parts:
    """The parts of a run whose negatives may depend on the train split's items; called on every rank.

    Raises:
        UserError: no such data, or data or a file of weights that does not fit.
    """
    negatives, config = parts.train_module.objective.negatives, parts.config
    if negatives is None:
        return parts
    if negatives.needs_counts and config.data.follow:
        raise UserError(
            "data.follow: how often an item is in train is not known while it grows; use objective.sampling uniform or "
            "file, and objective.log_q: false"
        )
    if negatives.needs_counts:
        item, history = negatives.item.feature, negatives.learned_history
        assert isinstance(item, SparseFeature) and isinstance(history, SequenceFeature | None)  # noqa: PT018
        negatives.set_counts(_counts(parts, rt, item, history))
    weights = rt.together(lambda: negatives.draw_weights(config.storage))
    if weights is None:
        return parts
    return replace(parts, spec=replace(parts.spec, cumulative={NEGATIVES: np.cumsum(weights)}))


def _counts(parts: Parts, rt: Runtime, item: SparseFeature, history: SequenceFeature | None) -> Tensor:
    """How often each item is a positive in what is trained on, [items], over all ranks; called on every rank."""
    config = parts.config
    data = config.data
    paths: list[Source] = [data.train] if data.mix is None else [source.path for source in data.mix]
    manifests = [read_manifest(config, rt, path, parts.spec) for path in paths]
    derived = parts.spec.derived
    counts = [
        rt.all_reduce_sum(
            rt.together(lambda m=manifest: count_positives(m, item, history, rt.rank, rt.world_size, derived))  # type: ignore[misc]
        )
        for manifest in manifests
    ]
    if data.mix is None:
        return counts[0]
    # a source's rows come as often as its weight says, however many they are
    rows, weights = sum(manifest.rows for manifest in manifests), sum(source.weight for source in data.mix)
    shares = [
        count.double() * (source.weight / weights * rows / manifest.rows)
        for count, source, manifest in zip(counts, data.mix, manifests, strict=True)
    ]
    return torch.stack(shares).sum(dim=0)


def below_root(config: RunConfig, source: Source) -> list[str | Selection]:
    """The paths, or selections of their rows, that a source stands for, with the data's root before them."""

    def below(item: str | Selection) -> str | Selection:
        if isinstance(item, Selection):
            return item.model_copy(update={"path": join(config.data.root, item.path)})
        return join(config.data.root, item)

    return [below(item) for item in (source if isinstance(source, tuple) else (source,))]


def read_manifest(
    config: RunConfig, rt: Runtime, source: Source, spec: BatchSpec, *, may_skip: bool = True
) -> Manifest:
    """The manifest of files below the data's root that fit `spec`, the same on every rank; called on every rank.

    Of local files each rank lists and reads for itself (hosts may have copies of their own), then all compare. What
    lies in a store is listed once, and the files are divided among the ranks.

    Raises:
        UserError: no such data, bad files (which are left out if the configuration and `may_skip` say so), files that
            do not fit, or ranks that see different files.
    """

    def fit(schema: pa.Schema, where: str) -> dict[str, str]:
        return file_columns(schema, spec, where)

    sources = below_root(config, source)
    skip = may_skip and config.data.on_bad_file == "skip"
    if all(is_remote(item if isinstance(item, str) else item.path) for item in sources):
        manifest = Manifest.read(sources, config.storage, skip_bad=skip, ranks=rt, fit=fit)
    else:
        manifest = rt.together(lambda: Manifest.read(sources, config.storage, skip_bad=skip, fit=fit))
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
    training = split == "train"
    read = parts if training else _with_keys(parts, rt)
    manifest = read_manifest(config, rt, getattr(config.data, split), read.spec)
    return rt.together(lambda: _reader(config, read, rt, manifest, training=training))


def open_passes(config: RunConfig, parts: Parts, rt: Runtime) -> Passes:
    """What this rank trains on; called on every rank.

    Raises:
        UserError: no such data, or data that does not fit the schema.
    """
    data = config.data
    if data.order == "sequential-partitions":
        train = data.train
        assert not isinstance(train, tuple)  # the configuration says so
        folder = train if isinstance(train, str) else train.path

        def partition(name: str) -> ParquetReader:
            path = join(folder, name)
            part = path if isinstance(train, str) else train.model_copy(update={"path": path})
            manifest = read_manifest(config, rt, part, parts.spec)
            return rt.together(lambda: _reader(config, parts, rt, manifest, training=True))

        passes: Passes = Partitions(
            join(data.root, folder),
            partition,
            rt,
            config.storage,
            follow=data.follow,
            timeout_seconds=data.follow_timeout_seconds,
        )
    elif data.mix is not None:
        passes = _mixed(config, parts, rt, data.mix)
    else:
        reader = open_reader(config, parts, rt, "train")
        passes = Epochs(reader, config.train.epochs, reader.manifest.fingerprint())
    if not passes.steps and not data.follow:
        raise UserError(
            f"{data.root}: there is no batch of {data.batch_size} rows in its train data; lower data.batch_size, or "
            "leave data.drop_last out"
        )
    return passes


def _mixed(config: RunConfig, parts: Parts, rt: Runtime, sources: tuple[MixSource, ...]) -> Epochs:
    """Epochs over a mix of sources."""
    manifests = [read_manifest(config, rt, source.path, parts.spec) for source in sources]
    uses = [set(reading(parts.spec, manifest.schema.names).uses) for manifest in manifests]
    for manifest, own in zip(manifests, uses, strict=True):
        if own != uses[0]:
            raise UserError(
                f"data.mix: {manifests[0].path} and {manifest.path} differ in the derived columns that their files "
                f"hold ({', '.join(sorted(own ^ uses[0]))}); write them alike"
            )
    mix = Mix(
        groups=tuple(len(manifest.counts) for manifest in manifests),
        weights=tuple(source.weight for source in sources),
        repeat=tuple(source.repeat for source in sources),
    )
    united = replace(
        manifests[0],
        path=", ".join(manifest.path for manifest in manifests),
        files=tuple(file for manifest in manifests for file in manifest.files),
        left_out=tuple(file for manifest in manifests for file in manifest.left_out),
    )

    def open_mix() -> ParquetReader:
        try:
            return _reader(config, parts, rt, united, training=True, mix=mix)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"data.mix: {error}; raise data.batch_size or its weight, or give it more rows") from error

    data = [
        {"data": manifest.fingerprint(), "weight": source.weight, "repeat": source.repeat}
        for manifest, source in zip(manifests, sources, strict=True)
    ]
    return Epochs(rt.together(open_mix), config.train.epochs, data)


def warning_of(config: RunConfig, reader: ParquetReader) -> str | None:
    """What is to be told of how the training data lies, as one line; None where nothing is."""
    data, manifest = config.data, reader.manifest
    if not data.shuffle or data.mix is not None:
        return None
    return layout_warning(
        manifest.path,
        manifest.counts,
        data.batch_size,
        reader.world_size,
        shuffle_rows=data.shuffle_rows,
        max_streams=data.max_streams,
    )


def evaluation_reader(config: RunConfig, parts: Parts, rt: Runtime, path: str) -> ParquetReader:
    """This rank's reader of any data (not below the root), unshuffled; called on every rank."""
    read = _with_keys(parts, rt)
    manifest = read_manifest(config, rt, path if "://" in path else str(Path(path).absolute()), read.spec)
    return rt.together(lambda: _reader(config, read, rt, manifest, training=False))


def evaluation_spec(parts: Parts, rt: Runtime) -> BatchSpec:
    """What is read to evaluate: labels, the columns that metrics group by, and nothing that only training draws."""
    return _undrawn(_with_keys(parts, rt).spec, parts)


def _with_keys(parts: Parts, rt: Runtime) -> Parts:
    """The parts, with the columns that metrics group by among what is read."""
    objective, evaluation = parts.train_module.objective, parts.config.evaluation
    return replace(parts, spec=replace(parts.spec, keys=rt.together(lambda: objective.group_keys(evaluation))))


def prediction_spec(parts: Parts) -> BatchSpec:
    """What is read to predict: no labels; of a recall model no items either, and nothing that only training draws."""
    spec, ranking = replace(parts.spec, labels=(), weight=None, keys=()), parts.train_module.objective.ranking
    if ranking is not None:
        lookups = parts.train_module.model.lookups()
        read = {lookup.feature for lookup in lookups if lookup not in ranking.lookups}
        read |= {part for feature in read if isinstance(feature, CrossFeature) for part in feature.inputs}
        idle = frozenset(lookup.feature.name for lookup in ranking.lookups if lookup.feature not in read)
        spec = replace(
            spec,
            features=tuple(feature for feature in spec.features if feature.name not in idle),
            dense=tuple(feature for feature in spec.dense if feature not in ranking.dense),
            idle=idle,
        )
    return _undrawn(spec, parts)


def prediction_reader(config: RunConfig, parts: Parts, rt: Runtime, path: str) -> ParquetReader:
    """This rank's reader of data without labels; for a recall model without items, too. Called on every rank.

    Raises:
        UserError: no such data, bad files, or data that does not fit the schema.
    """
    unlabelled = replace(parts, spec=prediction_spec(parts))
    source = path if "://" in path else str(Path(path).absolute())
    manifest = read_manifest(config, rt, source, unlabelled.spec, may_skip=False)
    return rt.together(lambda: _reader(config, unlabelled, rt, manifest, training=False))


def evaluation_batch_size(config: RunConfig) -> int:
    """Rows of a global batch where nothing is trained."""
    return config.data.eval_batch_size or config.data.batch_size


def _undrawn(spec: BatchSpec, parts: Parts) -> BatchSpec:
    """The same without what the objective draws."""
    drawn = {lookup.feature.name for lookup in parts.train_module.objective.lookups()}
    return replace(spec, idle=spec.idle | drawn)


def _reader(
    config: RunConfig, parts: Parts, rt: Runtime, manifest: Manifest, *, training: bool, mix: Mix | None = None
) -> ParquetReader:
    data = config.data
    return ParquetReader(
        manifest,
        parts.spec if training else _undrawn(parts.spec, parts),
        batch_size=data.batch_size if training else evaluation_batch_size(config),
        rank=rt.rank,
        world_size=rt.world_size,
        shuffle=data.shuffle and training,
        seed=config.seed,
        shuffle_rows=data.shuffle_rows,
        max_streams=data.max_streams,
        prefetch=data.prefetch,
        drop_last=data.drop_last and training,
        mix=mix,
        # In evaluation the order is free, and a stream a rank lets each open its own row groups only.
        streams=None if training else rt.world_size,
        finish=_for_device(parts, training=training) if looks_ahead(rt.device) else None,
    )


def _for_device(parts: Parts, *, training: bool) -> Callable[[Batch], Batch]:
    """What the thread that reads does with batches for a device: from page-locked memory a copy there blocks no one.

    Torch keeps such memory, and gives it out again when the copies from it are done.
    """

    def finish(batch: Batch) -> Batch:
        if training:
            parts.train_module.objective.prepare(batch)
        return batch.pin_memory()

    return finish


def optional_reader(config: RunConfig, parts: Parts, rt: Runtime, split: str) -> ParquetReader | None:
    """The split's reader, unless the configuration leaves it out, or it is the default and not there.

    Called on every rank.
    """
    name = getattr(config.data, split)
    path = join(config.data.root, split)
    if name is None or (name == split and not rt.together(lambda: exists(path, config.storage))):
        return None
    reader = open_reader(config, parts, rt, split)
    rt.together(lambda: check_extremes(reader.manifest.files[rt.rank :: rt.world_size], reader.spec))
    return reader


def check_kinds(train: ParquetReader, other: ParquetReader, spec: BatchSpec) -> None:
    """Make sure that what a split is evaluated on means what it means in train.

    Raises:
        UserError: a column holds numbers here and strings there, say, of which hashes and vocabularies make other ids.
    """
    trained = check_schema(train.manifest.schema, spec, train.manifest.path)
    for column, kind in check_schema(other.manifest.schema, spec, other.manifest.path).items():
        if not agree(kind, trained[column]):
            raise UserError(
                f"{other.manifest.path}: column {column!r} is {kind} here and {trained[column]} in "
                f"{train.manifest.path}, so that its values would be others than those trained on; write it alike"
            )


def check_items(parts: Parts, rt: Runtime) -> None:
    """Look at the items that evaluations of a recall model will read, before it is trained; called on every rank.

    Raises:
        UserError: no such data, or data that does not fit.
    """
    ranking = parts.train_module.objective.ranking
    if ranking is not None and not ranking.ids_alone:
        spec = items_spec(ranking, parts.spec)
        manifest = read_manifest(parts.config, rt, parts.config.data.items, spec, may_skip=False)
        rt.together(lambda: check_extremes(manifest.files[rt.rank :: rt.world_size], spec))


def items_spec(ranking: Ranking, spec: BatchSpec) -> BatchSpec:
    """What is read of the items, in one collection `items`; `spec` is that of the run."""
    features = tuple(dict.fromkeys(lookup.feature for lookup in ranking.lookups))
    collections = {"items": tuple(f.name for f in features)}
    return BatchSpec(features, ranking.dense, collections=collections, derived=spec.derived)


def looks_ahead(device: torch.device) -> bool:
    """Whether batches are got ready one ahead: where another one than the host computes, which has time for it."""
    return device.type != "cpu"
