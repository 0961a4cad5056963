"""A bundle's model card: what a reader wants to know of a model before using it."""

from __future__ import annotations

from typing import Final

from rechub_dist.checkpoint.manifest import CheckpointManifest
from rechub_dist.checkpoint.position import position_of
from rechub_dist.config import RunConfig
from rechub_dist.features import FeatureSchema
from rechub_dist.inference.bundle.manifest import BundleManifest
from rechub_dist.reporting.records import read_records

CARD: Final = "README.md"
_SPLITS: Final = ("valid", "test")
_NO_METRICS: Final = ("samples_per_second", "step", "epoch", "split")


def metrics_of(config: RunConfig, checkpoint: CheckpointManifest) -> dict[str, float]:
    """The metrics of a checkpoint's weights, by `split.name`: what it was chosen by, and what its run recorded."""
    position = position_of(checkpoint.run)
    found: dict[str, float] = {}
    if position.best_step == checkpoint.step:
        found |= {f"valid.{name}": value for name, value in position.best_metrics.items()}
    for one in read_records(config.output_dir):
        if one["step"] == checkpoint.step and one["split"] in _SPLITS:
            values = {name: value for name, value in one.items() if name not in _NO_METRICS and value is not None}
            found |= {f"{one['split']}.{name}": float(value) for name, value in values.items()}
    return found


def card(bundle: BundleManifest, schema: FeatureSchema, config: RunConfig) -> str:
    """The card, as Markdown."""
    size = sum(file.size for file in bundle.files.values())
    recall = bundle.kind == "recall"
    part = "retrieve(users, k=10)" if recall else "score(rows)"
    lines = [
        f"# {bundle.model}, step {bundle.step}",
        "",
        "A recall model: it finds items for users." if recall else "A ranking model: it scores rows.",
        "",
        "```python",
        "from rechub_dist.inference import Bundle",
        "",
        f'Bundle(".").{part}',
        "```",
        "",
        "## Quality",
        "",
        *_metrics(bundle.metrics),
        "",
        *_checked(bundle.checked),
        "",
        "## Features",
        "",
        "| feature | kind | tables: rows x width |",
        "| --- | --- | --- |",
    ]
    dense = {name for graph in bundle.graphs.values() for name in graph.dense}
    for feature in schema.features:
        names = dict.fromkeys(lookup.table for lookup in bundle.lookups if lookup.feature == feature.name)
        if names or feature.name in dense:
            tables = (f"{name} {bundle.tables[name].rows:,} x {bundle.tables[name].dim}" for name in names)
            lines.append(f"| {feature.name} | {feature.kind} | {', '.join(tables)} |")
    lines += [
        "",
        f"Labels: {', '.join(label.name for label in schema.labels)}. Size: {size / 1e6:,.1f} MB, tables in "
        f"{', '.join(dict.fromkeys(table.precision for table in bundle.tables.values()))}.",
        "",
        "## How it was trained",
        "",
        "What differs from the defaults; `dataset.yaml` has the schema.",
        "",
        "```yaml",
        config.model_copy(update={"data": config.data.model_copy(update={"dataset": None})}).dump_changed().rstrip(),
        "```",
        "",
        f"With {', '.join(f'{name} {version}' for name, version in bundle.versions.items())}.",
    ]
    return "\n".join(lines) + "\n"


def _metrics(metrics: dict[str, float]) -> list[str]:
    names = list(dict.fromkeys(key.partition(".")[2] for key in metrics))
    splits = [split for split in _SPLITS if any(key.startswith(f"{split}.") for key in metrics)]
    if not names:
        return ["This checkpoint was not evaluated."]
    head = [f"| metric | {' | '.join(splits)} |", f"| --- |{' ---: |' * len(splits)}"]

    def shown(split: str, name: str) -> str:
        value = metrics.get(f"{split}.{name}")
        return "" if value is None else f"{value:.5g}"

    return head + [f"| {name} | {' | '.join(shown(split, name) for split in splits)} |" for name in names]


def _checked(checked: dict[str, float]) -> list[str]:
    if not checked:
        return ["This bundle was not compared with its run."]
    apart = ", ".join(f"{name} {value:.2g}" for name, value in checked.items() if name != "rows")
    return [f"Compared with its run on {checked['rows']:,.0f} rows. Largest differences: {apart}."]
