"""What makes two runs the same run: what the mathematics of training depends on, compared as resolved.

Ranks, sharding, kernels, device, paths, cadence, logging, evaluation settings and a longer duration do not; nor does
what acts at single steps alone: `warm_start` at the first, `train.on_non_finite` and `max_loss` at those that fail.
Factors of `train.lr_changes` belong to it once they have acted; where a decay lasts for the run, so does its length.
Nor does it matter whether the files hold derived columns and ids, or both are made as the files are read: what is
compared is how columns are derived, where both runs compute them, and which value has which id.

A checkpoint is compared by its own configuration, resolved by the very code that resolves today's, so that it does not
matter which keys were written out, nor in what form older versions recorded an identity. Only what does not follow
from a configuration is taken from that record: which data, vocabularies and weights the run has trained with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rechub_dist.assembly.arguments import arguments_as_written
from rechub_dist.assembly.code import model_class
from rechub_dist.assembly.parts import Plan, plan
from rechub_dist.config import EvaluationConfig, RetrievalConfig, RunConfig, ScheduleConfig, stored_run
from rechub_dist.config.code import module_of, named_code, only_trains, refuse_code
from rechub_dist.config.optimization import DECAYS
from rechub_dist.data.columns.vocabulary import vocabulary_fingerprint
from rechub_dist.data.order.epoch import ORDER_VERSION
from rechub_dist.derived import Derived
from rechub_dist.embedding.rates import Rates, decay_steps
from rechub_dist.errors import UserError
from rechub_dist.features import (
    CatalogueFeature,
    CrossFeature,
    DenseFeature,
    LookupFeature,
    NegativeFeature,
    SequenceFeature,
    SparseFeature,
)
from rechub_dist.objectives.negatives import NEGATIVES

_SINCE = {"mean": 0.0, "std": 1.0}  # fields that features have got, with what they were before
_FACTS = ("train", "order_version", "vocabularies", "sampling_weights", "derived")
_FACTS_OF_TRAINING = ("run_steps", "lr_changes")


def vocabularies_of(parts: Plan) -> dict[str, str]:
    """What identifies the vocabulary of each feature that has one: which value has which id."""
    found = {feature.name: vocabulary_fingerprint(feature) for feature in parts.spec.stored}
    return {name: fingerprint for name, fingerprint in found.items() if fingerprint is not None}


def identity(
    parts: Plan, train: Any, computed: Iterable[Derived] = (), *, rates: Rates | None = None, step: int = 0
) -> dict[str, Any]:
    """A run's identity when it has done `step` steps, in the types of JSON.

    Args:
        train: identifies the data that it has trained on so far.
        computed: the derived columns that were computed as the data was read.
        rates: its learning rates.
    """
    facts: dict[str, Any] = {"train": train, "order_version": ORDER_VERSION}
    if vocabularies := vocabularies_of(parts):
        facts["vocabularies"] = vocabularies
    if _weights_file(parts) is not None and NEGATIVES in parts.spec.cumulative:
        weights = parts.spec.cumulative[NEGATIVES].tobytes()
        facts["sampling_weights"] = hashlib.blake2b(weights, digest_size=8).hexdigest()
    if derived := {one.name: asdict(one) for one in computed}:
        facts["derived"] = derived
    return _resolved(parts, facts, {} if rates is None else _facts_of_training(rates, step))


def _facts_of_training(rates: Rates, step: int) -> dict[str, Any]:
    """The length of a run whose schedules last for it, and the changes of rates that have acted."""
    facts: dict[str, Any] = {}
    if any(schedule.name in DECAYS and schedule.decay_steps is None for schedule in (rates.dense, rates.tables)):
        facts["run_steps"] = rates.run_steps
    if begun := {first: factor for first, factor in rates.changes.items() if first < step}:
        facts["lr_changes"] = begun
    return facts


def other_than(run: Mapping[str, Any], wanted: dict[str, Any], where: str, code: Path | None = None) -> list[str]:
    """The keys in which the run that a checkpoint, `where`, has recorded differs from the identity `wanted`.

    Code is looked for in `code`. What the checkpoint alone names is not imported: it is a difference.

    Raises:
        UserError: its configuration is of another version and means nothing here.
    """
    named, allowed = named_code(_trained_by(run, where).model_dump()), named_code(wanted)
    if other := [key for key, name in named.items() if not only_trains(key) and allowed.get(key) != name]:
        return [f"{key} {json.dumps(named[key])} -> {json.dumps(_at(wanted, key))}" for key in other]
    saved = recorded(run, where, map(module_of, allowed.values()), code)
    known = "sampling_weights" in saved["data"] and "sampling_weights" in wanted["data"]
    both = saved["data"].get("derived", {}).keys() & wanted["data"].get("derived", {}).keys()
    saved, wanted = (
        _without_length(_derived_in(_one_source_of_weights(tree, known), both)) for tree in (saved, wanted)
    )
    return differences(saved, wanted)


def recorded(
    run: Mapping[str, Any], where: str, allowed: Iterable[str] = (), code: Path | None = None
) -> dict[str, Any]:
    """The identity of the run that a checkpoint, `where`, has recorded, as `identity` gives it.

    Args:
        allowed: modules that may be imported where the record names them.
        code: the folder in which they are looked for.

    Raises:
        UserError: its configuration is of another version and means nothing here, or names code that is not allowed.
    """
    config = _trained_by(run, where)
    refuse_code(config.model_dump(), allowed, where)
    config = config.model_copy(update={"code": code})
    try:
        with torch.random.fork_rng(devices=[]):  # of the model, which is asked what it looks up, no weights are kept
            # On a GPU and one rank any placement can be had: where the run lay is of no matter here.
            found = plan(config, device="cuda", world_size=1)
    except UserError as error:
        raise UserError(
            f"{where}: its configuration means nothing to this version ({error}); go on with the rechub_dist that "
            f"wrote it ({run.get('versions', {}).get('rechub_dist', 'version unknown')}), or choose another output_dir"
        ) from error
    data = run["identity"]["data"]
    facts = {key: data[key] for key in _FACTS if key in data}
    training = run["identity"].get("train") or {}
    return _resolved(found, facts, {key: training[key] for key in _FACTS_OF_TRAINING if key in training})


def _trained_by(run: Mapping[str, Any], where: str) -> RunConfig:
    """The configuration that a checkpoint has recorded, as far as training depends on it."""
    return stored_run(run["config"], where).model_copy(update={"evaluation": EvaluationConfig()})


def _at(tree: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return tree[section].get(name)


def _resolved(found: Plan, facts: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    config, tables = found.config, found.layout.tables
    data, spec = config.data, found.spec
    tree = {
        "seed": config.seed,
        "model": {"name": config.model.name, **_parameters(found)},
        "objective": _objective(found),
        "data": {
            # those that are drawn follow from the objective
            "features": {
                feature.name: _feature(feature) for feature in (*spec.features, *spec.dense) if _read(feature)
            },
            "labels": [asdict(replace(label, column=label.source)) for label in spec.labels],
            "weight": spec.weight,
            "batch_size": data.batch_size,
            "shuffle": data.shuffle,
            "shuffle_rows": data.shuffle_rows,
            "max_streams": data.max_streams,
            "drop_last": data.drop_last,
            "order": data.order,
            **facts,
        },
        "train": {
            **{key: getattr(config.train, key) for key in ("precision", "tf32", "accumulate", "ema")},
            "lr_changes": {},
            **training,
        },
        "optimizer": {
            **config.optimizer.model_dump(mode="json"),
            "schedule": _schedule(config.optimizer.schedule, training),
        },
        "embedding": {
            "schedule": _schedule(config.embedding.schedule, training),
            "clip_norm": config.embedding.clip_norm,
            "communication": config.embedding.communication.model_dump(mode="json"),
            "optimizers": {name: placed.optimizer.model_dump(mode="json") for name, placed in tables.items()},
            "widths": {name: placed.table.dim for name, placed in tables.items()},
            "init_std": {name: placed.table.init_std for name, placed in tables.items()},
            "dropout": {name: placed.dropout for name, placed in tables.items()},
            "precision": {name: placed.precision for name, placed in tables.items()},
        },
    }
    found_tree: dict[str, Any] = json.loads(json.dumps(tree, default=str))
    return found_tree


def _schedule(schedule: ScheduleConfig, training: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule's settings; a decay that lasts for the run has its steps."""
    tree: dict[str, Any] = schedule.model_dump(mode="json")
    if schedule.name in DECAYS and (run_steps := training.get("run_steps")) is not None:
        tree["decay_steps"] = decay_steps(schedule, run_steps)
    return tree


