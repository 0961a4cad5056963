"""What computes a bundle's graphs: onnxruntime, or torch. Each is imported only where it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rechub_dist.errors import UserError, one_line
from rechub_dist.inference.bundle.manifest import GraphRecord

Engine = Literal["onnx", "torch"]  # as in `export --format`; the first that can be had is taken
ONNX: Final[tuple[Engine, ...]] = ("onnx",)
PACKAGES: Final[dict[Engine, str]] = {"onnx": "onnxruntime", "torch": "torch"}


class Computation(Protocol):
    """A graph that is ready to compute.

    Attributes:
        widths: of the inputs [B, D] and [B, L, D] in their order the width D; None for lengths [B].
        outputs: how many it has.
    """

    widths: list[int | None]
    outputs: int

    def __call__(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """The outputs. Raises UserError if the inputs cannot be computed."""


def engine_of(where: Path, graphs: Mapping[Any, GraphRecord], wanted: Engine | None) -> Engine:
    """The engine that computes a bundle's graphs: `wanted`, else the first that has its graphs and is installed.

    Raises:
        UserError: there is none, with what is missing.
    """
    if wanted is not None and wanted not in PACKAGES:
        raise UserError(f"engine is {wanted!r}, must be one of {', '.join(PACKAGES)}")
    there: list[Engine] = [engine for engine in PACKAGES if all(g.file_for(engine) for g in graphs.values())]
    if wanted is not None and wanted not in there:
        raise UserError(f"{where} has no graphs for {PACKAGES[wanted]}; export it with --format {wanted}")
    for engine in there if wanted is None else [wanted]:
        if find_spec(PACKAGES[engine]) is not None:
            return engine
    packages = [PACKAGES[engine] for engine in (there if wanted is None else [wanted])]
    other = " (or export it with --format torch, too, where torch is)" if packages == ["onnxruntime"] else ""
    raise UserError(f"{where} needs {' or '.join(packages)}: pip install {packages[0]}{other}")


def open_graph(engine: Engine, path: Path, threads: int | None = None) -> Computation:
    """A graph, from its file.

    Raises:
        UserError: it cannot be read, or the engine is not installed.
    """
    return OnnxGraph(path, threads) if engine == "onnx" else TorchGraph(path, threads)


class OnnxGraph:
    """An ONNX graph on onnxruntime.

    Args:
        path: its file.
        threads: that compute one call; default: as many as there are cores.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        try:
            import onnxruntime  # noqa: PLC0415
        except ImportError:
            raise UserError("a bundle needs onnxruntime: pip install onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if threads is not None:
            options.intra_op_num_threads = threads
        self._path = path
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own have no common class
            raise UserError(f"{path} cannot be read: {one_line(error)}; export the bundle again") from None
        entries = self._session.get_inputs()
        self.names = [entry.name for entry in entries]
        self.widths: list[int | None] = [entry.shape[-1] if len(entry.shape) > 1 else None for entry in entries]
        self.outputs = len(self._session.get_outputs())

    def __call__(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        try:
            found: list[NDArray[Any]] = self._session.run(None, dict(zip(self.names, inputs, strict=True)))
        except Exception as error:  # as above
            raise UserError(f"{self._path} cannot be computed: {one_line(error)}; export the bundle again") from None
        return found


class TorchGraph:
    """A program of torch.export, on torch's CPU.

    Args:
        path: its file.
        threads: that compute one call; torch has one such number for the whole process.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        try:
            import torch  # noqa: PLC0415
        except ImportError:
            raise UserError("this bundle needs torch: pip install torch") from None
        from rechub_dist.inference.bundle.program import read_program  # noqa: PLC0415

        self._torch = torch
        self._path = path
        if threads is not None:
            torch.set_num_threads(threads)
        program = read_program(path)
        try:
            given = set(program.graph_signature.user_inputs)
            shapes = [node.meta["val"].shape for node in program.graph.nodes if node.name in given]
            self.widths: list[int | None] = [int(shape[-1]) if len(shape) > 1 else None for shape in shapes]
            self.outputs = len(program.graph_signature.user_outputs)
            self._module = program.module()
        except Exception as error:  # whatever torch says of a program that is none
            raise UserError(f"{path} cannot be read: {one_line(error)}; export the bundle again") from None

    def __call__(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        torch = self._torch
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in inputs]
        try:
            with torch.inference_mode():
                return [output.numpy() for output in self._module(tensors)]
        except Exception as error:  # a guard's AssertionError, or what an operator raises
            raise UserError(f"{self._path} cannot be computed: {one_line(error)}; export the bundle again") from None
