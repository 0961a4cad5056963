"""What a run's names stand for: our models by their short names, anybody's classes as `package.module:Name`.

A module is looked for in the folder of the run file (`code`), in the working directory, and among what is installed.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from rechub_dist.assembly.arguments import arguments_of, hints_of, name_of, parameters_of
from rechub_dist.config import (
    OptimizerConfig,
    OwnObjectiveConfig,
    PointwiseConfig,
    RetrievalConfig,
    RunConfig,
    TableOptimizerConfig,
)
from rechub_dist.config.code import is_code, module_of, named_code
from rechub_dist.embedding.dense import Maker
from rechub_dist.errors import UserError, nearest, one_line
from rechub_dist.features import Label
from rechub_dist.metrics.metric import Metric
from rechub_dist.models import Model, RecallModel, catalogue
from rechub_dist.objectives import Objective, TaskObjective

# What code raises that was never meant to get such values.
_FAILED = (RuntimeError, ArithmeticError, LookupError, AssertionError, MemoryError)
_OF_MODEL = ("lookups", "forward")
_OF_RECALL = ("user", "item", "item_lookups", "loss", "negatives")
_METRICS = "evaluation.metrics"
POINTWISE = ("logits [B]", "labels [B]")
RETRIEVAL = ("the positive's scores [M]", "the negatives' scores [M, C]", "which of them count [M, C]")


def model_class(config: RunConfig) -> type[Model]:
    """The class that `model.name` names.

    Raises:
        UserError: there is none, or it is no model.
    """
    name = config.model.name
    if not is_code(name):
        models = catalogue()
        if name not in models:
            raise UserError(f"model.name: no model {name!r}: {nearest(name, models)}")
        return models[name]
    found = _resolve("model.name", name, config.code)
    if not (isinstance(found, type) and issubclass(found, Model)):
        raise UserError(f"model.name: {name} is no model: derive a class from rechub_dist.models.Model or RecallModel")
    base: type[Model] = RecallModel if issubclass(found, RecallModel) else Model
    for member in (*_OF_MODEL, *(_OF_RECALL if base is RecallModel else ())):
        if getattr(found, member, None) is getattr(base, member, None):
            raise UserError(
                f"model.name: {name} has no {member!r} of its own, which every {base.__name__} needs; add it"
            )
    return found


def named_loss(
    config: RunConfig, chosen: PointwiseConfig | RetrievalConfig, tensors: Sequence[str]
) -> Callable[..., Tensor] | None:
    """The function of `tensors` that `objective.loss` names as a user's own; None for our own losses.

    Raises:
        UserError: there is none, it does not take these tensors, or it has parameters to train.
    """
    if not is_code(chosen.loss):
        return None
    assert chosen.loss is not None
    found = _resolve("objective.loss", chosen.loss, config.code)
    if not callable(found):
        raise UserError(f"objective.loss: {chosen.loss} is neither a function nor a class; name one of them")
    where, given = "objective.loss_arguments", chosen.loss_arguments
    if isinstance(found, type):
        made = call("objective.loss", found, **arguments_of(where, found, given))
        if not callable(made):
            raise UserError(
                f"objective.loss: a {chosen.loss} cannot be called with {' and '.join(tensors)}; define __call__, or "
                f"forward of an nn.Module"
            )
        if isinstance(made, nn.Module) and next(made.parameters(), None) is not None:
            raise UserError(
                f"objective.loss: {chosen.loss} has parameters, and only a model's are trained; move them there"
            )
        return made
    taken = list(parameters_of(found))[: len(tensors)]
    if len(taken) < len(tensors):
        raise UserError(f"objective.loss: {chosen.loss} has to take {len(tensors)} tensors: {', '.join(tensors)}")
    arguments = arguments_of(where, found, given, others=taken)
    return partial(found, **arguments) if arguments else found


def own_objective(config: RunConfig, chosen: OwnObjectiveConfig, model: Model, labels: tuple[Label, ...]) -> Objective:
    """The objective of a user's own that `objective.name` names.

    Its constructor gets the run's labels and the model by its annotations, what else it takes from
    `objective.arguments`.

    Raises:
        UserError: there is none, it is no objective, or its arguments do not fit.
    """
    found = _resolve("objective.name", chosen.name, config.code)
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise UserError(
            f"objective.name: {chosen.name} is no objective: derive a class from rechub_dist.objectives.TaskObjective"
        )
    base: type[Objective] = TaskObjective if issubclass(found, TaskObjective) else Objective
    for member in ("losses", "predictions") if base is TaskObjective else ("forward", "weight_sums"):
        if getattr(found, member, None) is getattr(base, member):
            raise UserError(
                f"objective.name: {chosen.name} has no {member!r} of its own, which every {base.__name__} needs; add it"
            )
    given = _by_annotation("objective.arguments", found, labels, model)
    arguments = arguments_of("objective.arguments", found, chosen.arguments, others=given)
    made = call("objective", found, **given, **arguments)
    if made.tasks is None and made.ranking is None:
        raise UserError(
            f"objective.name: a {chosen.name} has neither tasks nor a ranking, so nothing is measured; give it one"
        )
    if next(made.parameters(), None) is not None:
        raise UserError(
            f"objective.name: {chosen.name} has parameters, and only a model's are trained; move them into the model"
        )
    return cast(Objective, made)


def _by_annotation(where: str, cls: type[Objective], labels: tuple[Label, ...], model: Model) -> dict[str, Any]:
    """The run's labels and model, as arguments for the parameters that are annotated with them."""
    found: dict[str, Any] = {}
    for name, hint in hints_of(where, cls).items():
        if hint == tuple[Label, ...]:
            found[name] = labels
        elif isinstance(hint, type) and issubclass(hint, Model):
            if not isinstance(model, hint):
                raise UserError(
                    f"objective.name: {name_of(cls)} wants a {hint.__name__}, not a {name_of(type(model))}; change one"
                )
            found[name] = model
    return found


