"""A first run file for a user's own data set: what `rechub-dist init` writes."""

from __future__ import annotations

import inspect
from typing import Any

import yaml

from rechub_dist.assembly.examples import example_parameters
from rechub_dist.data.importing.fitted import column_of, table_of
from rechub_dist.data.importing.plan import DensePlan, Plan, SequencePlan, SparsePlan
from rechub_dist.errors import UserError, nearest
from rechub_dist.models import catalogue, family


def suggested_model(plan: Plan) -> str:
    """DIN where there are histories of the item, else DeepFM."""
    return "DIN" if _histories(plan) and _targets(plan) and plan.labels else "DeepFM"


def first_run(plan: Plan, model: str, root: str, output_dir: str) -> str:
    """The text of a run file for a model on the data set that the plan makes.

    Raises:
        UserError: there is no such model, or it needs a history or labels that the plan does not have.
    """
    models = catalogue()
    if model not in models:
        raise UserError(f"--model: there is no model {model!r}: {nearest(model, models)}")
    cls = models[model]
    wanted, kind = inspect.signature(cls.__init__).parameters, family(cls)
    histories, targets = _histories(plan), _targets(plan)
    if (kind == "recall" or "behavior_features" in wanted) and not histories:
        raise UserError(f"--model {model} needs a history of items: {_how(plan)}")
    tasks = {"recall": 0, "ranking": 1, "multitask": max(2, len(plan.labels))}[kind]
    if tasks > len(plan.labels):
        raise UserError(
            f"--model {model} needs {tasks} label(s), and the plan has {len(plan.labels)}: write its labels"
        )
    of_item = _of_item(plan)
    plain = [name for name in _one_vector(plan) if name not in (targets if "target_features" in wanted else ())]
    if kind == "recall":
        plain = [name for name in plain if name not in of_item and name not in targets]
    parameters = example_parameters(cls, plain, histories, targets)
    if "item_features" in parameters and plan.items:
        parameters["item_features"] = [*targets[:1], *of_item]
    larger: dict[str, Any] = {name: [128, 64] for name, value in parameters.items() if value == [32, 16]}
    if kind == "multitask":
        per_task = {"num_tasks": tasks, "task_types": ["classification"] * tasks}
        larger |= {name: value for name, value in per_task.items() if name in parameters}
    tree = {
        "output_dir": output_dir,
        "data": {
            "root": root,
            "batch_size": 1024,
            **({"labels": list(plan.labels)[:tasks]} if tasks else {}),
        },
        "model": {"name": model, **parameters, **larger},
        "train": {"epochs": 3},
    }
    body: str = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    note = (
        "# Every row of the log counts as a positive: leave others out with the plan's filter.\n" if not tasks else ""
    )
    return f"# {model} on {plan.name}; its parameters: rechub-dist models {model}\n{note}{body}"


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
