"""A model without its tables as ONNX graphs: what a bundle computes between what it looks up and what it answers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import Dim

from rechub_dist.assembly.parts import Plan
from rechub_dist.embedded import Embedded, Lookup
from rechub_dist.embedded import Sequence as Padded
from rechub_dist.errors import UserError, one_line
from rechub_dist.features import CatalogueFeature, DenseFeature, NegativeFeature, SequenceFeature, TimeGapFeature
from rechub_dist.inference.bundle.manifest import GraphName, GraphRecord

OPSET: Final = 20
_ROWS, _LENGTH = 3, 4  # of the batch that a graph is traced with


@dataclass(frozen=True)
class Part:
    """What becomes one graph.

    Attributes:
        name: `score`, `user` or `item`.
        lookups, dense: its inputs.
        outputs: the names of its outputs.
        compute: from what was looked up to the outputs.
    """

    name: GraphName
    lookups: tuple[Lookup, ...]
    dense: tuple[DenseFeature, ...]
    outputs: tuple[str, ...]
    compute: Any

    @property
    def pooled(self) -> list[Lookup]:
        """The lookups of one vector a row."""
        return [lookup for lookup in self.lookups if lookup.pooling is not None and not _is_drawn(lookup)]

    @property
    def sequences(self) -> list[Lookup]:
        """The lookups of several."""
        return [lookup for lookup in self.lookups if lookup.pooling is None and not _is_drawn(lookup)]

    @property
    def drawn(self) -> list[Lookup]:
        """The lookups of negatives, which only training has."""
        return [lookup for lookup in self.lookups if _is_drawn(lookup)]


def _is_drawn(lookup: Lookup) -> bool:
    return isinstance(lookup.feature, NegativeFeature | CatalogueFeature)


def parts_of(found: Plan) -> list[Part]:
    """The graphs of a model: its scores, or for a recall model its users and its items."""
    model, objective = found.model, found.objective
    if (ranking := objective.ranking) is None:
        names = tuple(_scored(found))
        return [Part("score", model.lookups(), model.dense_features(), names, lambda e: _scores(found, e))]
    of_user = tuple(lookup for lookup in model.lookups() if lookup not in ranking.lookups)
    dense = tuple(feature for feature in model.dense_features() if feature not in ranking.dense)
    return [
        Part("user", of_user, dense, ("vectors", "live"), ranking.user),
        Part("item", ranking.lookups, ranking.dense, ("vectors",), lambda e: (ranking.vectors(e),)),
    ]


def _scored(found: Plan) -> list[str]:
    assert found.objective.tasks is not None
    return list(found.objective.tasks.scored)


def _scores(found: Plan, embedded: Embedded) -> tuple[Tensor, ...]:
    predictions = found.objective.calibrated(found.model(embedded))
    return tuple(predictions[name] for name in _scored(found))


class _Graph(nn.Module):
    """A part, from its inputs in a list."""

    def __init__(self, part: Part, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._part = part

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        left = iter(inputs)
        embedded = Embedded()
        for lookup in self._part.pooled:
            embedded.vectors[lookup.name] = next(left)
        for lookup in self._part.sequences:
            embedded.sequences[lookup.name] = Padded(next(left), next(left))
        for feature in self._part.dense:
            embedded.dense[feature.name] = next(left)
        for lookup in self._part.drawn:  # as in evaluation: there is none
            rows = inputs[0].shape[0]
            none = inputs[0].new_zeros(rows, dtype=torch.int64)
            if lookup.pooling is None:
                embedded.sequences[lookup.name] = Padded(inputs[0].new_zeros(rows, 1, lookup.dim), none)
            else:
                embedded.vectors[lookup.name] = inputs[0].new_zeros(rows, lookup.dim)
        return tuple(self._part.compute(embedded))


def _example(part: Part, rows: int, length: int) -> list[Tensor]:
    inputs = [torch.randn(rows, lookup.dim) for lookup in part.pooled]
    for lookup in part.sequences:
        lengths = torch.arange(rows) % length + 1
        lengths[0] = length
        inputs += [torch.randn(rows, length, lookup.dim), lengths]
    return inputs + [torch.randn(rows, feature.dim) for feature in part.dense]


def export_graph(part: Part, model: nn.Module, folder: Path) -> GraphRecord:
    """Write a part as `NAME.onnx`, for any number of rows and, where the model can be traced so, any length.

    A model that steps through a sequence is traced for the features' longest: it masks what is beyond a row's own.

    Raises:
        UserError: the model cannot be exported.
    """
    _require_exporter()
    graph = _Graph(part, model.eval()).eval()
    longest = max((_longest(lookup) for lookup in part.sequences), default=1)
    errors = []
    for length in [None, longest] if part.sequences else [None]:
        try:
            with _quiet(), torch.no_grad():
                _write(part, graph, folder / f"{part.name}.onnx", length)
                _same(part, graph, folder / f"{part.name}.onnx", length, longest)
        except _UnlikeError as error:
            errors.append(str(error))
        except Exception as error:
            errors.append(f"{type(error).__name__}: {one_line(error)}")
        else:
            return GraphRecord(
                file=f"{part.name}.onnx",
                pooled=tuple(lookup.name for lookup in part.pooled),
                sequences=tuple(lookup.name for lookup in part.sequences),
                dense=tuple(feature.name for feature in part.dense),
                outputs=part.outputs,
                length=length,
            )
    raise UserError(f"the model cannot be exported as ONNX ({part.name}): {errors[-1]}")


def _require_exporter() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UserError(f"export needs {', '.join(missing)}: pip install 'rechub-dist[export]', or {' '.join(missing)}")


class _UnlikeError(Exception):
    """A graph that does not compute what the model does."""


def _write(part: Part, graph: nn.Module, path: Path, length: int | None) -> None:
    inputs = _example(part, _ROWS, length or _LENGTH)
    rows, steps = Dim("rows", min=1, max=1 << 20), Dim("steps", min=1, max=1 << 16)
    shapes: list[dict[int, Any]] = [{0: rows} for _ in part.pooled]
    for _ in part.sequences:
        shapes += [{0: rows} if length else {0: rows, 1: steps}, {0: rows}]
    shapes += [{0: rows} for _ in part.dense]
    names = [f"{lookup.name}" for lookup in part.pooled]
    for lookup in part.sequences:
        names += [lookup.name, f"{lookup.name}.lengths"]
    names += [feature.name for feature in part.dense]
    program = torch.export.export(graph, (inputs,), dynamic_shapes=(shapes,), strict=False)
    made = torch.onnx.export(program, (), dynamo=True, opset_version=OPSET, verbose=False, optimize=True)
    assert made is not None
    for value, name in zip(made.model.graph.inputs, names, strict=True):
        value.name = f"in/{name}"
    made.save(str(path))


def _same(part: Part, graph: nn.Module, path: Path, length: int | None, longest: int) -> None:
    """Compare the graph with the model on batches of other shapes than it was traced with. Raises _UnlikeError."""
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    for rows, steps in ((1, 1), (7, longest), (64, max(1, longest // 2))):
        inputs = _example(part, rows, steps)
        fed = _padded(part, inputs, length) if length else inputs
        got = session.run(None, dict(zip(names, (tensor.numpy() for tensor in fed), strict=True)))
        for name, one, other in zip(part.outputs, graph(inputs), got, strict=True):
            if one.shape != other.shape or not torch.allclose(one.float(), torch.from_numpy(other).float(), 1e-4, 1e-5):
                raise _UnlikeError(f"output {name!r} differs from the model's for {rows} rows of {steps} steps")


def _padded(part: Part, inputs: Sequence[Tensor], length: int) -> list[Tensor]:
    """The inputs with their sequences padded to a fixed length."""
    found = list(inputs)
    for i in range(len(part.sequences)):
        place = len(part.pooled) + 2 * i
        rows, steps, dim = found[place].shape
        found[place] = torch.cat([found[place], torch.zeros(rows, length - steps, dim)], dim=1)
    return found


def _longest(lookup: Lookup) -> int:
    feature = lookup.feature
    return feature.max_length if isinstance(feature, SequenceFeature | TimeGapFeature) else 1


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says to its own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