def metric_classes(config: RunConfig) -> dict[str, type[Metric[Any]]]:
    """The classes of a user's own that `evaluation.metrics` names.

    Raises:
        UserError: there is none, or it is no metric.
    """
    found: dict[str, type[Metric[Any]]] = {}
    for item in config.evaluation.wanted:
        if not is_code(item.name):
            continue
        metric = _resolve(_METRICS, item.name, config.code)
        if not isinstance(metric, type):
            raise UserError(f"{_METRICS}: {item.name} is no class; name a class of metrics")
        for method in ("update", "merge", "compute"):
            if not callable(getattr(metric, method, None)):
                raise UserError(
                    f"{_METRICS}: {item.name} has no method {method!r}, which every metric needs; define it"
                )
        found[item.name] = metric
    return found


def dense_optimizer(config: RunConfig) -> Maker | None:
    """What makes the optimizer that `optimizer.name` names as `package.module:Class`; None for our short names.

    Raises:
        UserError: there is none, it is no optimizer, or its arguments do not fit.
    """
    return _optimizer(config, "optimizer", config.optimizer, ("weight_decay", "betas", "eps"))


def table_optimizers(config: RunConfig) -> Callable[[TableOptimizerConfig], Maker | None]:
    """As `dense_optimizer`, for each optimizer that tables have by `embedding`; raises as that does."""
    tables = config.embedding
    chosen = {f"embedding.rules.{n}.optimizer": rule.optimizer for n, rule in enumerate(tables.rules) if rule.optimizer}
    chosen["embedding.optimizer"] = tables.optimizer
    made = [(one, _optimizer(config, key, one, ("betas", "eps"))) for key, one in chosen.items()]
    return lambda wanted: next(maker for one, maker in made if one == wanted)


