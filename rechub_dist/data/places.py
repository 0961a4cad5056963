"""All files and folders that the ranks of a run open, by the keys that name them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rechub_dist.config import RetrievalConfig, RunConfig, Selection
from rechub_dist.data.parquet.storage import join


class Place(NamedTuple):
    """A file or folder of a run.

    Attributes:
        key: the key of the run file that names it.
        address: the path or address that ranks open; relative ones of data are already below the data's root.
        written: whether ranks write there, and create it where it is missing.
        path_only: whether it must be a path, not an address.
    """

    key: str
    address: str
    written: bool = False
    path_only: bool = False


def places(config: RunConfig) -> Iterator[Place]:
    """The places of a run: the output first, then what is read, then the checkpoints.

    The schema's file is not among them: it is read before there are ranks.
    """
    yield Place("output_dir", str(config.output_dir), written=True, path_only=True)
    yield from _of_data(config)
    if isinstance(config.objective, RetrievalConfig) and config.objective.sampling.path is not None:
        yield Place("objective.sampling.path", str(config.objective.sampling.path), path_only=True)
    if config.warm_start is not None:
        if config.warm_start.from_ is not None:
            yield Place("warm_start.from", config.warm_start.from_)
        for number, vectors in enumerate(config.warm_start.embeddings):
            yield Place(f"warm_start.embeddings.{number}.file", vectors.file)
    yield Place("checkpoint.folder", config.checkpoint_folder, written=True)


def _of_data(config: RunConfig) -> Iterator[Place]:
    data = config.data
    yield Place("data.root", data.root)
    splits = ["valid", "test", "items"]
    if data.mix is None:
        splits.insert(0, "train")
    for number, source in enumerate(data.mix or ()):
        yield Place(f"data.mix.{number}.path", join(data.root, source.path))
    for split in splits:
        sources = getattr(data, split)
        for number, source in enumerate(sources if isinstance(sources, tuple) else (sources,)):
            key = f"data.{split}.{number}" if isinstance(sources, tuple) else f"data.{split}"
            if isinstance(source, Selection):
                yield Place(f"{key}.path", join(data.root, source.path))
            elif source is not None:
                yield Place(key, join(data.root, source))
    schema = data.dataset if isinstance(data.dataset, dict) else {}
    for where, features in (("data.dataset.features", schema.get("features")), ("data.features", data.features)):
        for name, feature in (features or {}).items():
            vocabulary = feature.get("vocabulary") if isinstance(feature, dict) else None
            if isinstance(vocabulary, str):
                yield Place(f"{where}.{name}.vocabulary", join(data.root, vocabulary))
