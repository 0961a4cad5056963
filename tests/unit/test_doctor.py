"""`rechub-dist doctor`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.cli import doctor
from rechub_dist.launching.ports import RENDEZVOUS


def data(folder: Path) -> str:
    folder.mkdir()
    for name in ("a", "b"):
        pq.write_table(pa.table({"x": [1, 2, 3]}), folder / f"{name}.parquet")
    return str(folder)


def test_the_command(tmp_path: Path) -> None:
    """What this host has is in order; what is asked for and cannot be makes it fail."""
    source = data(tmp_path / "data")
    line = [sys.executable, "-m", "rechub_dist", "doctor", "--json", "--data", source, "--out", f"{source}/a.parquet"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    *found, output = [json.loads(one) for one in done.stdout.splitlines()]
    assert {one["state"] for one in found} <= {"ok", "note"}
    assert {"versions", "devices", "memory", "limits", "network", "features", "data"} == {one["area"] for one in found}
    assert found[-1]["text"] == f"{tmp_path / 'data'}: 6 rows in 2 files"
    assert (output["state"], output["area"], output["fix"]) == ("fault", "output", "choose another folder")
    assert done.returncode == 1


def test_a_run_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    schema = "{features: {x: {kind: sparse, rows: 9}}, labels: {y: {}}}"
    source = f"{{root: {tmp_path}, train: train, valid: gone, test: null, dataset: {schema}}}"
    model = "{name: WideDeep, wide_features: [x], deep_features: [x], hidden_units: [4]}"
    path.write_text(f"output_dir: {tmp_path}/out\ndata: {source}\nmodel: {model}\nembedding: {{dim: 4}}\n")
    data(tmp_path / "train")
    found = {(one.area, one.state): one for one in doctor.of_run(path)}
    assert list(found) == [("run file", "ok"), ("data", "ok"), ("data", "fault"), ("output", "ok")]
    assert "gone" in found["data", "fault"].text
    assert not (tmp_path / "out").exists()
    text = path.read_text()
    path.write_text(text.replace("train: train, valid: gone", "train: [train, {path: lost}], valid: {path: train}"))
    told = [(one.state, one.text) for one in doctor.of_run(path) if one.area == "data"]
    assert [state for state, _ in told] == ["ok", "fault", "ok"]
    assert "lost" in told[1][1]
    path.write_text(text.replace("train: train, valid: gone", "mix: [{path: train}, {path: lost}], valid: null"))
    assert [one.state for one in doctor.of_run(path) if one.area == "data"] == ["ok", "fault"]
    path.write_text("model: {name: WideDeeep}\n")
    (mistake,) = doctor.of_run(path)
    assert mistake.state == "fault"
    assert capsys.readouterr().out == ""


def test_features_that_lack_packages_say_what_to_install() -> None:
    found = list(doctor.of_features(lambda name: name not in ("faiss", "onnxscript")))
    assert [one.state for one in found] == ["ok", "note", "note", "ok"]
    assert [one.fix for one in found if one.fix] == [f"pip install 'rechub-dist[{x}]'" for x in ("export", "index")]
    assert "onnxscript not installed" in found[1].text
    pyproject = (Path(doctor.__file__).parents[2] / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in pyproject for extra in doctor.FEATURES)


def test_outputs(tmp_path: Path) -> None:
    assert doctor.at_output(tmp_path / "a" / "b").state == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "closed").mkdir(mode=0o500)
    found = doctor.at_output(Path("/proc/x") if os.getuid() == 0 else tmp_path / "closed" / "x")
    assert (found.state, "cannot write in" in found.text) == ("fault", True)


def test_what_keeps_hosts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setattr(doctor, "RENDEZVOUS", other.getsockname()[1])
        found = list(doctor.of_network())
        assert [one.state for one in found if "WORLD_SIZE" in one.text] == ["fault"]
        assert [one.state for one in found if one.text.startswith("port ")] == ["note"]
    assert doctor.at_rendezvous("no such host:1").state == "fault"
    assert doctor.at_rendezvous(f"localhost:{RENDEZVOUS}").state == "ok"
