"""Runs on an S3 server, through faults of the network."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from rechub_dist.assembly.parts import build
from rechub_dist.assembly.readers import read_manifest
from rechub_dist.config import Selection
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.distributed.runtime import runtime
from rechub_dist.errors import UserError
from rechub_tests.object_store import BUCKET, KEYS, Fault, FaultyProxy, filesystem, s3_server, upload
from rechub_tests.ranks import RankPool
from rechub_tests.runs import config_of, losses, output, records, run_file, train

WHERE = (("age", ">", 0.0), ("user", "<", 80))


@pytest.fixture(scope="module")
def server(data_root: Path) -> Iterator[int]:
    with s3_server() as port:
        upload(port, data_root, "shop")
        yield port


def remote_run(folder: Path, port: int, **storage: Any) -> Path:
    """A run file whose data, schema included, are on the server."""
    given: dict[str, Any] = {"endpoint": f"http://127.0.0.1:{port}", "region": "us-east-1", "options": KEYS}
    given |= {"client_attempts": 1, "request_timeout_seconds": 1, "attempt_seconds": 3, **storage}
    data = {"storage": given, "shuffle_rows": 200}
    return run_file(folder, Path("/"), "DeepFM", data={**data, "root": f"s3://{BUCKET}/shop"})


@pytest.mark.slow
def test_a_run_through_faults_is_the_run_on_local_files(
    pool: RankPool, proxy: FaultyProxy, data_root: Path, tmp_path: Path
) -> None:
    local = run_file(tmp_path / "local", data_root, "DeepFM", data={"shuffle_rows": 200})
    pool.run(2, train, local)
    remote = remote_run(tmp_path / "remote", proxy.port)
    dice = random.Random(1)
    faults: list[Fault] = ["503", "reset", "cut", "hang"]
    proxy.plan = [dice.choice(faults) if dice.random() < 0.2 else None for _ in range(1000)]
    pool.run(2, train, remote)
    assert set(proxy.met) == set(faults)
    assert losses(remote) == losses(local)
    for split in ("valid", "test"):
        assert [r["auc"] for r in records(remote, split)] == [r["auc"] for r in records(local, split)]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "hang"])
@pytest.mark.parametrize("on_bad_file", ["error", "skip"])
def test_an_object_that_cannot_be_had_stops_all_ranks(
    pool: RankPool, proxy: FaultyProxy, tmp_path: Path, fault: Fault, on_bad_file: str
) -> None:
    path = remote_run(tmp_path, proxy.port, deadline_seconds=3, cache=True)
    pool.run(2, train, path, ["train.max_steps=1", f"output_dir={tmp_path / 'first'}"])  # fills the cache of footers
    proxy.match, proxy.always = "train/part-2.parquet", fault
    words = r"s3://bucket/shop/train/part-2\.parquet: (it|row group \d) cannot be read: \d attempts within 3 s"
    with pytest.raises(UserError, match=words):
        pool.run(2, train, path, [f"data.on_bad_file={on_bad_file}"])
    assert fault in proxy.met


@pytest.mark.slow
def test_ranks_divide_the_footers(pool: RankPool, proxy: FaultyProxy, data_root: Path, tmp_path: Path) -> None:
    path = remote_run(tmp_path, proxy.port, deadline_seconds=2, cache=False)
    local = Manifest.read(str(data_root / "train"))
    requests = []
    for ranks in (1, 3):
        proxy.requests.clear()
        assert pool.run(ranks, seen_manifest, path, False) == [(local.fingerprint(), local.rows)] * ranks
        requests.append(sorted(request for request in proxy.requests if "train" in request))
    assert requests[0] == requests[1]
    assert sum("part-" in request for request in requests[0]) >= len(local.files)

    wanted = Manifest.read(Selection(path=str(data_root / "train"), where=WHERE))
    assert 0 < wanted.rows < local.rows
    assert pool.run(2, seen_manifest, path, True) == [(wanted.fingerprint(), wanted.rows)] * 2
    proxy.match, proxy.always = "train/part-1.parquet", "503"  # of one rank's share
    with pytest.raises(UserError, match=r"part-1\.parquet: it cannot be read: \d attempts within 2 s"):
        pool.run(2, seen_manifest, path, False)


def seen_manifest(path: Path, chosen: bool) -> tuple[str, int]:
    """What a rank knows of the train split, or of the rows of it that meet conditions."""
    config = config_of(path)
    with runtime("cpu", 60) as rt:
        spec = build(config, device="cpu", world_size=1).spec
        manifest = read_manifest(config, rt, Selection(path="train", where=WHERE) if chosen else "train", spec)
    return manifest.fingerprint(), manifest.rows


@pytest.mark.slow
def test_secrets_are_nowhere_in_what_a_run_leaves(server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in its files, on the store too, nor in what it prints, nor in a manifest; also where it fails."""
    monkeypatch.setenv("RECHUB_SECRET_ID", "planted-key-5Xw")
    monkeypatch.setenv("RECHUB_SECRET_KEY", "planted-secret-5Xw")
    monkeypatch.setenv("RECHUB_DEBUG", "1")
    options = {"access_key": {"env": "RECHUB_SECRET_ID"}, "secret_key": {"env": "RECHUB_SECRET_KEY"}}
    path = remote_run(tmp_path, server, options=options)
    more = ["--set", "train.max_steps=3", "--set", f"checkpoint.folder=s3://{BUCKET}/secrets"]

    def command(*arguments: str) -> str:
        line = [sys.executable, "-m", "rechub_dist", *arguments]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        return f"{done.returncode}\n{done.stdout}{done.stderr}"

    trained = command("train", str(path), "--nproc", "1", *more)
    assert trained.startswith("0\n"), trained
    failed = command("train", str(path), *more, "--set", f"data.root=s3://{BUCKET}/nothing")
    assert failed.startswith("2\n"), failed
    refused = command("train", str(path), "--set", "data.storage.options.secret_key=planted-secret-5Xw")
    assert refused.startswith("2\n"), refused
    evaluated = command("evaluate", str(output(path)), "--data", f"s3://{BUCKET}/shop/test")
    assert evaluated.startswith("0\n"), evaluated
    pods = ["--kind", "job", "--image", "x", "--set", "output_dir=/runs/x"]
    rendered = command("k8s", "render", str(path), *pods, *more)
    assert rendered.startswith("0\n"), rendered
    left = [trained, failed, refused, evaluated, rendered]
    files = [file for file in output(path).rglob("*") if file.is_file()]
    assert {file.name for file in files} >= {"config.yaml", "metrics.jsonl", "rank-0.jsonl"}
    store = filesystem(server)
    objects = store.get_file_info(pafs.FileSelector(f"{BUCKET}/secrets", recursive=True))
    assert any("step-" in found.path for found in objects)
    for found in objects:
        if found.is_file:
            with store.open_input_file(found.path) as source:
                left.append(source.read().decode("latin-1"))
    left += [file.read_bytes().decode("latin-1") for file in files]
    assert not [text for text in left if "planted" in text]
    assert "RECHUB_SECRET_KEY" in (output(path) / "config.yaml").read_text()
