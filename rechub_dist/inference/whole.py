"""Whole graphs: a model with its tables inside, as one ONNX file whose inputs are ids and dense values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim

from rechub_dist.assembly.parts import Plan
from rechub_dist.data.columns.window import Window
from rechub_dist.data.given import windows
from rechub_dist.embedded import Lookup
from rechub_dist.errors import UserError, one_line
from rechub_dist.features import CrossFeature, LookupFeature, SparseFeature
from rechub_dist.inference.bundle.bundle import BATCH, Bundle
from rechub_dist.inference.bundle.engines import ONNX, OnnxGraph
from rechub_dist.inference.bundle.manifest import TABLES, BundleManifest, GraphRecord, WholeRecord, records_of
from rechub_dist.inference.bundle.tables import MappedTable, open_tables
from rechub_dist.inference.bundle.whole import whole_inputs
from rechub_dist.inference.check import ROWS, as_values, first_rows, rows_to_check
from rechub_dist.inference.graphs import MAX_ROWS, Graph, Part, quiet, require_exporter, write_onnx

LIMIT: Final = 256_000_000  # bytes of tables and weights in one file
MOST: Final = 2_000_000_000  # that protobuf can hold, with room for the graph
_TOLERANCE: Final = 1e-5  # of a probability, or of a vector's largest number


@dataclass(frozen=True)
class Whole:
    """How whole graphs are made.

    Attributes:
        limit: bytes that one may have.
        data: rows to find the features with lists on, and to compare on; default: the run's valid split, else train.
    """

    limit: int = LIMIT
    data: str | None = None


def check_sizes(parts: Sequence[Part], model: nn.Module, limit: int) -> None:
    """Raise UserError if a part and its tables have more than `limit` bytes, or more than an ONNX file holds."""
    dense = sum(value.nbytes for value in model.state_dict().values())
    for part in parts:
        tables = {lookup.table.name: lookup.table.rows * lookup.dim * 4 for lookup in (*part.pooled, *part.sequences)}
        size = dense + sum(tables.values())
        if size > min(limit, MOST):
            more = f"--whole-mb allows more, up to {MOST // 10**6:,}" if size <= MOST else "no ONNX file holds more"
            raise UserError(
                f"--format whole: {_file(part)} would have {size / 1e6:,.0f} MB, and {min(limit, MOST) / 1e6:,.0f} MB "
                f"are allowed: {more}; without whole, tables are in a file of their own"
            )


def add_whole(work: Path, found: Plan, parts: Sequence[Part], manifest: BundleManifest, whole: Whole) -> BundleManifest:
    """Write the whole graphs of a bundle, with the numbers of its tables; returns its manifest with them.

    Each is compared with the bundle on up to 10,000 rows, and by them it is known which features have lists.

    Raises:
        UserError: there are no rows, the model cannot be exported so, or its answers are not those of the bundle.
    """
    require_exporter(ONNX)
    bundle, tables = Bundle(work), open_tables(work / TABLES, manifest.tables)
    rows = as_values(first_rows(whole.data or rows_to_check(found.config), ROWS), bundle.schema)
    records: dict[Any, WholeRecord] = {}
    for part in parts:
        graph = manifest.graphs[part.name]
        seen = _windows(bundle, part, rows)
        record = _record(part, graph, seen)
        path = work / record.file
        try:
            with quiet(), torch.no_grad():
                write_onnx(_traced(part, found.model, record, tables), path, record.inputs, record.outputs)
        except Exception as error:
            why = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"--format whole: {path.name} cannot be exported: {why}") from error
        _compare(OnnxGraph(path), record, bundle, part, seen)
        records[part.name] = record
    return manifest.model_copy(update={"whole": records, "files": records_of(work)})


def _file(part: Part) -> str:
    return "whole.onnx" if part.name == "score" else f"whole-{part.name}.onnx"


def _windows(bundle: Bundle, part: Part, rows: pa.Table) -> list[Window]:
    """The rows that a part is compared on; of items those of the rows, else of the bundle's own."""
    if part.name == "item" and not set(bundle.columns_of("item")) <= set(rows.column_names):
        return bundle.catalogue.first_windows(ROWS)
    return list(windows(rows, bundle.spec(part.name), BATCH))


