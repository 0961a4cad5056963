"""What an export can be written for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, Literal

from rechub_dist.errors import UserError, nearest
from rechub_dist.inference.bundle.manifest import REPOSITORY, BundleManifest

Format = Literal["onnx", "torch", "whole", "triton"]
FORMATS: Final[tuple[Format, ...]] = ("onnx", "torch", "whole", "triton")
DEFAULT: Final[tuple[Format, ...]] = ("onnx",)


def parse_formats(text: str) -> tuple[Format, ...]:
    """Names separated by commas. Raises UserError for another name."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in FORMATS:
            raise UserError(f"--format: {name!r} is unknown: {nearest(name, FORMATS)}")
    found = tuple(name for name in FORMATS if name in names)
    check_formats(found)
    return found


def check_formats(formats: Collection[Format]) -> None:
    """Raise UserError for formats of which no bundle can be made."""
    if not {"onnx", "torch"} & set(formats):
        raise UserError("--format: a bundle needs onnx or torch to score rows itself: add one of them")
    if "triton" in formats and not {"onnx", "whole"} & set(formats):
        raise UserError("--format: triton serves an ONNX graph: add whole, or onnx for the graph without tables")


def formats_of(manifest: BundleManifest) -> tuple[Format, ...]:
    """What a bundle is written for."""
    graphs = manifest.graphs.values()
    there = {
        "onnx": all(graph.file_for("onnx") for graph in graphs),
        "torch": all(graph.file_for("torch") for graph in graphs),
        "whole": bool(manifest.whole),
        "triton": any(name.startswith(f"{REPOSITORY}/") for name in manifest.files),
    }
    return tuple(name for name in FORMATS if there[name])
