"""Data sets on an object store, with a real S3 server and client, through faults of the network between them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from rechub_dist.config import StorageConfig
from rechub_dist.data.parquet.files import OpenFiles
from rechub_dist.data.parquet.footers import read_footer
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.storage import Store, exists, is_remote, join, local_path, read_text
from rechub_dist.errors import UserError
from rechub_dist.skips import BadFileError
from rechub_tests.damage import spoil_pages
from rechub_tests.object_store import BUCKET, KEYS, Fault, FaultyProxy, filesystem, s3_server, upload

ROWS, GROUP = 3000, 1000


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def data(server: int, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A folder of two files in the bucket."""
    for part in range(2):
        rows = range(part * ROWS, (part + 1) * ROWS)
        table = pa.table({"a": list(rows), "b": [[r, r + 1] for r in rows], "unread": [str(r) for r in rows]})
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / f"part-{part}.parquet", row_group_size=GROUP)
    (tmp_path / "data" / "dataset.yaml").write_text("name: ünlike\n")
    key = request.node.name.replace("[", "-").replace("]", "")
    upload(server, tmp_path / "data", key)
    return f"s3://{BUCKET}/{key}"


def settings(port: int, **changes: Any) -> StorageConfig:
    quick: dict[str, Any] = {"deadline_seconds": 30.0, "attempt_seconds": 3.0, "request_timeout_seconds": 1.0}
    quick |= {"client_attempts": 1, "region": "us-east-1", "endpoint": f"http://127.0.0.1:{port}", "options": KEYS}
    return StorageConfig(**(quick | changes))


def rows(manifest: Manifest, columns: tuple[str, ...] = ("a", "b")) -> list[dict[str, Any]]:
    files = OpenFiles()
    found = [files.read(file, group, list(columns)) for file, group in manifest.groups]
    files.close()
    return pa.concat_tables(found).to_pylist()


EXPECTED = [{"a": r, "b": [r, r + 1]} for r in range(2 * ROWS)]


def test_a_folder_a_pattern_and_an_object(server: int, data: str) -> None:
    manifest = Manifest.read(data, settings(server))
    assert [file.path for file in manifest.files] == [f"{data}/part-0.parquet", f"{data}/part-1.parquet"]
    assert manifest.counts == (GROUP,) * 6
    assert rows(manifest) == EXPECTED
    assert rows(Manifest.read(f"{data}/part-[1-9].parquet", settings(server))) == EXPECTED[ROWS:]
    assert rows(Manifest.read(f"{data}/part-0.parquet", settings(server))) == EXPECTED[:ROWS]


def test_options_in_the_address(server: int, data: str) -> None:
    plain = settings(server, endpoint=None)
    address = f"{data}?endpoint_override=127.0.0.1:{server}&scheme=http"
    assert Manifest.read(address, plain).rows == 2 * ROWS
    assert Manifest.read(join(address, "part-0.parquet"), plain).rows == ROWS


@pytest.mark.slow
def test_footers_from_the_cache_cost_no_request(proxy: FaultyProxy, data: str) -> None:
    time.sleep(3.5)  # a fresh object may still change within the second that its time of modification tells
    first = Manifest.read(data, settings(proxy.port))
    assert sum("part-" in request for request in proxy.requests) >= 4
    proxy.requests.clear()
    assert Manifest.read(data, settings(proxy.port)).files == first.files
    assert proxy.requests
    assert not any("part-" in request for request in proxy.requests)
    assert rows(first) == EXPECTED


def test_small_files(server: int, data: str) -> None:
    assert read_text(f"{data}/dataset.yaml", settings(server)) == "name: ünlike\n"
    assert read_text(f"{data}/other.yaml", settings(server)) is None
    assert exists(data, settings(server))
    assert not exists(f"{data}/nothing", settings(server))


def test_what_is_not_there(server: int, data: str) -> None:
    for path in (f"{data}/nothing", "s3://no-such-bucket/data"):
        with pytest.raises(UserError, match=f"{path}: there is no such file or folder"):
            Manifest.read(path, settings(server))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "reset", "cut", "hang", "slow"])
def test_a_fault_passes(proxy: FaultyProxy, data: str, fault: Fault) -> None:
    manifest = Manifest.read(data, settings(proxy.port, cache=False))
    proxy.plan = [fault] * 2
    assert rows(manifest) == EXPECTED
    assert proxy.met == [fault] * 2


