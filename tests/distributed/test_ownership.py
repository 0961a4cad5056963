"""A run keeps its hands off what is not its own; its weights are used with the configuration they were trained by."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from rechub_dist.checkpoint import saved_steps
from rechub_dist.cli.main import app
from rechub_dist.errors import UserError
from rechub_tests.ranks import RankPool
from rechub_tests.runs import done_steps, output, records, run_file, start, train, wait_for, write_data


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All files and folders below a folder, files with their time of modification."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else (0, b"")
        for path in folder.rglob("*")
    }


def refused(*command: Any) -> str:
    """What a command that is refused says."""
    done = CliRunner().invoke(app, [str(part) for part in command])
    assert isinstance(done.exception, UserError), done.output
    assert "\n" not in str(done.exception)
    return str(done.exception)


def evaluated(*command: Any) -> dict[str, Any]:
    """What `evaluate --json` prints; strictly JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    done = CliRunner().invoke(app, ["evaluate", *(str(part) for part in command), "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout, parse_constant=refuse)
    return found


@pytest.mark.parametrize(
    "change", ["seed=8", "model.hidden_units=[8]", "data.features={age: {kind: dense, transform: log}}"]
)
def test_a_refused_run_leaves_every_byte_as_it_was(
    pool: RankPool, data_root: Path, tmp_path: Path, change: str
) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", train={"epochs": 1}, checkpoint={"folder": str(tmp_path / "saves")})
    pool.run(2, train, path)
    before = contents(tmp_path)
    options = ["train.trace_rows=true", "monitor.profile_every=2", change]
    with pytest.raises(UserError, match="holds another run"):
        pool.run(2, train, path, options)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_files_of_others_in_an_output_folder_are_not_overwritten(
    pool: RankPool, data_root: Path, tmp_path: Path, name: str
) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", train={"epochs": 1, "max_steps": 2})
    output(path).mkdir()
    (output(path) / name).write_text("mine: 1\n")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"output_dir: .*{name} is there already, and not from a run"):
        pool.run(2, train, path)
    assert contents(tmp_path) == before
    (output(path) / name).unlink()
    pool.run(2, train, path)
    pool.run(1, train, output(path) / "config.yaml", ["train.max_steps=3"])  # what a run has written launches it again
    assert records(path, "train")[-1]["step"] == 3


def test_weights_are_used_with_the_configuration_they_were_trained_by(
    pool: RankPool, data_root: Path, tmp_path: Path
) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", train={"epochs": 1})
    pool.run(1, train, path)
    out, test = output(path), data_root / "test"
    wanted = evaluated(out, "--data", test)
    assert wanted["rows"] == 70
    tree = yaml.safe_load((out / "config.yaml").read_text())
    tree["data"]["dataset"]["features"]["age"]["transform"] = "log"
    tree["data"]["labels"] = ["buy"]
    (out / "config.yaml").write_text(yaml.safe_dump(tree))
    assert evaluated(out, "--data", test) == wanted
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(out, moved)
    shutil.rmtree(out)
    assert evaluated(moved, "--data", test) == wanted
    (moved / "config.yaml").unlink()
    assert evaluated(moved, "--data", test) == wanted
    assert evaluated(moved / "checkpoints", "--data", test) == wanted
    assert not out.exists()
    [step] = (moved / "checkpoints").glob("step-*")
    assert "is a single checkpoint; name the run's output folder" in refused("evaluate", step, "--data", test)
    assert "no label 'bye': did you mean 'buy'?" in refused(
        "evaluate", moved, "--data", test, "--set", "data.labels=[bye]"
    )


def test_data_that_has_moved(pool: RankPool, tmp_path: Path) -> None:
    """The data's root holds a vocabulary, so that it is needed in an evaluation, too."""
    root = tmp_path / "root"
    write_data(root)
    pq.write_table(pa.table({"value": [str(i) for i in range(61)], "id": range(61)}), root / "words.parquet")
    for part in root.glob("*/*.parquet"):
        table = pq.read_table(part)
        named = pa.array([str(item) for item in table["item"].to_pylist()])
        pq.write_table(table.set_column(table.schema.get_field_index("item"), "item", named), part)
    features = {"item": {"kind": "sparse", "table": "item", "vocabulary": "words.parquet"}}
    path = run_file(tmp_path, root, "DeepFM", data={"features": features}, train={"epochs": 1})
    pool.run(1, train, path)
    out, moved = output(path), tmp_path / "moved"
    [wanted] = records(path, "test")
    root.rename(moved)
    assert "words.parquet" in refused("evaluate", out, "--data", moved / "test")
    found = evaluated(out, "--data", moved / "test", "--set", f"data.root={moved}")
    assert found["auc"] == pytest.approx(wanted["auc"])


def test_what_cannot_be_told_is_null(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", train={"epochs": 1})
    pool.run(1, train, path, ["data.valid=null", "data.test=null"])
    table = pq.read_table(data_root / "test")
    (tmp_path / "one").mkdir()
    pq.write_table(table.filter(pa.compute.equal(table["click"], 0)), tmp_path / "one" / "0.parquet")
    found = evaluated(output(path), "--data", tmp_path / "one")
    assert (found["auc"], found["normalized_entropy"]) == (None, None)
    assert found["log_loss"] > 0


def test_predictions_go_where_nothing_is_lost(pool: RankPool, tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_data(root)
    path = run_file(tmp_path, root, "DeepFM", train={"epochs": 1})
    pool.run(1, train, path)
    mine = tmp_path / "mine"
    shutil.copytree(root / "train", mine)
    (mine / "part-0.parquet").rename(mine / "part-00000.parquet")
    before = contents(tmp_path)
    command = ["predict", output(path), "--data", root / "test", "--out"]
    assert "is the input" in refused(*command, root / "test")
    assert "lies in the input" in refused(*command, root / "test" / "predicted")
    assert "holds the input" in refused(*command, root)
    assert "is not an output (predictions) that may be replaced" in refused(*command, mine)
    assert contents(tmp_path) == before
    assert CliRunner().invoke(app, [str(part) for part in [*command, tmp_path / "new"]]).exit_code == 0
    assert pq.read_table(tmp_path / "new").num_rows == 70


def test_a_column_to_keep_that_is_there_twice(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", train={"epochs": 1})
    pool.run(1, train, path)
    table = pq.read_table(data_root / "test")
    (tmp_path / "twice").mkdir()
    pq.write_table(table.append_column("importance", table["age"]), tmp_path / "twice" / "0.parquet")
    command = ["predict", output(path), "--data", tmp_path / "twice", "--out", tmp_path / "p"]
    assert "has 2 columns of this name" in refused(*command, "--keep", "importance")


def test_a_consolidated_checkpoint_replaces_nothing_else(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", train={"epochs": 1})
    pool.run(1, train, path)
    [step] = (output(path) / "checkpoints").glob("step-*")
    [file] = step.glob("*.safetensors")
    before = contents(tmp_path)
    command = ["checkpoint", "consolidate", output(path), "--out"]
    assert "is the input" not in refused(*command, path)
    assert "is not a consolidated checkpoint" in refused(*command, path)
    for inside in (file, step / "whole.safetensors"):
        assert "lies in the input" in refused(*command, inside)
    assert "is an address" in refused(*command, "s3://bucket/whole.safetensors")
    assert contents(tmp_path) == before
    for _ in range(2):  # its own file it replaces
        assert CliRunner().invoke(app, [str(part) for part in [*command, tmp_path / "x.safetensors"]]).exit_code == 0


def test_folders_of_others_beside_the_checkpoints_stay(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", train={"epochs": 2}, checkpoint={"every_steps": 2, "keep_last": 1})
    other = run_file(tmp_path / "other", data_root, "DeepFM", train={"max_steps": 3}, seed=11)
    pool.run(1, train, other)
    folder = output(path) / "checkpoints"
    theirs = {
        "step-0000000001/notes.txt": b"mine",
        "step-0000000002/notes.txt": b"in a folder that the run writes to, and removes its own files from",
        "step-by-step/guide.txt": b"mine",
        "step-0000000999/rank-00000.safetensors": b"no name that a save gives",
        ".writable": b"mine",
    }
    for name, content in theirs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    killed = folder / "step-0000000777" / "rank-00000-0123abcd.safetensors"  # of a save that was killed
    killed.parent.mkdir()
    killed.write_bytes(b"half")
    pool.run(1, train, path, ["train.max_steps=4"])
    shutil.copytree(output(other) / "checkpoints" / "step-0000000003", folder / "step-0000000003")
    before = contents(folder / "step-0000000003")
    pool.run(1, train, path)
    assert contents(folder / "step-0000000003") == before
    assert {name: (folder / name).read_bytes() for name in theirs} == theirs
    assert not killed.parent.exists()
    assert 18 in saved_steps(folder)
    assert [file.name for file in (folder / "step-0000000002").iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_an_output_folder_that_is_removed_in_mid_run_is_begun_anew(data_root: Path, tmp_path: Path) -> None:
    model = {"hidden_units": [1024, 1024]}
    path = run_file(tmp_path, data_root, "DeepFM", model=model, train={"epochs": 40, "log_every": 1})
    process = start(path, 2)
    wait_for(process, lambda: done_steps(path) >= 5)
    output(path).rename(tmp_path / "removed")
    told = process.communicate(timeout=300)[0]
    assert process.returncode == 0, told
    assert "was deleted: it is created again" in told
    assert records(path, "train")[-1]["step"] == 360
    assert saved_steps(output(path) / "checkpoints")[-1] == 360
    assert evaluated(output(path), "--data", data_root / "test")["rows"] == 70
    assert list((output(path) / "tensorboard").iterdir())
    assert (output(path) / "config.yaml").exists()


def test_an_output_folder_is_no_address(data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", output_dir="s3://bucket/run")
    told = refused("train", path)
    assert "output_dir: s3://bucket/run is an address, but logs and metrics need a local folder" in told
    assert not Path("s3:").exists()