def _record(part: Part, graph: GraphRecord, seen: Sequence[Window]) -> WholeRecord:
    lookups = [*part.pooled, *part.sequences]
    features: dict[str, LookupFeature] = {lookup.feature.name: lookup.feature for lookup in lookups}
    lists = [name for name, feature in features.items() if _has_lists(feature, seen)]
    sequences = dict.fromkeys(lookup.feature.name for lookup in part.sequences if lookup.feature.name in lists)
    record = WholeRecord(
        file=_file(part),
        ids=tuple(name for name in features if name not in lists),
        lists=tuple(lists),
        weighted=tuple(n for n in lists if isinstance(f := features[n], SparseFeature) and f.weights is not None),
        sequences=tuple(sequences),
        dense=graph.dense,
        outputs=tuple(f"predicted_{name}" for name in graph.outputs) if part.name == "score" else graph.outputs,
        length=graph.length,
    )
    names = [*record.inputs, *record.outputs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--format whole: two inputs or outputs would be named {name!r}; rename the feature")
    return record


def _has_lists(feature: LookupFeature, seen: Sequence[Window]) -> bool:
    """Whether a row may have no id of a feature, or several."""
    if isinstance(feature, CrossFeature):
        return any(_has_lists(source, seen) for source in feature.inputs)
    may_drop = isinstance(feature, SparseFeature) and "drop" in (feature.out_of_range, feature.missing)
    return may_drop or any(feature.name in window.ragged for window in seen)


class _Whole(nn.Module):
    """A part, from ids."""

    def __init__(self, part: Part, model: nn.Module, record: WholeRecord, tables: dict[str, MappedTable]) -> None:
        super().__init__()
        self.after = Graph(part, model)  # "graph" is taken by torch.fx
        self._part, self._record = part, record
        self._places = {name: place for place, name in enumerate(dict.fromkeys(_tables(part)))}
        self.weights = nn.ParameterList(
            nn.Parameter(torch.from_numpy(np.array(_all(tables[name]))), requires_grad=False) for name in self._places
        )

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        given = dict(zip(self._record.inputs, inputs, strict=True))
        read = [self._pooled(lookup, given) for lookup in self._part.pooled]
        for lookup in self._part.sequences:
            read += self._sequence(lookup, given)
        outputs: tuple[Tensor, ...] = self.after([*read, *(given[name] for name in self._record.dense)])
        return outputs

    def _vectors(self, lookup: Lookup, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weights[self._places[lookup.table.name]])

    def _pooled(self, lookup: Lookup, given: dict[str, Tensor]) -> Tensor:
        name = lookup.feature.name
        if name in self._record.ids:
            return self._vectors(lookup, given[name])
        ids, mask = _ids(given, name)
        weights = mask.float()
        if name in self._record.weighted:
            weights = torch.where(mask, given[f"{name}.weights"], 0.0)
        sums = (self._vectors(lookup, ids) * weights[..., None]).sum(dim=1)
        if lookup.pooling != "mean":
            return sums
        divisor = weights.sum(dim=1, keepdim=True)
        return sums / torch.where(divisor > 0, divisor, 1.0)

    def _sequence(self, lookup: Lookup, given: dict[str, Tensor]) -> list[Tensor]:
        name = lookup.feature.name
        if name in self._record.ids:
            return [self._vectors(lookup, given[name][:, None]), torch.ones_like(given[name])]
        ids, mask = _ids(given, name)
        return [self._vectors(lookup, ids) * mask[..., None], given[f"{name}.lengths"]]


def _ids(given: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """A list's ids, 0 beyond a row's length, and its mask, [B, L] each."""
    ids = given[name]
    mask = torch.arange(ids.shape[1], device=ids.device) < given[f"{name}.lengths"][:, None]
    return torch.where(mask, ids, 0), mask


def _tables(part: Part) -> list[str]:
    return [lookup.table.name for lookup in (*part.pooled, *part.sequences)]


def _all(table: MappedTable) -> NDArray[np.float32]:
    return table.rows(np.arange(len(table.values)))


def _traced(
    part: Part, model: nn.Module, record: WholeRecord, tables: dict[str, MappedTable]
) -> torch.export.ExportedProgram:
    rows, count = Dim("rows", min=1, max=MAX_ROWS), 3
    longest = max([2, *(_max_length(lookup) for lookup in part.sequences)])
    steps = Dim("steps", min=1, max=longest)
    inputs: list[Tensor] = [torch.zeros(count, dtype=torch.int64) for _ in record.ids]
    shapes: list[dict[int, Any]] = [{0: rows} for _ in record.ids]
    for number, name in enumerate(record.lists):
        fixed = record.length if name in record.sequences else None
        length = fixed or (min(4, longest) if name in record.sequences else 4)
        own = steps if name in record.sequences else Dim(f"list_{number}", min=1, max=1 << 16)
        shape: dict[int, Any] = {0: rows} if fixed else {0: rows, 1: own}
        inputs += [torch.zeros(count, length, dtype=torch.int64), torch.full((count,), length)]
        shapes += [shape, {0: rows}]
        if name in record.weighted:
            inputs.append(torch.ones(count, length))
            shapes.append(shape)
    inputs += [torch.zeros(count, feature.dim) for feature in part.dense]
    shapes += [{0: rows} for _ in part.dense]
    module = _Whole(part, model.eval(), record, tables).eval()
    return torch.export.export(module, (inputs,), dynamic_shapes=(shapes,), strict=False)


def _max_length(lookup: Lookup) -> int:
    return int(getattr(lookup.feature, "max_length", 1))


def _compare(graph: OnnxGraph, record: WholeRecord, bundle: Bundle, part: Part, seen: Sequence[Window]) -> None:
    """Raise UserError if the graph does not answer what the bundle answers, on the rows at once and on each alone."""
    if graph.names != record.inputs:
        raise UserError(f"--format whole: {record.file} has the inputs {graph.names}, not {record.inputs}")
    for window in seen:
        inputs = whole_inputs(record, bundle.spec(part.name), window)
        got = graph(list(inputs.values()))
        for name, one, other in zip(record.outputs, bundle.of_window(part.name, window), got, strict=True):
            most = max(1.0, float(np.abs(one).max(initial=0))) * _TOLERANCE
            apart = float(np.abs(one.astype(np.float64) - other).max(initial=0)) if one.shape == other.shape else np.inf
            if not apart <= most:
                raise UserError(
                    f"--format whole: {name} of {record.file} differs by up to {apart:.2g} from the bundle's, and "
                    f"{most:.2g} is allowed; leave whole out"
                )
