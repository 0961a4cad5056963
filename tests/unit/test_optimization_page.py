"""docs/optimization.md: its examples are runs, and it has every key as the code describes it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rechub_dist.assembly.code import dense_optimizer, table_optimizers
from rechub_dist.assembly.parts import build
from rechub_dist.config import (
    CommunicationConfig,
    DenseRule,
    EmbeddingConfig,
    OptimizerConfig,
    ScheduleConfig,
    Section,
    TableOptimizerConfig,
    TableRule,
    TrainConfig,
    run_from,
)
from rechub_dist.config.training import RateChange
from rechub_dist.embedding.rates import Rates
from rechub_tests.runs import SCHEMA

TEXT = (Path(__file__).parents[2] / "docs" / "optimization.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
BASE: dict[str, Any] = {
    "output_dir": "out",
    "data": {"root": "data", "dataset": SCHEMA, "labels": ["click"]},
    "model": {
        "name": "DeepFM",
        "features": ["user", "item", "tags", "age"],
        "hidden_units": [8],
        "dropout_rates": 0.0,
        "embedding_dim": 8,
    },
}
TABLES: list[tuple[type[Section], tuple[str, ...]]] = [
    (ScheduleConfig, tuple(ScheduleConfig.model_fields)),
    (RateChange, tuple(RateChange.model_fields)),
    (OptimizerConfig, tuple(OptimizerConfig.model_fields)),
    (DenseRule, tuple(DenseRule.model_fields)),
    (TableOptimizerConfig, tuple(TableOptimizerConfig.model_fields)),
    (EmbeddingConfig, ("precision", "optimizer", "schedule", "dropout", "clip_norm", "rules")),
    (TableRule, ("tables", "precision", "optimizer", "frozen", "dropout", "init_std")),
    (CommunicationConfig, tuple(CommunicationConfig.model_fields)),
    (TrainConfig, ("lr_changes", "accumulate", "ema")),
]


def table_of(cls: type[Section], keys: tuple[str, ...]) -> str:
    """Keys of a section as the page has them."""
    lines = ["| key | default | |", "|---|---|---|"]
    for key in keys:
        field = cls.model_fields[key]
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        empty = value is None or value in ((), {}) or isinstance(value, Section)
        default = "needed" if field.is_required() else "" if empty else f"`{shown(value)}`"
        assert field.description, f"{cls.__name__}.{key} has no description"
        lines.append(f"| `{key}` | {default} | {field.description.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A value as YAML writes it."""
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


@pytest.mark.parametrize(("cls", "keys"), TABLES, ids=lambda value: getattr(value, "__name__", ""))
def test_every_key_is_there(cls: type[Section], keys: tuple[str, ...]) -> None:
    assert table_of(cls, keys) in TEXT


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Two trees, `more` over `base`."""
    both = {key: merged(base[key], value) for key, value in more.items() if isinstance(base.get(key), dict)}
    return base | more | both


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_example_is_a_run(example: str, device: str) -> None:
    if device == "cpu" and "# on GPUs" in example:
        pytest.skip("for GPUs")
    config = run_from(merged(BASE, yaml.safe_load(example)))
    build(config, device=device, world_size=2)
    dense_optimizer(config)
    table_optimizers(config)
    Rates(config.optimizer.schedule, config.embedding.schedule, run_steps=100)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 8


if __name__ == "__main__":
    for one, its_keys in TABLES:
        print(f"{one.__name__}\n{table_of(one, its_keys)}\n")