def _parameters(found: Plan) -> dict[str, Any]:
    """The model's parameters by name, its constructor's defaults written out."""
    return arguments_as_written(model_class(found.config), found.config.model.parameters, found.schema)


def _objective(found: Plan) -> dict[str, Any]:
    """The objective's settings, what they leave to the model written out."""
    return {**found.chosen.model_dump(mode="json"), **found.objective.settings()}


def _read(feature: LookupFeature | DenseFeature) -> bool:
    return not isinstance(feature, NegativeFeature | CatalogueFeature)


def _feature(feature: LookupFeature | DenseFeature) -> dict[str, Any]:
    """What a feature is, but for where its vocabulary lies; of its table the name and the rows."""
    if isinstance(feature, CrossFeature):
        return {**_plain(feature), "inputs": [_feature(source) for source in feature.inputs]}
    if isinstance(feature, SparseFeature | SequenceFeature):
        return _plain(replace(feature, column=feature.source))
    if isinstance(feature, DenseFeature):
        return _plain(replace(feature, column=feature.source))
    return _plain(feature)


def _plain(feature: LookupFeature | DenseFeature) -> dict[str, Any]:
    without = ("dim", "init_std", "vocabulary", "encoded")  # which value has which id is told by `vocabularies`
    tree = {key: value for key, value in asdict(feature).items() if key not in without}
    # What has come since the first checkpoints is told only where it is used, so that theirs are the same runs.
    tree = {key: value for key, value in tree.items() if key not in _SINCE or value != _SINCE[key]}
    if isinstance(feature, DenseFeature):
        tree["dim"] = feature.dim
    elif "table" in tree:
        tree["table"] = {key: tree["table"][key] for key in ("name", "rows")}
    return tree


