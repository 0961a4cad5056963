"""`rechub-dist checkpoint ...` on a real run's checkpoints."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from rechub_dist.checkpoint.manifest import MANIFEST, parse, render
from rechub_dist.cli.main import app
from rechub_dist.errors import UserError
from rechub_tests.ranks import RankPool
from rechub_tests.runs import last_checkpoint, output, parameters, run_file, train


@pytest.fixture(scope="module")
def finished(pool: RankPool, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    embedding = {"rules": [{"tables": "user", "sharding": "row_wise"}]}
    model = {"features": ["user", "tags", "age"]}
    path = run_file(tmp_path_factory.mktemp("finished"), data_root, "DCN", model=model, embedding=embedding)
    pool.run(2, train, path)
    return path


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)], catch_exceptions=True)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_list(finished: Path) -> None:
    found = json.loads(command("list", output(finished), "--json"))
    assert [line["step"] for line in found["checkpoints"]] == [9, 18]
    assert [line["step"] for line in found["checkpoints"] if line["best"]] == [
        max(found["checkpoints"], key=lambda line: line["metrics"].get("auc", 0))["step"]
    ]
    told = command("list", output(finished))
    assert str(output(finished) / "checkpoints")[:20] in told
    assert "best" in told
    assert command("list", output(finished) / "checkpoints", "--json") == command("list", output(finished), "--json")


def test_inspect(finished: Path) -> None:
    found = json.loads(command("inspect", output(finished), "--step", "newest", "--json"))
    state = last_checkpoint(finished)
    assert found["step"] == found["position"]["step"] == 18
    assert (found["model"], found["world_size"], found["data"]["batch_size"]) == ("DCN", 2, 64)
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert tensors.keys() == state.keys()
    for name, tensor in tensors.items():
        assert tensor["shape"] == list(state[name].shape)
        assert tensor["norm"] == pytest.approx(float(state[name].double().norm()))
    user, tags = tensors["tables/user/weight"], tensors["tables/tags/rowwise_sum"]
    assert (user["sharding"], user["pieces"], user["shape"]) == ("row_wise", 2, [101, 16])
    assert (tags["sharding"], tags["pieces"], tags["shape"]) == ("table_wise", 1, [23])
    told = command("inspect", output(finished) / "checkpoints" / "step-0000000009")
    assert "row_wise" in told
    assert "dense_optim/" in told
    plan = found["plan"]
    assert (plan["world_size"], plan["device"], plan["tables"]["user"]["kernel"]) == (2, "cpu", "fused")
    assert [shard[:3] for shard in plan["tables"]["user"]["shards"]] == [[0, 51, 16], [1, 50, 16]]
    assert "plan of 2 rank(s), cpu" in told


def test_verify(finished: Path, tmp_path: Path) -> None:
    assert "step-0000000018 is intact: 2 file(s)" in command("verify", output(finished), "--step", 18).replace("\n", "")
    shutil.copytree(output(finished) / "checkpoints", tmp_path / "checkpoints")
    [victim] = (tmp_path / "checkpoints" / "step-0000000018").glob("rank-00001-*")
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(UserError, match=r"rank-00001-.*safetensors is damaged: bytes 0 to \d+ do not match"):
        command("verify", tmp_path / "checkpoints", "--step", "newest")
    victim.unlink()
    lines = json.loads(command("list", tmp_path / "checkpoints", "--json"))["checkpoints"]
    [line] = [line for line in lines if "damage" in line]
    assert line["step"] == 18
    assert "is missing" in line["damage"]


def test_verify_misses_a_piece(finished: Path, tmp_path: Path) -> None:
    """A checkpoint that was sealed without the second rank's part of a table."""
    shutil.copytree(output(finished) / "checkpoints", tmp_path / "checkpoints")
    sealed = tmp_path / "checkpoints" / "step-0000000018" / MANIFEST
    manifest = parse(sealed.read_bytes(), str(sealed))
    del manifest.tensors["tables/user/weight"].pieces[1]
    sealed.write_bytes(render(manifest))
    with pytest.raises(UserError, match=r"step-0000000018: the checkpoint lacks \d+ elements of tables/user/weight"):
        command("verify", tmp_path / "checkpoints", "--step", "newest")


