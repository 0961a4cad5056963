"""Output of `rechub-dist models`."""

from __future__ import annotations

import inspect

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rechub_dist.errors import UserError, nearest
from rechub_dist.models import FAMILIES, Model, catalogue, family


def list_models(console: Console) -> None:
    """Print the models by family, one line each."""
    for name in FAMILIES:
        table = Table("model", "what it computes", title=name, title_justify="left")
        for cls in catalogue().values():
            if family(cls) == name:
                table.add_row(cls.__name__, _first_line(cls))
        console.print(table)


def describe_model(console: Console, name: str) -> None:
    """Print one model: formula, constructor parameters, lookups, outputs, objectives and a complete run file.

    Raises:
        UserError: there is no such model.
    """
    from rechub_dist.assembly.examples import example_model, example_run  # noqa: PLC0415 - torchrec is slow to import

    cls = _find(name)
    console.print(f"[bold]{name}[/bold] ({family(cls)})  {cls.paper}", highlight=False)
    console.print(inspect.cleandoc(cls.__doc__ or ""), highlight=False, markup=False)
    console.print()
    parameters = Table("parameter", "type", "default", title="constructor", title_justify="left")
    for parameter in _parameters(cls):
        required = parameter.default is inspect.Parameter.empty
        default = "required" if required else repr(parameter.default)
        parameters.add_row(parameter.name, escape(str(parameter.annotation)), escape(default))
    console.print(parameters)
    lookups = Table(
        "lookup", "feature", "table", "pooling", title="lookups of the run file below", title_justify="left"
    )
    for lookup in example_model(cls).lookups():
        table = f"{lookup.table.name} [{lookup.table.rows:,} x {lookup.dim}]"
        feature = f"{lookup.feature.name} ({lookup.feature.kind})"
        lookups.add_row(lookup.name, feature, escape(table), lookup.pooling or "none: a sequence")
    console.print(lookups)
    console.print("[bold]output[/bold]", inspect.getdoc(cls.forward), highlight=False)
    console.print("[bold]objective[/bold]", " or ".join(cls.objectives), highlight=False)
    console.print(f"\n[bold]run file[/bold] (rechub-dist models {name} --run-file > run.yaml)", highlight=False)
    print(example_run(cls))


def print_run_file(name: str, data: str | None = None) -> None:
    """Print only the run file: on the example's data, or on a data set that is there.

    Raises:
        UserError: there is no such model or data set, or the data set lacks what the model needs.
    """
    from rechub_dist.assembly.examples import example_run  # noqa: PLC0415
    from rechub_dist.assembly.first_run import run_on  # noqa: PLC0415

    cls = _find(name)
    if data is None:
        print(example_run(cls), end="")
    else:
        print(run_on(data, name, f"runs/{name.lower()}"), end="")


def _find(name: str) -> type[Model]:
    models = catalogue()
    if name not in models:
        raise UserError(f"no model {name!r}: {nearest(name, models)}")
    return models[name]


def _parameters(cls: type[Model]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(cls.__init__).parameters.values() if p.name != "self"]


def _first_line(cls: type[Model]) -> str:
    module = inspect.getmodule(cls)
    return (inspect.getdoc(module) or "").splitlines()[0].partition(": ")[2]
