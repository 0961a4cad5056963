"""A folder of publications that is served: deltas come in while it answers, in order, whole or not at all."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest

from rechub_dist.data.parquet.outputs import whole_folder
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.bundle.deltas import ROWS, read_state
from rechub_dist.inference.deltas import compare, write_delta
from rechub_tests.serving import (
    TOKEN,
    VARIANTS,
    Exports,
    label,
    load,
    rows_of,
    serving,
    variant,
    wait_until,
)

ADMIN = {"env": {"SERVING_TOKEN": TOKEN}}


@pytest.fixture(scope="module")
def exports(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(bundles["din"], rows_of(bundles["rows"], bundles["din"], 40), tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="module")
def deltas(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What leads from each export to the next, and from the last to the first."""
    folder = tmp_path_factory.mktemp("deltas")
    pairs = zip(exports.folders, [*exports.folders[1:], exports.folders[0]], strict=True)
    return [delta(folder / str(number), *pair) for number, pair in enumerate(pairs)]


def delta(out: Path, before: Path, after: Path) -> Path:
    with whole_folder(out, "delta") as work:
        write_delta(compare(read_state(before), after), work)
    return out


def put(made: Path, folder: Path, name: str) -> None:
    """Publish what was made."""
    shutil.copytree(made, folder / ".copied")
    (folder / ".copied").rename(folder / name)


@pytest.mark.slow
def test_deltas_under_load(exports: Exports, deltas: list[Path], tmp_path: Path) -> None:
    """No request fails, none is answered by two versions, and what is published comes to answer."""
    target, count = tmp_path / "published", 100
    target.mkdir()
    put(exports.folders[0], target, "000001-bundle")
    arguments = (f"ctr={target}", "--watch", "0.1", "--token-env", "SERVING_TOKEN")
    with serving(tmp_path / "log", *arguments, **ADMIN) as server, server.client(TOKEN) as client:
        with load(server, exports, 2) as seen:
            wait_until(lambda: len(seen) > 2)
            for number in range(1, count + 1):
                wanted = exports.labels[number % VARIANTS]
                put(deltas[(number - 1) % VARIANTS], target, f"{number + 1:06d}-delta")
                wait_until(lambda wanted=wanted: client.get("/ready").json() == {"versions": {"ctr": wanted}})  # type: ignore[misc]
                assert exports.check(client.post("/score", json={"rows": exports.rows})) == wanted
        assert set(seen) <= set(exports.labels)
        assert server.metric("rechub_serving_reloads_total", bundle="ctr", result="loaded") == count
        assert server.metric("rechub_serving_reloads_total", bundle="ctr", result="failed") == 0
        assert server.stop() == 0


@pytest.mark.slow
def test_rollback_and_a_broken_delta(exports: Exports, deltas: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "published"
    target.mkdir()
    put(exports.folders[0], target, "000001-bundle")
    put(deltas[0], target, "000002-delta")
    arguments = (f"ctr={target}", "--token-env", "SERVING_TOKEN")
    with serving(tmp_path / "log", *arguments, **ADMIN) as server, server.client(TOKEN) as client:

        def check(number: int) -> None:
            assert exports.check(client.post("/score", json={"rows": exports.rows})) == exports.labels[number]
            assert client.get("/bundles").json()["ctr"]["version"] == exports.labels[number]

        def reload() -> Any:
            answer = client.post("/admin/reload")
            return answer.status_code, answer.json()["failed"].get("ctr", "")

        check(1)
        put(deltas[1], target, "000003-delta")
        assert reload() == (200, "")
        check(2)
        client.post("/admin/rollback")
        check(1)  # the state before, which was one of a bundle and a delta
        assert reload() == (200, "")
        check(2)
        put(deltas[3], target, "000005-delta")
        status, reason = reload()
        assert status == 409
        assert "000005-delta follows version " in reason
        assert "is missing" in reason
        check(2)
        put(deltas[2], target, "000004-delta")
        rows = target / "000004-delta" / ROWS
        whole = rows.read_bytes()
        rows.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        status, reason = reload()
        assert (status, f"{rows} is damaged: it does not match its checksum" in reason) == (409, True)
        check(2)
        rows.write_bytes(whole)
        assert reload() == (200, "")  # both at once, in order
        check(4)
        put(exports.folders[1], target, "000006-bundle")
        shutil.rmtree(target / "000001-bundle")  # as a publisher removes what is old
        assert reload() == (200, "")
        check(1)
        client.post("/admin/rollback")
        check(4)


def test_items_follow(bundles: dict[str, Path], tmp_path: Path) -> None:
    target, users = tmp_path / "published", {"rows": [{"history": ["item 3", "item 5"]}, {"history": []}]}
    target.mkdir()
    first, second = (variant(bundles["sas"], tmp_path / str(step), step) for step in (1, 2))
    put(first, target, "000001-bundle")
    with serving(tmp_path / "log", f"sas={target}", "--watch", "0.1") as server, server.client() as client:

        def check(full: Path) -> None:
            wait_until(lambda: client.get("/ready").json() == {"versions": {"sas": label(full)}})
            found = client.post("/retrieve?k=7", json=users).json()
            wanted = Bundle(full, threads=1).retrieve({"history": [row["history"] for row in users["rows"]]}, 7)
            assert found["version"] == label(full)
            assert found["columns"]["predicted_items"] == [list(items) for items in wanted["predicted_items"]]
            items = client.post("/vectors?side=item", json={"columns": {"item": ["item 3"]}}).json()
            [vector] = Bundle(full, threads=1).vectors("item", {"item": ["item 3"]})["vector"]
            assert items["columns"]["vector"] == [pytest.approx(list(vector), rel=1e-6)]

        check(first)
        put(delta(tmp_path / "delta", first, second), target, "000002-delta")
        check(second)


def test_a_bundle_ends_with_its_last_use(bundles: dict[str, Path]) -> None:
    """A server that takes in a delta a minute must not wait for the garbage collector to let go of tables and items."""
    gc.disable()
    try:
        found = Bundle(bundles["sas"], threads=1)
        found.retrieve({"history": [["item 3"]]})
        end = weakref.ref(found)
        del found
        assert end() is None
    finally:
        gc.enable()
