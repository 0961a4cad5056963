"""Further forms of a bundle: programs of torch.export, whole ONNX graphs, Triton's repository. All answer alike."""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
from google.protobuf import text_format

from rechub_dist.errors import UserError
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.bundle.manifest import BundleManifest, records_of, write_manifest
from rechub_dist.inference.bundle.program import read_program
from rechub_dist.inference.export import export_bundle
from rechub_dist.inference.formats import parse_formats
from rechub_dist.inference.whole import Whole
from rechub_tests.ranks import RankPool
from rechub_tests.representatives import each_model
from rechub_tests.runs import run_file, train, write_data

ROOT = Path(__file__).parents[2]
EVERY = ("onnx", "torch", "whole", "triton")
TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64", "tensor(bool)": "TYPE_BOOL"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_data(root)
    return root


@pytest.fixture(scope="module")
def din(pool: RankPool, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of DIN, and a bundle of it in every form."""
    folder = tmp_path_factory.mktemp("din")
    pool.run(1, train, run_file(folder, data, "DIN"))
    export_bundle(str(folder / "out"), folder / "bundle", formats=EVERY)
    return folder


def outputs(bundle: Bundle, part: str, rows: Any) -> dict[str, np.ndarray]:
    """What a bundle answers, by its whole graph's names."""
    if part == "score":
        return {name: column.to_numpy() for name, column in zip(*columns(bundle.score(rows)), strict=True)}
    flat = bundle.vectors(part, rows).column(0).combine_chunks()
    while str(flat.type) != "float":
        flat = flat.flatten()
    return {"vectors": flat.to_numpy()}


def columns(table: Any) -> tuple[list[str], list[Any]]:
    return table.column_names, table.columns


def of_whole(bundle: Bundle, part: str, rows: Any) -> dict[str, np.ndarray]:
    """What the whole graph answers to a client that has nothing else."""
    record = bundle.manifest.whole[part]  # type: ignore[index]
    session = onnxruntime.InferenceSession(str(bundle.folder / record.file))
    found = dict(zip(record.outputs, session.run(None, bundle.whole_inputs(rows, part)), strict=True))
    if (live := found.pop("live", None)) is not None:
        found["vectors"] = found["vectors"][live]
    return {name: array if part == "score" else array.reshape(-1) for name, array in found.items()}


@pytest.mark.parametrize("model", each_model(fast=("DSSM",)))
def test_every_form_answers_alike(pool: RankPool, data: Path, tmp_path: Path, model: str) -> None:
    pool.run(1, train, run_file(tmp_path, data, model))
    made = export_bundle(str(tmp_path / "out"), tmp_path / "bundle", formats=EVERY)
    onnx, torch = (Bundle(tmp_path / "bundle", engine=engine) for engine in ("onnx", "torch"))  # type: ignore[arg-type]
    rows = pq.read_table(data / "test")
    for part in made.graphs:
        wanted, got, whole = outputs(onnx, part, rows), outputs(torch, part, rows), of_whole(onnx, part, rows)
        alone = outputs(torch, part, rows.slice(3, 1))  # another shape
        assert not any(len(found) for found in outputs(torch, part, rows.slice(0, 0)).values())
        assert not any(len(found) for found in outputs(onnx, part, rows.slice(0, 0)).values())
        for name, values in wanted.items():
            most = 1e-6 * max(1.0, float(np.abs(values).max()))
            np.testing.assert_allclose(got[name], values, rtol=0, atol=most)
            np.testing.assert_allclose(whole[name], values, rtol=0, atol=10 * most)
            np.testing.assert_allclose(outputs(onnx, part, rows.slice(3, 1))[name], alone[name], rtol=0, atol=most)
    for folder in (tmp_path / "bundle" / "model_repository").iterdir():
        check_repository(folder)


def check_repository(folder: Path) -> dict[str, Any]:
    """Hold what Triton is told against the graph that it is told of; returns the inputs by name."""
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema().ModelConfig())
    session = onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"))
    assert config.name == folder.name
    assert config.platform == "onnxruntime_onnx"
    assert max(config.dynamic_batching.preferred_batch_size) <= config.max_batch_size
    assert config.dynamic_batching.max_queue_delay_microseconds > 0
    kinds = schema().DataType
    for told, real in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [one.name for one in told] == [one.name for one in real]
        for one, other in zip(told, real, strict=True):
            assert kinds.Name(one.data_type) == TYPES[other.type]
            assert isinstance(other.shape[0], str)  # rows, any number of them
            rest = [dim if isinstance(dim, int) else -1 for dim in other.shape[1:]]
            if rest:
                assert list(one.dims) == rest
                assert not one.HasField("reshape")
            else:
                assert list(one.dims) == [1]
                assert one.HasField("reshape")
                assert list(one.reshape.shape) == []
    return {one.name: one for one in config.input}