def _optimizer(
    config: RunConfig, key: str, chosen: OptimizerConfig | TableOptimizerConfig, settings: tuple[str, ...]
) -> Maker | None:
    """What makes the optimizer at `key`; `settings` are those that our short names alone take."""
    if not is_code(chosen.name):
        return None
    found = _resolve(f"{key}.name", chosen.name, config.code)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(f"{key}.name: {chosen.name} is no torch.optim.Optimizer; name a class derived from it")
    defaults = type(chosen)()
    for setting in settings:
        if getattr(chosen, setting) != getattr(defaults, setting):
            raise UserError(f"{key}.{setting}: is for our short names; write {key}.arguments: {{{setting}: ...}}")
    parameters = list(parameters_of(found))
    if "lr" not in parameters:
        raise UserError(f"{key}.name: {chosen.name} takes no lr, which {key}.lr and its schedule set; name one with lr")
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(
            f"{key}.name: {chosen.name} computes the loss several times a step, which no run does; choose another"
        )
    arguments = arguments_of(f"{key}.arguments", found, chosen.arguments, others=(parameters[0], "lr"))
    return lambda trained: call(f"{key}.arguments", found, trained, lr=chosen.lr, **arguments)


def fingerprints(config: RunConfig) -> dict[str, str]:
    """The names of a run's own code that it has imported, each with a digest of its module's source."""
    found = {}
    for name in named_code(config.model_dump()).values():
        module = sys.modules.get(module_of(name))
        if module is not None and module.__file__ is not None:
            found[name] = hashlib.blake2b(Path(module.__file__).read_bytes(), digest_size=6).hexdigest()
    return found


def call(where: str, function: Callable[..., Any], *given: Any, **arguments: Any) -> Any:
    """What a function makes of a run file's values.

    Raises:
        UserError: it refuses them, or fails with them.
    """
    try:
        return function(*given, **arguments)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {one_line(error)}") from error
    except _FAILED as error:
        raise UserError(
            f"{where}: cannot be made of these values: {type(error).__name__}: {one_line(error)}"
        ) from error


def _resolve(key: str, name: str, folder: Path | None) -> Any:
    """What `package.module:Name` names; `key` is that of the run file.

    Raises:
        UserError: no such module or name in it, or whatever its import raises.
    """
    module, attribute = _import(key, module_of(name), folder), name.partition(":")[2]
    if not hasattr(module, attribute):
        public = {found: value for found, value in vars(module).items() if callable(value) and found[0] != "_"}
        own = [found for found, value in public.items() if value.__module__ == module.__name__]
        valid = public if hasattr(module, "__path__") else own  # a package hands on what others define
        raise UserError(f"{key}: module {module.__name__!r} has no {attribute!r}: {nearest(attribute, valid)}")
    return getattr(module, attribute)


def _import(key: str, name: str, folder: Path | None) -> ModuleType:
    places = list(dict.fromkeys(str(place.absolute()) for place in (folder, Path.cwd()) if place is not None))
    top = name.partition(".")[0]
    with _first(places):
        importlib.invalidate_caches()
        there, loaded = PathFinder.find_spec(top, places), getattr(sys.modules.get(top), "__file__", None)
        if there is not None and there.origin and loaded and Path(there.origin).resolve() != Path(loaded).resolve():
            raise UserError(f"{key}: {top!r} is {there.origin}, but {loaded} is in use under this name; rename yours")
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise _failed(key, name, error, places) from error  # it imports another one that is missing
            near = nearest(top, {found.name for found in pkgutil.iter_modules(places)}) if error.name == top else ""
            hint = f": {near}" if near.startswith("did") else "; name its folder by the key `code`, or work from there"
            raise UserError(f"{key}: no module {name!r} in {' or '.join(places)}, nor installed{hint}") from error
        except (Exception, SystemExit) as error:
            raise _failed(key, name, error, places) from error


@contextmanager
def _first(places: Sequence[str]) -> Iterator[None]:
    """Look for modules there first, and not at all afterwards: what we import ourselves is not theirs to replace."""
    before = list(sys.path)
    sys.path[:0] = places
    try:
        yield
    finally:
        sys.path[:] = before


def _failed(key: str, name: str, error: BaseException, places: Sequence[str]) -> UserError:
    """What an import has raised, and where in the user's own files."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f" ({frame.filename}:{frame.lineno})" for frame in frames if frame.filename.startswith(tuple(places))]
    place = lines[-1] if lines and not isinstance(error, SyntaxError) else ""
    return UserError(
        f"{key}: module {name!r} cannot be imported: {type(error).__name__}: {one_line(error)}{place}; fix it"
    )