def _weights_file(found: Plan) -> str | None:
    """The file of weights that negatives are drawn by."""
    chosen = found.chosen
    return chosen.sampling.path if isinstance(chosen, RetrievalConfig) else None


def _one_source_of_weights(tree: dict[str, Any], known: bool) -> dict[str, Any]:
    """Drawing weights told by what they are, where that is known of both runs, else by the name of their file."""
    objective, data = tree["objective"], tree["data"]
    if known:
        sampling = {key: value for key, value in objective["sampling"].items() if key != "path"}
        return {**tree, "objective": {**objective, "sampling": sampling}}
    return {**tree, "data": {key: value for key, value in data.items() if key != "sampling_weights"}}


def _derived_in(tree: dict[str, Any], names: Container[str]) -> dict[str, Any]:
    """The tree with those derived columns alone; another run's files may hold what this run's reader has computed."""
    data = tree["data"]
    derived = {name: one for name, one in data.get("derived", {}).items() if name in names}
    return {**tree, "data": {**data, "derived": derived}}


def _without_length(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without the run's length, which shows in the schedules' decay_steps: those can be set."""
    return {**tree, "train": {key: value for key, value in tree["train"].items() if key != "run_steps"}}


def differences(saved: Any, wanted: Any, path: str = "") -> list[str]:
    """The keys at which two trees differ, each with both values; of a list of trees by their places, from 0."""
    if _trees(saved) and _trees(wanted) and len(saved) == len(wanted):
        saved, wanted = (dict(enumerate(trees)) for trees in (saved, wanted))
    if isinstance(saved, dict) and isinstance(wanted, dict):
        keys = list(dict.fromkeys([*saved, *wanted]))
        return [
            line for key in keys for line in differences(saved.get(key), wanted.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if saved == wanted else [f"{path} {json.dumps(saved)} -> {json.dumps(wanted)}"]


def _trees(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, dict) for part in value)
