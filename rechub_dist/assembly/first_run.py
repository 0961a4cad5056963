"""A first run file for a user's own data set: what `rechub-dist init` and `models NAME --run-file --data` write."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from rechub_dist.assembly.examples import FIRST_BATCH, TRAINING, batches, example_parameters
from rechub_dist.config import VERSION
from rechub_dist.data.importing.fitted import column_of, table_of
from rechub_dist.data.importing.plan import DensePlan, Plan, SequencePlan, SparsePlan
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.storage import join
from rechub_dist.data.run_file import schema_of
from rechub_dist.errors import UserError, nearest
from rechub_dist.features import DenseFeature, FeatureSchema, SequenceFeature, SparseFeature
from rechub_dist.models import catalogue, family


@dataclass(frozen=True)
class Roles:
    """What a model may make of the features of a data set.

    Attributes:
        plain: features that give one vector or numbers.
        histories, targets: sequences of items, and the features whose tables they read.
        of_item: those of `plain` that belong to the item.
        labels: the type of each label, by its name.
        items: whether there is a row of each item.
    """

    plain: list[str]
    histories: list[str]
    targets: list[str]
    of_item: list[str]
    labels: Mapping[str, str]
    items: bool

    @classmethod
    def of_plan(cls, plan: Plan) -> Roles:
        """Those of the data set that a plan makes."""
        types = {n: (None if isinstance(one, str) else one.type) or "classification" for n, one in plan.labels.items()}
        return cls(_one_vector(plan), _histories(plan), _targets(plan), _of_item(plan), types, plan.items)

    @classmethod
    def of_schema(cls, schema: FeatureSchema) -> Roles:
        """Those of a data set that is there: the first sequence that reads a feature's table is its history."""
        sequences = [feature for feature in schema.features if isinstance(feature, SequenceFeature)]
        pairs: dict[str, str] = {}
        for feature in schema.features:
            same = [one.name for one in sequences if isinstance(feature, SparseFeature) and one.table == feature.table]
            if same:
                pairs[feature.name] = same[0]
        plain = [feature.name for feature in schema.features if isinstance(feature, DenseFeature | SparseFeature)]
        labels = {label.name: label.type for label in schema.labels}
        return cls(plain, list(pairs.values()), list(pairs), [], labels, items=False)


def suggested_model(plan: Plan) -> str:
    """DIN where there are histories of the item, else DeepFM."""
    return "DIN" if _histories(plan) and _targets(plan) and plan.labels else "DeepFM"


def first_run(plan: Plan, model: str, root: str, output_dir: str) -> str:
    """The text of a run file for a model on the data set that the plan makes.

    Raises:
        UserError: there is no such model, or it needs a history or labels that the plan does not have.
    """
    return _run(plan.name, "the plan", Roles.of_plan(plan), model, root, output_dir, _how(plan))


def run_on(root: str, model: str, output_dir: str) -> str:
    """The text of a run file for a model on a prepared data set, by its folder or address.

    Raises:
        UserError: as `first_run`; or there is no schema, or no split `train`.
    """
    how = "a sequence in the schema that reads the table of a sparse feature"
    roles, rows = Roles.of_schema(schema_of(root)), Manifest.read(join(root, "train")).rows
    return _run(root, root, roles, model, root, output_dir, how, batch_size_for(rows))


def batch_size_for(rows: int) -> int:
    """The batch size of a first run on `rows` rows: about a thousand steps an epoch, within 256 and 4,096."""
    return min(4096, max(FIRST_BATCH, 2 ** round(math.log2(max(1, rows) / 1000))))


def _run(
    name: str,
    where: str,
    roles: Roles,
    model: str,
    root: str,
    output_dir: str,
    how: str,
    batch_size: int = FIRST_BATCH,
) -> str:
    models = catalogue()
    if model not in models:
        raise UserError(f"--model: there is no model {model!r}: {nearest(model, models)}")
    cls = models[model]
    wanted, kind = inspect.signature(cls.__init__).parameters, family(cls)
    if (kind == "recall" or "behavior_features" in wanted) and not roles.histories:
        raise UserError(f"--model {model} needs a history of items: {how}")
    tasks = {"recall": 0, "ranking": 1, "multitask": max(2, len(roles.labels))}[kind]
    if tasks > len(roles.labels):
        raise UserError(
            f"--model {model} needs {tasks} label(s), and {where} has {len(roles.labels)}: write its labels"
        )
    plain = [one for one in roles.plain if one not in (roles.targets if "target_features" in wanted else ())]
    if kind == "recall":
        plain = [one for one in plain if one not in roles.of_item and one not in roles.targets]
    parameters = example_parameters(cls, plain, roles.histories, roles.targets)
    if "item_features" in parameters and roles.items:
        parameters["item_features"] = [*roles.targets[:1], *roles.of_item]
    larger: dict[str, Any] = {
        key: [128, 64] for key, value in parameters.items() if value == [32, 16] and key != "attention_units"
    }
    if kind == "multitask":
        per_task = {"num_tasks": tasks, "task_types": list(roles.labels.values())[:tasks]}
        larger |= {key: value for key, value in per_task.items() if key in parameters}
    if "dropout_rates" in wanted and "dropout_rates" not in parameters:
        larger["dropout_rates"] = 0.1
    tree = {
        "version": VERSION,
        "output_dir": output_dir,
        "data": {"root": root, **batches(batch_size), **({"labels": list(roles.labels)[:tasks]} if tasks else {})},
        "model": {"name": model, **parameters, **larger},
        **TRAINING,
    }
    body: str = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    note = (
        "# Every row of the log counts as a positive: leave others out with the plan's filter.\n" if not tasks else ""
    )
    return f"# {model} on {name}; its parameters: rechub-dist models {model}\n{note}{body}"


def _one_vector(plan: Plan) -> list[str]:
    """The features that give one vector, or numbers."""
    return [name for name, feature in plan.features.items() if isinstance(feature, DensePlan | SparsePlan)]


def _of_item(plan: Plan) -> list[str]:
    """Those of them that come from the tables of the item."""
    columns = {c for t in plan.tables.values() if (t.log_key or t.key) == plan.item for c in t.take or t.columns or ()}
    columns |= {name for name, spec in plan.derive.items() if spec.get("column") in columns}
    return [
        name for name in _one_vector(plan) if column_of(plan, name) in columns and column_of(plan, name) != plan.item
    ]


def _histories(plan: Plan) -> list[str]:
    """The sequences that share the item's table."""
    targets = {table_of(plan, name) for name in _targets(plan)}
    return [n for n, f in plan.features.items() if isinstance(f, SequencePlan) and table_of(plan, n) in targets]


def _targets(plan: Plan) -> list[str]:
    """The feature of the item's id."""
    return [
        name
        for name, feature in plan.features.items()
        if isinstance(feature, SparsePlan) and plan.item is not None and column_of(plan, name) == plan.item
    ]


def _how(plan: Plan) -> str:
    missing = [name for name in ("user", "item", "time") if getattr(plan, name) is None]
    if missing:
        return f"name the column(s) of {', '.join(missing)} (--{' --'.join(missing)})"
    return "write histories into the plan"
