"""A page of documentation for each model, from its code: `rechub-dist models --markdown FOLDER`."""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path
from typing import Final

from rechub_dist.assembly.examples import example_model, example_run
from rechub_dist.assembly.flow import flow, parts
from rechub_dist.cli.markdown import row
from rechub_dist.errors import UserError
from rechub_dist.models import Model, catalogue, family

WHEN: Final = {
    "DSSM": "Users and items have features; items that nobody has seen yet shall be found, too.",
    "FacebookDSSM": "As DSSM, with a triplet loss and further labels that the same towers learn from.",
    "GRU4Rec": "Sessions of unknown users: what comes next, by the order of items alone.",
    "MIND": "Users have several unlike interests, and each shall find items of its own.",
    "NARM": "Sessions with a main purpose, which attention over the whole session finds.",
    "SASRec": "Histories whose order matters: the first to try for the next item.",
    "YoutubeDNN": "A user's features and what was watched, whatever its order; items are known by their ids.",
    "AFM": "Pairs of features are enough, and how much each counts shall be learned; there is no deep network.",
    "BST": "A short history and its order, with the gaps in time, beside a candidate.",
    "DCN": "Explicit crosses of ids and numbers, with few parameters.",
    "DCNv2": "Explicit crosses of ids and numbers, by matrices: beside DeepFM the other one to try first.",
    "DeepFM": "Ids and numbers without a history: the first to try.",
    "DIEN": "As DIN, where interests change along the history; it steps through it, which takes longer.",
    "DIN": "A candidate beside a history: the first to try where rows have one.",
    "EDCN": "As DCN, where the cross and the deep network shall tell each other what they find.",
    "FiBiNET": "Few fields with ids, of which some matter much more than others; all pairs are computed.",
    "WideDeep": "You know which combinations of ids matter, and name them as crosses.",
    "ESMM": "Something that can only follow a click: a purchase, say, learned from all impressions.",
    "MMoE": "Several labels of a row that may disagree.",
    "PLE": "Several labels of a row that harm each other, with experts of their own for each.",
    "SharedBottom": "Several labels of a row that go together: the first to try with several.",
}
_MARK: Final = "<!-- rechub-dist models --markdown FOLDER -->"
_FAMILIES: Final = {"recall": "recall model", "ranking": "ranking model", "multitask": "multi-task model"}
_OUTPUTS: Final = {"logits": "logits", "user": "users' vectors", "item": "items' vectors"}
_PICTURE: Final = """Of the run file below, as seen in a forward pass. Dropouts are left out; what is computed between
the parts (sums, products, concatenations) is in the arrows."""
_PARAMETERS: Final = "Keys of `model` in a run file, beside `name: {name}`. Features are given by their names."
_LOOKUPS: Final = "What it reads with the run file below; `[rows x width]` are those of the table."
_RUN_FILE: Final = """`rechub-dist models {name} --run-file` prints it; its first line is the command that makes the
data. [Results](../models.md#results) on public data have run files of their own."""