def schema() -> ModuleType:
    """Triton's own description of a configuration, without the rest of its client."""
    found = importlib.util.find_spec("tritonclient")
    assert found is not None
    assert found.submodule_search_locations
    path = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.get("model_config_pb2")
    if module is None:
        module = sys.modules["model_config_pb2"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_repository_of_a_graph_without_tables(din: Path, tmp_path: Path) -> None:
    export_bundle(str(din / "out"), tmp_path / "bundle", formats=("onnx", "triton"))
    inputs = check_repository(tmp_path / "bundle" / "model_repository" / "DIN")
    assert list(inputs["in/history"].dims) == [-1, 16]  # vectors, which a client looks up
    whole = check_repository(din / "bundle" / "model_repository" / "DIN")
    assert list(whole["history"].dims) == [-1]  # ids


SCORED = """
import json, sys
{before}
import pyarrow.parquet as pq
from rechub_dist.inference.bundle.bundle import Bundle
b = Bundle({bundle!r}{engine}); s = b.score(pq.read_table({rows!r}))
names = ("onnxruntime", "onnx", "torch", "torchrec", "fbgemm_gpu", "ray")
print(json.dumps([b.engine, s["predicted_click"].to_pylist(), [n for n in names if sys.modules.get(n)]]))
"""


def scored(bundle: Path, data: Path, engine: str = "", before: str = "") -> tuple[str, list[float], list[str]]:
    code = SCORED.format(bundle=str(bundle), rows=str(data / "test"), engine=engine, before=before)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return found[0], found[1], found[2]


@pytest.mark.slow
def test_torch_alone_scores(din: Path, data: Path) -> None:
    asked = scored(din / "bundle", data, ", engine='torch'")
    without = scored(din / "bundle", data, before="sys.modules['onnxruntime'] = None  # as where it is not installed")
    with_both = scored(din / "bundle", data)
    assert (asked[0], asked[2]) == (without[0], without[2]) == ("torch", ["torch"])
    assert (with_both[0], with_both[2]) == ("onnx", ["onnxruntime"])
    np.testing.assert_allclose(asked[1], with_both[1], rtol=0, atol=1e-6)


def test_what_is_missing_is_told(din: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = export_bundle(str(din / "out"), tmp_path / "torch", formats=("torch",))
    assert not [name for name in made.files if name.endswith(".onnx")]
    assert Bundle(tmp_path / "torch").engine == "torch"
    with pytest.raises(UserError, match="has no graphs for onnxruntime; export it with --format onnx"):
        Bundle(tmp_path / "torch", engine="onnx")
    with pytest.raises(UserError, match="engine is 'onx', must be one of onnx, torch"):
        Bundle(tmp_path / "torch", engine="onx")  # type: ignore[arg-type]
    export_bundle(str(din / "out"), tmp_path / "onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert Bundle(din / "bundle").engine == "torch"
    with pytest.raises(UserError, match=r"onnx needs onnxruntime: pip install onnxruntime \(or export it with --form"):
        Bundle(tmp_path / "onnx")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="bundle needs onnxruntime or torch: pip install onnxruntime"):
        Bundle(din / "bundle")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("onxn", "'onxn' is unknown: did you mean 'onnx'?"),
        ("whole,triton", "a bundle needs onnx or torch to score rows itself: add one of them"),
        ("torch,triton", "triton serves an ONNX graph: add whole, or onnx for the graph without tables"),
    ],
)
def test_formats_that_make_no_bundle(text: str, error: str) -> None:
    with pytest.raises(UserError, match=re.escape(error)):
        parse_formats(text)


def test_a_large_model_is_not_made_whole(din: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"whole\.onnx would have 0 MB, and 0 MB are allowed: --whole-mb allows more"):
        export_bundle(str(din / "out"), tmp_path / "bundle", formats=("onnx", "whole"), whole=Whole(limit=1000))
    assert not list(tmp_path.iterdir())