@pytest.mark.slow
def test_faults_while_the_footers_are_read(proxy: FaultyProxy, data: str) -> None:
    proxy.plan = ["503", "cut", "reset", "hang"]
    assert Manifest.read(data, settings(proxy.port, cache=False)).rows == 2 * ROWS
    assert sorted(proxy.met) == ["503", "cut", "hang", "reset"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "reset", "cut", "hang", "slow"])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_store_that_stays_broken_is_named_and_never_skipped(
    proxy: FaultyProxy, data: str, fault: Fault, skip_bad: bool
) -> None:
    short = settings(proxy.port, cache=False, deadline_seconds=2.5, attempt_seconds=1.0)
    manifest = Manifest.read(data, short, skip_bad=skip_bad)
    proxy.always = fault
    with pytest.raises(UserError) as caught:
        rows(manifest)
    assert not isinstance(caught.value, BadFileError)
    message = str(caught.value)
    assert message.startswith(f"{data}/part-0.parquet: row group 0 cannot be read: ")
    assert "attempts within 2.5 s have failed" in message
    assert "data.storage.deadline_seconds" in message
    assert "\n" not in message
    assert len(proxy.met) >= 2


@pytest.mark.slow
def test_a_refusal_is_not_repeated(proxy: FaultyProxy, data: str) -> None:
    manifest = Manifest.read(data, settings(proxy.port, cache=False))
    proxy.plan = ["403"]
    with pytest.raises(UserError, match=r"part-0\.parquet: row group 0 .* the store refuses it .*ACCESS_DENIED.*cred"):
        rows(manifest)


def test_corruption_is_told_from_faults(proxy: FaultyProxy, server: int, data: str, tmp_path: Path) -> None:
    path = tmp_path / "data" / "part-1.parquet"
    spoil_pages(path, 1, column=0)
    upload(server, tmp_path / "data", data.removeprefix(f"s3://{BUCKET}/"))
    manifest = Manifest.read(data, settings(proxy.port, cache=False))
    files = OpenFiles()
    proxy.plan = ["503", "cut"]
    with pytest.raises(BadFileError, match=r"part-1\.parquet: row group 1 is truncated or corrupt") as caught:
        files.read(manifest.files[1], 1, ["a"])
    assert caught.value.reason == "corrupt"
    assert proxy.met == ["503", "cut"]
    assert files.read(manifest.files[1], 0, ["a"]).num_rows == GROUP


def test_an_object_that_is_replaced_is_noticed(server: int, data: str) -> None:
    manifest = Manifest.read(data, settings(server))
    key = manifest.files[0].path.removeprefix("s3://")
    client = filesystem(server)
    with client.open_input_file(key) as source:
        content = bytearray(source.read())
    content[5] ^= 1  # as long as before, and its footer the same
    with client.open_output_stream(key) as sink:
        sink.write(bytes(content))
    with pytest.raises(BadFileError, match=r"part-0\.parquet: it has changed since the run began") as caught:
        rows(manifest)
    assert caught.value.reason == "changed"
    client.delete_file(key)
    with pytest.raises(BadFileError, match=r"part-0\.parquet: row group 0 cannot .*check that it is there") as caught:
        rows(manifest)
    assert caught.value.reason == "missing"


def test_a_file_system_that_hangs_without_any_time_out(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    hung: list[str] = []
    forever = threading.Event()

    class Hanging(LocalFileSystem):  # type: ignore[misc]
        def open(self, path: str, *arguments: Any, **named: Any) -> Any:
            if len(hung) < 2:
                hung.append(path)
                forever.wait()
            return super().open(path, *arguments, **named)

    store = Store(pafs.PyFileSystem(pafs.FSSpecHandler(Hanging())), "", StorageConfig(attempt_seconds=0.3))
    assert read_footer(store, str(tmp_path / "x.parquet")).counts == (1,)
    assert len(hung) == 2
    hung.clear()
    impatient = Store(store.filesystem, "", StorageConfig(attempt_seconds=0.1, deadline_seconds=0.15))
    with pytest.raises(UserError, match=r"x\.parquet: it cannot be read: .*no answer within"):
        read_footer(impatient, str(tmp_path / "x.parquet"))
    forever.set()


def test_an_answer_that_comes_too_late_is_nobodys() -> None:
    store = Store(pafs.LocalFileSystem(), "", StorageConfig(attempt_seconds=0.2))
    release = threading.Event()
    found = store.with_retries(
        lambda attempt: release.wait() and "late" if attempt == 0 else f"attempt {attempt}", "it"
    )
    release.set()
    assert found == "attempt 1"
    assert [store.with_retries(lambda _, n=n: n, "it") for n in range(50)] == list(range(50))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("data/x", "data/x"),
        ("/data/x*", "/data/x*"),
        ("file:///data/a%20b", "/data/a b"),
        ("file:///data/[ab]*", "/data/[ab]*"),
        ("local:///data/x", "/data/x"),
        ("s3://bucket/data", None),
        ("https://host/data", None),
    ],
)
def test_paths_of_this_host(address: str, path: str | None) -> None:
    assert local_path(address) == path
    assert is_remote(address) is (path is None)
