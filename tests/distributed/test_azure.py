"""Runs on Azure's storage emulator, where it is installed: `npm install --global azurite`."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from rechub_dist.checkpoint.folder import Folder, steps_in
from rechub_dist.config import StorageConfig
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.storage import exists, locate
from rechub_dist.errors import UserError
from rechub_tests.ranks import RankPool
from rechub_tests.runs import losses, run_file, train

AZURITE = shutil.which("azurite-blob")
ACCOUNT = "devstoreaccount1"  # the emulator's, with a key that is published
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
os.environ["RECHUB_SECRET_TESTS_AZURE"] = KEY
ROOT = f"abfs://shop@{ACCOUNT}.dfs.core.windows.net/small"


def test_an_address_without_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
    with pytest.raises(UserError, match=r"abfs://shop/small: no storage account is given; .*AZURE_STORAGE_ACCOUNT"):
        locate("abfs://shop/small", StorageConfig())


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Iterator[dict[str, Any]]:
    """The settings of an emulator that holds the data."""
    if AZURITE is None:
        pytest.skip("azurite is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [AZURITE, "--silent", "--skipApiVersionCheck", "--disableTelemetry", "--blobPort", str(port)]
    with subprocess.Popen([*command, "--location", str(tmp_path_factory.mktemp("azure"))]) as process:
        try:
            for _ in range(300):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            settings = {
                "endpoint": f"http://127.0.0.1:{port}",
                "options": {"account_key": {"env": "RECHUB_SECRET_TESTS_AZURE"}},
            }
            given = StorageConfig(endpoint=settings["endpoint"], options={"account_key": KEY, "account_name": ACCOUNT})
            account, _ = locate("abfs://shop", given)
            account.filesystem.create_dir("shop")
            pafs.copy_files(str(data_root), "shop/small", destination_filesystem=account.filesystem)
            yield settings
        finally:
            process.kill()


def test_files(storage: dict[str, Any], data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = StorageConfig(**storage)
    local = Manifest.read(str(data_root / "train"))
    found = Manifest.read(f"{ROOT}/train", settings)
    assert [file.path for file in found.files] == [f"{ROOT}/train/{file.name}" for file in local.files]
    assert found.fingerprint() == local.fingerprint()
    assert Manifest.read(f"{ROOT}/train/part-[01].parquet", settings).files == found.files[:2]
    assert not exists(f"{ROOT}/nothing", settings)
    refused = settings.model_copy(update={"options": {"account_key": "AAAA"}})
    with pytest.raises(UserError, match=r"small/train: it cannot be read, the store refuses it .*403"):
        Manifest.read(f"{ROOT}/train", refused)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", ACCOUNT)
    other = Manifest.read("abfs://shop/small/train", settings)
    assert other.files[0].path == "abfs://shop/small/train/part-0.parquet"
    assert other.counts == found.counts


@pytest.mark.slow
def test_a_run_is_the_run_on_local_files(
    pool: RankPool, storage: dict[str, Any], data_root: Path, tmp_path: Path
) -> None:
    """Its checkpoints lie there, too, and it is taken up from them."""
    local = run_file(tmp_path / "local", data_root, "DeepFM")
    pool.run(2, train, local)
    folder = f"{ROOT.removesuffix('small')}run"
    remote = run_file(
        tmp_path / "remote",
        Path("/"),
        "DeepFM",
        data={"root": ROOT, "batch_size": 64, "storage": storage},
        checkpoint={"folder": folder, "every_steps": 4},
    )
    pool.run(2, train, remote, ["train.max_steps=6"])
    assert pool.run(2, train, remote)[0].step == 18
    assert losses(remote) == losses(local)
    assert 18 in steps_in(Folder(folder, StorageConfig(**storage)).files())
