"""Which parts of a model feed which, seen in a forward pass: what its picture is drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Lookup, Output, Sequence
from rechub_dist.models import Model

ROWS: Final = 4
_POSITIONS: Final = 3
_CONTAINERS: Final = (nn.ModuleList, nn.ModuleDict)
_LEFT_OUT: Final = (nn.Dropout, nn.Identity)  # what nobody looks for in a picture


def parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The named parts of a model, in the order of its constructor; those of a list one by one; no dropouts."""
    for name, child in module.named_children():
        if isinstance(child, _CONTAINERS):
            yield from parts(child, f"{prefix}{name}.")
        elif not isinstance(child, _LEFT_OUT):
            yield f"{prefix}{name}", child


def flow(model: Model) -> list[tuple[str, str]]:
    """Edges between lookups, dense features, parts and outputs (`output.user`), in the order of the forward pass.

    The graph of gradients of one pass over random vectors is followed from each part's result, and from each output,
    back to the results of other parts, to their parameters and to what was looked up. A part's own parameters are none
    of its inputs.
    """
    owners: dict[Any, str] = {}  # of nodes in the graph, and of the tensors where it ends
    leaves, embedded = random_batch(model)
    owners.update((id(tensor), name) for name, tensor in leaves)
    for name, part in parts(model):
        owners.update((id(parameter), name) for parameter in part.parameters())
    edges: dict[tuple[str, str], None] = {}
    kept = []  # nodes: one that nobody holds would be another object when it is met again

    def reached(name: str, results: list[Tensor]) -> None:
        nodes = [tensor.grad_fn for tensor in results if tensor.grad_fn is not None]
        edges.update(((source, name), None) for source in _sources(nodes, owners) if source != name)
        owners.update((node, name) for node in nodes)
        kept.extend(nodes)

    hooks = [
        part.register_forward_hook(lambda _, __, result, name=name: reached(name, list(_tensors(result))))
        for name, part in parts(model)
    ]
    torch.manual_seed(0)
    output = model(embedded)
    for hook in hooks:
        hook.remove()
    for name, tensor in _outputs(output):
        reached(name, [tensor])
    return list(edges)


def random_batch(
    model: Model, positions: Callable[[Lookup], int] = lambda _: _POSITIONS
) -> tuple[list[tuple[str, Tensor]], Embedded]:
    """Random vectors for what the model reads, which require gradients, and the batch of them.

    `positions` says how many of a sequence there are.
    """
    embedded = Embedded()
    leaves = []
    for lookup in model.lookups():
        if lookup.pooling is None:
            length = positions(lookup)
            values = torch.rand(ROWS, length, lookup.dim, requires_grad=True)
            embedded.sequences[lookup.name] = Sequence(values, torch.full((ROWS,), length), ROWS * length)
        else:
            values = embedded.vectors[lookup.name] = torch.rand(ROWS, lookup.dim, requires_grad=True)
        leaves.append((lookup.name, values))
    for feature in model.dense_features():
        embedded.dense[feature.name] = torch.rand(ROWS, feature.dim, requires_grad=True)
        leaves.append((feature.name, embedded.dense[feature.name]))
    return leaves, embedded


def _sources(nodes: list[Any], owners: dict[Any, str]) -> list[str]:
    """Who owns what the nodes were computed from, as far as the nearest owners."""
    found: dict[str, None] = {}
    todo, seen = list(reversed(nodes)), set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        owner = owners.get(node) or owners.get(id(getattr(node, "variable", None)))
        if owner is not None:
            found[owner] = None
        else:
            todo.extend(before for before, _ in reversed(node.next_functions) if before is not None)
    return list(found)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _outputs(output: Output) -> Iterator[tuple[str, Tensor]]:
    for name in ("user", "item", "logits"):
        tensor = getattr(output, name)
        if tensor is not None:
            yield f"output.{name}", tensor
    for name, tensor in output.aux.items():
        yield f"output.{name}", tensor
