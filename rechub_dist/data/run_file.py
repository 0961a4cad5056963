"""Loads a run file together with the schema of its data set."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rechub_dist.config import DataConfig, ModelConfig, RunConfig, StorageConfig, parse_yaml, read_run
from rechub_dist.config.code import named_code
from rechub_dist.config.secrets import refuse_secrets
from rechub_dist.config.versions import with_former_defaults
from rechub_dist.errors import UserError
from rechub_dist.features import FeatureSchema
from rechub_dist.schema import parse_schema


def load_run(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The run that a run file describes, with `section.key=value` overrides applied and the schema inlined.

    Raises:
        UserError: unreadable YAML, duplicate or unknown keys, wrong types, no schema; the message names key and fix.
    """
    config = read_run(path, overrides)
    if config.code is None and named_code(config.model_dump()):
        config = config.model_copy(update={"code": path.parent})
    return resolve_dataset(config, base=path.parent)


def resolve_dataset(config: RunConfig, base: Path) -> RunConfig:
    """The same configuration with the schema inlined, so that it no longer depends on the run file's location.

    Raises:
        UserError: the schema's file is missing or unreadable.
    """
    dataset = config.data.dataset
    if not isinstance(dataset, dict):
        dataset = _schema(config, base)
    own = dataset.get("features") or {}
    if not isinstance(own, dict):
        raise UserError("dataset.features: write a mapping of names to mappings")
    features = {**own, **config.data.features}
    dataset = {**dataset, "features": features}
    filled = with_former_defaults({"version": config.version, "data": {"dataset": dataset}})["data"]["dataset"]
    data = config.data.model_copy(update={"dataset": filled, "features": {}})
    return config.model_copy(update={"data": data})


def schema_of(root: str, storage: StorageConfig | None = None) -> FeatureSchema:
    """The schema of a prepared data set, by its folder or address.

    Raises:
        UserError: the schema's file is missing or unreadable.
    """
    config = RunConfig(
        output_dir=Path(),
        data=DataConfig(root=root, storage=storage or StorageConfig()),
        model=ModelConfig(name="none"),
    )
    return parse_schema(_schema(config, Path()), root)


def _schema(config: RunConfig, base: Path) -> dict[str, Any]:
    """The content of the schema's file: the named one, relative to `base`, else dataset.yaml in the data's root."""
    from rechub_dist.data.parquet.storage import join, read_bytes  # noqa: PLC0415 - pyarrow is slow to import

    named, root = config.data.dataset, config.data.root
    path = join(root, "dataset.yaml") if named is None else join(str(base), str(named))
    text = read_bytes(path, config.storage)
    if text is None:
        raise UserError(
            f"data.root: {root} holds no dataset.yaml; prepare the data first (rechub-dist data prepare "
            f"or synthesize), or name the schema in data.dataset"
            if named is None
            else f"data.dataset: no such file: {path}; check the path"
        )
    schema = parse_yaml(text, path)
    refuse_secrets(schema, path)
    return schema