def test_diff(finished: Path, pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    assert json.loads(command("diff", output(finished), output(finished), "--json"))["tensors"] == []
    assert "all tensors are bitwise equal" in command("diff", output(finished), output(finished))
    embedding = {"optimizer": {"name": "rowwise_adagrad", "lr": 0.1}}
    other = run_file(tmp_path, data_root, "DCN", model={"features": ["user", "age"]}, embedding=embedding)
    pool.run(1, train, other)
    found = json.loads(
        command("diff", output(finished), output(other), "--step", "newest", "--second-step", "newest", "--json")
    )
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert by_name["tables/tags/weight"]["difference"] == "only in the first"
    assert by_name["tables/user/weight"]["difference"] == "values"
    one, two = last_checkpoint(finished)["tables/user/weight"], last_checkpoint(other)["tables/user/weight"]
    assert by_name["tables/user/weight"]["elements"] == int((one != two).sum())
    assert by_name["tables/user/weight"]["largest"] == pytest.approx(float((one.double() - two.double()).abs().max()))
    assert any("embedding.optimizers.user.lr 0.05 -> 0.1" in line for line in found["identity"])


# What a process without torchrec does with a consolidated checkpoint; `sys.modules[...] = None` makes an import fail.
ALONE = """
    import json, sys
    for name in ("torchrec", "fbgemm_gpu"):
        sys.modules[name] = None
    import torch
    from rechub_dist.checkpoint.consolidate import load_consolidated
    from rechub_dist.embedded import Jagged
    from rechub_dist.embedding.local import LocalTables
    from rechub_dist.features import DenseFeature, SparseFeature, Table
    from rechub_dist.models import DCN

    arguments = json.loads(sys.argv[2])
    tags = SparseFeature("tags", Table("tags", 23, 16), pooling="mean")
    features = [SparseFeature("user", Table("user", 101, 16)), tags, DenseFeature("age")]
    model = DCN(features, **arguments)
    tables = LocalTables(model.lookups())
    load_consolidated(sys.argv[1], model, tables)
    model.eval()
    tags = Jagged(torch.tensor([1, 22, 7]), torch.tensor([2, 1]))
    ids = {"user": Jagged.single(torch.tensor([3, 100])), "tags": tags}
    print(json.dumps(model(tables(ids, dense={"age": torch.tensor([[0.5], [-1.0]])})).logits.tolist()))
"""


def test_a_consolidated_checkpoint_needs_no_torchrec(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    command("consolidate", output(finished), "--step", "newest", "--out", out)
    whole = last_checkpoint(finished)
    state = {name: whole[name] for name in whole if name.startswith("dense/")}
    state |= {name: whole[name] for name in whole if name.startswith("tables/") and name.endswith("/weight")}
    found = load_file(out)
    assert found.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.items())
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]

    arguments: dict[str, Any] = {k: v for k, v in parameters("DCN").items() if k != "features"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ALONE), str(out), json.dumps(arguments)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), reference(state, arguments), rtol=1e-6)
    command("consolidate", output(finished), "--step", "newest", "--out", out, "--optimizer")
    assert load_file(out).keys() == whole.keys()


def reference(state: dict[str, torch.Tensor], arguments: dict[str, Any]) -> list[list[float]]:
    """The logits of the same two rows, with the tables looked up by hand."""
    from rechub_dist.embedded import Embedded  # noqa: PLC0415
    from rechub_dist.features import DenseFeature, SparseFeature, Table  # noqa: PLC0415
    from rechub_dist.models import DCN  # noqa: PLC0415

    features = [
        SparseFeature("user", Table("user", 101, 16)),
        SparseFeature("tags", Table("tags", 23, 16), pooling="mean"),
        DenseFeature("age"),
    ]
    model = DCN(features, **arguments)
    model.load_state_dict({n.removeprefix("dense/"): v for n, v in state.items() if n.startswith("dense/")})
    model.eval()
    user, tags = state["tables/user/weight"], state["tables/tags/weight"]
    vectors = {
        "user": user[[3, 100]],
        "tags": torch.stack([(tags[1] + tags[22]) / 2, tags[7]]),
    }
    named = {lookup.name: vectors[lookup.feature.name] for lookup in model.lookups()}
    embedded = Embedded(vectors=named, dense={"age": torch.tensor([[0.5], [-1.0]])})
    logits = model(embedded).logits
    assert logits is not None
    return logits.tolist()


def test_what_is_not_there_is_said(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no checkpoint; name a run's output folder"):
        command("inspect", tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint of step 5; available steps: \[9, 18\]"):
        command("inspect", output(finished), "--step", 5)
    with pytest.raises(UserError, match=r"--step last: write best, newest or a step number"):
        command("inspect", output(finished), "--step", "last")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: .*file.*: (File exists|Not a directory); fix that"):
        command("consolidate", output(finished), "--out", tmp_path / "file" / "x.safetensors")
