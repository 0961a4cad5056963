"""A model repository for NVIDIA's Triton server: an ONNX graph of a bundle, and what Triton has to know of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rechub_dist.errors import UserError
from rechub_dist.inference.bundle.manifest import REPOSITORY, BundleManifest, records_of

MAX_BATCH: Final = 4096  # rows
_PREFERRED: Final = (64, 256, 1024)
_WAIT_US: Final = 500
_TYPES: Final = {1: "TYPE_FP32", 7: "TYPE_INT64", 9: "TYPE_BOOL"}  # by ONNX's number of an element type


def add_repository(work: Path, manifest: BundleManifest) -> BundleManifest:
    """Write `model_repository/NAME/config.pbtxt` and `1/model.onnx` of each graph; returns the manifest with them.

    The graphs are the whole ones, where the bundle has them: their inputs are ids, and a client needs no tables.
    Otherwise they are those without tables, whose inputs are the vectors that a client has looked up.
    """
    name = re.sub(r"\W", "", manifest.model.rpartition(":")[2])
    for part, graph in manifest.graphs.items():
        whole = manifest.whole.get(part)
        file = graph.file if whole is None else whole.file
        if file is None:
            raise UserError("--format triton serves an ONNX graph: add whole, or onnx for the graph without tables")
        own = name if part == "score" else f"{name}-{part}"
        folder = work / REPOSITORY / own
        (folder / "1").mkdir(parents=True)
        shutil.copyfile(work / file, folder / "1" / "model.onnx")
        (folder / "config.pbtxt").write_text(_config(own, work / file), encoding="utf-8")
    return manifest.model_copy(update={"files": records_of(work)})


def _config(name: str, path: Path) -> str:
    import onnx  # noqa: PLC0415

    graph = onnx.load(str(path), load_external_data=False).graph
    lines = [
        f"name: {_quoted(name)}",
        'platform: "onnxruntime_onnx"',
        f"max_batch_size: {MAX_BATCH}",
        *_tensors("input", graph.input),
        *_tensors("output", graph.output),
        "dynamic_batching {",
        f"  preferred_batch_size: [ {', '.join(map(str, _PREFERRED))} ]",
        f"  max_queue_delay_microseconds: {_WAIT_US}",
        "}",
        "instance_group [ { kind: KIND_AUTO } ]",
    ]
    return "\n".join(lines) + "\n"


def _tensors(field: str, values: Sequence[Any]) -> list[str]:
    """Inputs or outputs as Triton describes them: the dimension of rows, the first, is left out.

    Triton knows no tensor without a further dimension: where the graph has [B], requests have [B, 1].
    """
    lines = []
    for value in values:
        kind = value.type.tensor_type
        dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim[1:]]
        shape = f"dims: [ {', '.join(map(str, dims))} ]" if dims else "dims: [ 1 ] reshape { shape: [ ] }"
        lines.append(f"{field} {{ name: {_quoted(value.name)} data_type: {_TYPES[kind.elem_type]} {shape} }}")
    return lines


def _quoted(name: str) -> str:
    """As protobuf's text format has it: bytes of UTF-8, escaped where they are not plain."""
    return '"' + "".join(chr(b) if 32 <= b < 127 and chr(b) not in '"\\' else f"\\{b:03o}" for b in name.encode()) + '"'