def test_what_is_beyond_a_list_is_of_no_matter(din: Path, data: Path) -> None:
    bundle = Bundle(din / "bundle")
    record, inputs = bundle.manifest.whole["score"], bundle.whole_inputs(pq.read_table(data / "test"))
    session = onnxruntime.InferenceSession(str(bundle.folder / record.file))
    (wanted,) = session.run(None, inputs)
    for name in record.lists:
        beyond = np.arange(inputs[name].shape[1]) >= inputs[f"{name}.lengths"][:, None]
        assert beyond.any()
        inputs[name][beyond] = -(10**9)
        if name in record.weighted:
            inputs[f"{name}.weights"][beyond] = np.nan
    (got,) = session.run(None, inputs)
    np.testing.assert_array_equal(got, wanted)


def test_whole_graphs_have_the_numbers_of_the_tables(din: Path, data: Path, tmp_path: Path) -> None:
    export_bundle(str(din / "out"), tmp_path / "bundle", formats=("torch", "whole"), tables="int8")
    bundle, rows = Bundle(tmp_path / "bundle"), pq.read_table(data / "test")
    wanted = outputs(bundle, "score", rows)["predicted_click"]
    np.testing.assert_allclose(of_whole(bundle, "score", rows)["predicted_click"], wanted, rtol=0, atol=1e-5)
    exact = outputs(Bundle(din / "bundle"), "score", rows)["predicted_click"]
    assert np.abs(wanted - exact).max() > 1e-5


class _Opens:
    """What a pickle can do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def evil_pickle(files: dict[str, bytes], mark: Path) -> None:
    folder = next(iter(files)).split("/")[0]
    files[f"{folder}/data/constants/opaque_obj_0"] = pickle.dumps(_Opens(mark))
    meta = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    files[f"{folder}/data/constants/model_constants_config.json"] = json.dumps({"config": {"a": meta}}).encode()


def evil_inputs(files: dict[str, bytes], mark: Path) -> None:
    folder = next(iter(files)).split("/")[0]
    files[f"{folder}/data/sample_inputs/model.pt"] = pickle.dumps(_Opens(mark))


def evil_expression(files: dict[str, bytes], mark: Path) -> None:
    change(files, rb"Symbol\('s\d+', positive=True, integer=True\)", f"open('{mark}', 'w')")


def evil_operator(files: dict[str, bytes], _mark: Path) -> None:
    change(files, rb"torch\.ops\.aten\.sigmoid\.default", "torch.load")


def evil_guard(files: dict[str, bytes], mark: Path) -> None:
    change(files, rb'"guards_code": \[\]', json.dumps({"guards_code": [f"open('{mark}', 'w')"]})[1:-1])


def change(files: dict[str, bytes], pattern: bytes, new: str) -> None:
    (name,) = (name for name in files if name.endswith("models/model.json"))
    files[name], count = re.subn(pattern, lambda _: new.encode(), files[name])
    assert count


@pytest.mark.parametrize("evil", [evil_pickle, evil_inputs, evil_expression, evil_operator, evil_guard])
def test_a_program_with_more_than_ours_is_not_loaded(
    din: Path, tmp_path: Path, evil: Callable[[dict[str, bytes], Path], None]
) -> None:
    bundle, mark = tmp_path / "bundle", tmp_path / "mark"
    shutil.copytree(din / "bundle", bundle)
    file = bundle / "score.pt2"
    assert read_program(file) is not None
    with zipfile.ZipFile(file) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    evil(files, mark)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match=r"score\.pt2 is damaged"):  # the checksum comes first
        Bundle(bundle, engine="torch")
    manifest = BundleManifest.model_validate_json((bundle / "bundle.json").read_bytes())
    write_manifest(bundle, manifest.model_copy(update={"files": records_of(bundle)}))
    with pytest.raises(UserError, match=r"score\.pt2 holds .*, which no program of rechub_dist has; it is not loaded"):
        Bundle(bundle, engine="torch")
    assert not mark.exists()


@pytest.mark.slow
def test_the_command(din: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "rechub_dist", "export", str(din / "out"), "--out", str(tmp_path / "bundle")]
    done = subprocess.run([*line, "--format", "torch,whole,triton"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ", for torch, whole, triton\n" in done.stdout
    assert "largest differences from the run's own on 90 rows: predicted_click " in done.stdout
    assert {"score.pt2", "whole.onnx"} <= {path.name for path in (tmp_path / "bundle").iterdir()}
    refused = subprocess.run([*line, "--format", "whole"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
