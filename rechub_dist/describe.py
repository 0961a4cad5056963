"""What `rechub-dist models` prints."""

from __future__ import annotations

import inspect
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rechub_dist.errors import UserError, nearest
from rechub_dist.models import FAMILIES, Model, catalogue, family


def list_models(console: Console) -> None:
    """The models by family, a line each."""
    for name in FAMILIES:
        table = Table("model", "what it computes", title=name, title_justify="left")
        for cls in catalogue().values():
            if family(cls) == name:
                table.add_row(cls.__name__, _first_line(cls))
        console.print(table)


def describe_model(console: Console, name: str) -> None:
    """One model: what it is, its parameters with their meaning, and a run file's section.

    Raises:
        UserError: there is no such model.
    """
    models = catalogue()
    if name not in models:
        raise UserError(f"no model {name!r}: {nearest(name, models)}")
    cls = models[name]
    console.print(f"[bold]{name}[/bold] ({family(cls)})  {cls.paper}", highlight=False)
    console.print(inspect.cleandoc(cls.__doc__ or ""), highlight=False, markup=False)
    table = Table("parameter", "type", "default", title="constructor", title_justify="left")
    parameters = _parameters(cls)
    for parameter in parameters:
        required = parameter.default is inspect.Parameter.empty
        table.add_row(parameter.name, escape(str(parameter.annotation)), "" if required else repr(parameter.default))
    console.print(table)
    console.print("in a run file:", highlight=False)
    section: dict[str, Any] = {"name": name}
    section.update({p.name: _example(p) for p in parameters if p.default is inspect.Parameter.empty})
    console.print(yaml.safe_dump({"model": section}, sort_keys=False, default_flow_style=None), highlight=False)


def _parameters(cls: type[Model]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(cls.__init__).parameters.values() if p.name != "self"]


def _first_line(cls: type[Model]) -> str:
    module = inspect.getmodule(cls)
    return (inspect.getdoc(module) or "").splitlines()[0].partition(": ")[2]


def _example(parameter: inspect.Parameter) -> Any:
    """A value of the right kind to start from; feature lists want names of the data set's schema."""
    annotation, name = str(parameter.annotation), parameter.name
    if "Feature" in annotation:
        return [f"<{name}: names of features>"]
    if name == "task_types":
        return ["classification", "classification"]
    if "list[int]" in annotation:
        return [128, 64]
    if "str" in annotation:
        return "relu"
    if "float" in annotation:
        return 0.1
    return {"num_heads": 2, "num_layers": 2, "num_tasks": 2, "max_len": 50, "item_num": 1000}.get(name, 32)