def write_pages(folder: Path) -> None:
    """Write a page for each model, `deepfm.md`, and replace those that were written before.

    Raises:
        UserError: a file of such a name is something else.
    """
    pages = {folder / f"{name.lower()}.md": cls for name, cls in catalogue().items()}
    for path in pages:
        if path.exists() and _MARK not in path.read_text(encoding="utf-8"):
            raise UserError(f"{path} is none of the pages that this command writes: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path, cls in pages.items():
        path.write_text(page(cls), encoding="utf-8")


def page(cls: type[Model]) -> str:
    """What a model is, reads and answers, and a run file for it."""
    name, model = cls.__name__, example_model(cls)
    idea = (inspect.getdoc(inspect.getmodule(cls)) or "").splitlines()[0].partition(": ")[2]
    (formula, *prose), meanings, after = _docstring(cls)
    objectives = " or ".join(f"`{one}`" for one in cls.objectives)
    parts_of_page = [
        f"# {name}\n{_MARK}",
        f"A {_FAMILIES[family(cls)]}: {idea}",
        f"**When to take it.** {WHEN[name]} See [which model](../choose_a_model.md).",
        f"**Paper.** {cls.paper or 'None of its own'}.",
        f"## Formula\n\n```text\n{formula}\n```",
        *map(_markdown, [*prose, *after]),
        f"## Picture\n\n{_PICTURE}\n\n{picture(model)}",
        f"## Parameters\n\n{_PARAMETERS.format(name=name)}\n\n{_parameters(cls, meanings)}",
        f"## Lookups\n\n{_LOOKUPS}\n\n{_lookups(model)}",
        f"## Output\n\n{_markdown(inspect.getdoc(cls.forward) or '')}\n\nObjective: {objectives}.",
        f"## Run file\n\n{_RUN_FILE.format(name=name)}\n\n```yaml\n{example_run(cls).rstrip()}\n```",
    ]
    return "\n\n".join(parts_of_page) + "\n"


def picture(model: Model) -> str:
    """What feeds what in a model, as a mermaid flowchart; inputs that go the same way are one box."""
    edges = flow(model)
    kinds = {lookup.name: "pooled" if lookup.pooling else "sequence" for lookup in model.lookups()}
    kinds |= {feature.name: "dense" for feature in model.dense_features()}
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, kind in kinds.items():
        targets = tuple(target for source, target in edges if source == name)
        groups.setdefault((kind, targets), []).append(name)
    lines, ids = ["```mermaid", "flowchart TD"], {}
    for number, ((kind, targets), names) in enumerate(groups.items()):
        if not targets:
            continue
        text = ", ".join(names)
        box = {"pooled": f'[("{text}")]', "sequence": f'[("{text}, one by one")]', "dense": f'[/"{text}"/]'}[kind]
        lines.append(f"    input{number}{box}")
        ids.update(dict.fromkeys(names, f"input{number}"))
    for number, (name, part) in enumerate(parts(model)):
        ids[name] = f"part{number}"
        lines.append(f'    part{number}["{name}: {type(part).__name__.lstrip("_")}"]')
    for target in dict.fromkeys(target for _, target in edges if target.startswith("output.")):
        name = target.removeprefix("output.")
        ids[target] = f"output{len(ids)}"
        lines.append(f'    {ids[target]}(["{_OUTPUTS.get(name, f"loss: {name}")}"])')
    arrows = dict.fromkeys(f"    {ids[source]} --> {ids[target]}" for source, target in edges)
    return "\n".join([*lines, *arrows, "```"])


def _docstring(cls: type[Model]) -> tuple[list[str], dict[str, str], list[str]]:
    """A class's docstring: paragraphs before its arguments, the arguments' meanings, paragraphs after them."""
    before, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")
    arguments, _, after = rest.partition("\n\n")
    meanings: dict[str, str] = {}
    for line in arguments.splitlines():
        start = re.match(r" {4}(\w+): (.*)", line)
        if start:
            name = start[1]
            meanings[name] = start[2]
        else:
            meanings[name] += " " + line.strip()
    return before.strip().split("\n\n"), meanings, [one for one in after.split("\n\n") if one]


def _parameters(cls: type[Model], meanings: dict[str, str]) -> str:
    lines = ["| parameter | type | default | meaning |", "|---|---|---|---|"]
    hints = typing.get_type_hints(cls.__init__)
    for parameter in inspect.signature(cls.__init__).parameters.values():
        if parameter.name == "self":
            continue
        of_table = re.fullmatch(r"Annotated\[(\w+), RowsOf\(.(\w+).\)\]", str(parameter.annotation))
        hint = hints[parameter.name]
        kind = of_table[1] if of_table else str(parameter.annotation)
        if typing.get_origin(hint) is typing.Literal:
            kind = ", ".join(typing.get_args(hint))
        if of_table:
            default = f"those of the table of `{of_table[2]}`"
        elif parameter.default is inspect.Parameter.empty:
            default = "required"
        else:
            default = f"`{parameter.default!r}`"
        meaning = _markdown(meanings[parameter.name])
        cells = (f"`{parameter.name}`", f"`{kind}`", default, meaning)
        lines.append(row(cells))
    return "\n".join(lines)


def _lookups(model: Model) -> str:
    lines = ["| lookup | feature | table | pooling |", "|---|---|---|---|"]
    for lookup in model.lookups():
        table = f"`{lookup.table.name}` [{lookup.table.rows:,} x {lookup.dim}]"
        feature = f"`{lookup.feature.name}` ({lookup.feature.kind})"
        lines.append(f"| `{lookup.name}` | {feature} | {table} | {lookup.pooling or 'none: a sequence'} |")
    return "\n".join(lines)


def _markdown(paragraph: str) -> str:
    """Plain text of a docstring as Markdown: formulas keep their signs, and pages become links."""
    if paragraph.startswith("    "):  # a block of formulas
        return paragraph
    pieces = re.split(r"(`[^`]*`)", paragraph)
    pieces[::2] = [re.sub(r"([*\[\]])", r"\\\1", one).replace("<", "&lt;") for one in pieces[::2]]
    return re.sub(r"docs/(\w+)\.md", r"[docs/\1.md](../\1.md)", "".join(pieces))
