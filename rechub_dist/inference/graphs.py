"""A model without its tables as graphs: what a bundle computes between what it looks up and what it answers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
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
from rechub_dist.inference.bundle.engines import ONNX, Computation, Engine, open_graph
from rechub_dist.inference.bundle.manifest import GraphName, GraphRecord
from rechub_dist.inference.bundle.program import save_program

OPSET: Final = 20
MAX_ROWS: Final = 1 << 20  # of a batch
SUFFIXES: Final[dict[Engine, str]] = {"onnx": "onnx", "torch": "pt2"}
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


class Graph(nn.Module):
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


def export_graph(part: Part, model: nn.Module, folder: Path, engines: Collection[Engine] = ONNX) -> GraphRecord:
    """Write a part as `NAME.onnx` and `NAME.pt2`, for any number of rows and, where the model can be traced so, any
    length.

    A model that steps through a sequence is traced for the features' longest: it masks what is beyond a row's own.

    Args:
        part: of the model.
        model: it.
        folder: to write into.
        engines: for which to write it.

    Raises:
        UserError: the model cannot be exported.
    """
    require_exporter(engines)
    graph = Graph(part, model.eval()).eval()
    longest = max((_longest(lookup) for lookup in part.sequences), default=1)
    errors = []
    for length in [None, longest] if part.sequences else [None]:
        try:
            with quiet(), torch.no_grad():
                program = _traced(part, graph, length, longest)
                for engine in engines:
                    file = folder / f"{part.name}.{SUFFIXES[engine]}"
                    if engine == "onnx":
                        write_onnx(program, file, _input_names(part))
                    else:
                        save_program(program, file)
                    _same(part, graph, open_graph(engine, file), length, longest)
        except _UnlikeError as error:
            errors.append(str(error))
        except Exception as error:
            errors.append(f"{type(error).__name__}: {one_line(error)}")
        else:
            return GraphRecord(
                file=f"{part.name}.onnx" if "onnx" in engines else None,
                program=f"{part.name}.pt2" if "torch" in engines else None,
                pooled=tuple(lookup.name for lookup in part.pooled),
                sequences=tuple(lookup.name for lookup in part.sequences),
                dense=tuple(feature.name for feature in part.dense),
                outputs=part.outputs,
                length=length,
            )
    raise UserError(f"the model cannot be exported ({part.name}): {errors[-1]}")


def require_exporter(engines: Collection[Engine]) -> None:
    """Raise UserError for want of the packages that write ONNX."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing and "onnx" in engines:
        raise UserError(f"export needs {', '.join(missing)}: pip install 'rechub-dist[export]', or {' '.join(missing)}")


class _UnlikeError(Exception):
    """A graph that does not compute what the model does."""


def _traced(part: Part, graph: nn.Module, length: int | None, longest: int) -> torch.export.ExportedProgram:
    inputs = _example(part, _ROWS, length or min(_LENGTH, max(2, longest)))
    rows, steps = Dim("rows", min=1, max=MAX_ROWS), Dim("steps", min=1, max=max(2, longest))
    shapes: list[dict[int, Any]] = [{0: rows} for _ in part.pooled]
    for _ in part.sequences:
        shapes += [{0: rows} if length else {0: rows, 1: steps}, {0: rows}]
    shapes += [{0: rows} for _ in part.dense]
    return torch.export.export(graph, (inputs,), dynamic_shapes=(shapes,), strict=False)


def _input_names(part: Part) -> list[str]:
    names = [f"in/{lookup.name}" for lookup in part.pooled]
    for lookup in part.sequences:
        names += [f"in/{lookup.name}", f"in/{lookup.name}.lengths"]
    return [*names, *(f"in/{feature.name}" for feature in part.dense)]


def write_onnx(
    program: torch.export.ExportedProgram, path: Path, inputs: Sequence[str], outputs: Sequence[str] | None = None
) -> None:
    """Write a program as ONNX, with names for its inputs, and for its outputs."""
    made = torch.onnx.export(program, (), dynamo=True, opset_version=OPSET, verbose=False, optimize=True)
    assert made is not None
    graph = made.model.graph
    if outputs is not None:  # names of features stand for nothing else
        for number, value in enumerate([*graph.initializers.values(), *(v for node in graph for v in node.outputs)]):
            value.name = f"_{number}"
        for value, name in zip(graph.outputs, outputs, strict=True):
            value.name = name
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    made.save(str(path))


def _same(part: Part, graph: nn.Module, written: Computation, length: int | None, longest: int) -> None:
    """Compare what was written with the model on batches of other shapes than it was traced with."""
    for rows, steps in ((1, 1), (7, longest), (64, max(1, longest // 2))):
        inputs = _example(part, rows, steps)
        got = written([tensor.numpy() for tensor in (_padded(part, inputs, length) if length else inputs)])
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
def quiet() -> Iterator[None]:
    """Without what the exporter says to its own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
