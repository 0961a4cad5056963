"""Bundles that are replaced while they are served, loads above what a server takes on, and how it ends."""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from rechub_dist.errors import UserError
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.server.versions import Served
from rechub_tests.serving import TOKEN, VARIANTS, Exports, load, rows_of, serving, wait_until

ADMIN = {"env": {"SERVING_TOKEN": TOKEN}}


@pytest.fixture(scope="module")
def exports(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(bundles["din"], rows_of(bundles["rows"], bundles["din"], 40), tmp_path_factory.mktemp("exports"))


@pytest.mark.slow
def test_reloads_under_load(exports: Exports, tmp_path: Path) -> None:
    """No request fails, none is answered by two versions, and after a reload only the new one answers."""
    target, reloads = tmp_path / "bundle", 100
    first = exports.put(0, target)
    with (
        serving(tmp_path / "log", str(target), "--token-env", "SERVING_TOKEN", **ADMIN) as server,
        server.client(TOKEN) as admin,
    ):
        with load(server, exports) as seen:
            wait_until(lambda: len(seen) > 4)
            for number in range(1, reloads + 1):
                wanted = exports.put(number % VARIANTS, target)
                answer = admin.post("/admin/reload")
                assert (answer.status_code, answer.json()) == (200, {"versions": {"bundle": wanted}, "failed": {}})
                assert exports.check(admin.post("/score", json={"rows": exports.rows})) == wanted
        assert first in seen
        assert set(seen) == set(exports.labels)
        assert len(seen) > 2 * reloads
        name = "rechub_serving_reloads_total"
        assert server.metric(name, bundle="bundle", result="loaded") == reloads
        assert server.metric("rechub_serving_requests_total", bundle="bundle", code="200") == len(seen) + reloads
        assert server.stop() == 0


def test_what_asks_after_a_reload_joins_no_batch_of_the_version_before(exports: Exports, tmp_path: Path) -> None:
    target, asked = tmp_path / "bundle", {"rows": exports.rows}
    before = exports.put(0, target)
    arguments = (str(target), "--batch-wait-ms", "1000", "--threads", "1", "--token-env", "SERVING_TOKEN")
    with (
        serving(tmp_path / "log", *arguments, **ADMIN) as server,
        server.client(TOKEN) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        for number in (1, 2):
            early = pool.submit(lambda: exports.check(client.post("/score", json=asked)))
            time.sleep(0.1)  # by then it waits for others to be scored with
            wanted = exports.put(number, target)
            assert client.post("/admin/reload").json()["versions"] == {"bundle": wanted}
            assert exports.check(client.post("/score", json=asked)) == wanted
            assert early.result() in (before, wanted)
            before = wanted


def test_rollback_to_a_bundle_whose_files_are_gone(exports: Exports, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    exports.put(0, target)
    with (
        serving(tmp_path / "log", str(target), "--token-env", "SERVING_TOKEN", **ADMIN) as server,
        server.client(TOKEN) as client,
    ):
        asked = {"rows": exports.rows}
        none = client.post("/admin/rollback")
        assert (none.status_code, "there is no version before" in none.text) == (409, True)
        second = exports.put(1, target)
        assert client.post("/admin/reload").json()["versions"] == {"bundle": second}
        maps = Path(f"/proc/{server.process.pid}/maps")
        assert "(deleted)" in "".join(line for line in maps.read_text().splitlines() if "tables" in line)
        assert exports.check(client.post("/score", json=asked)) == second
        back = client.post("/admin/rollback?bundle=bundle")
        assert back.json() == {"versions": {"bundle": exports.labels[0]}}
        # its folder was removed: what answers is what it has in memory, vocabulary included
        assert exports.check(client.post("/score", json=asked)) == exports.labels[0]
        assert client.get("/bundles").json()["bundle"]["former"] == second
        assert client.post("/admin/rollback").json() == {"versions": {"bundle": second}}
        assert client.post("/admin/rollback?bundle=x").status_code == 404


def test_a_bad_bundle_changes_nothing(exports: Exports, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    first = exports.put(0, target)
    arguments = (str(target), "--token-env", "SERVING_TOKEN")
    with serving(tmp_path / "log", *arguments, **ADMIN) as server, server.client(TOKEN) as client:
        exports.put(1, target)
        tables = target / "tables.safetensors"
        whole = tables.read_bytes()
        tables.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        answer = client.post("/admin/reload")
        assert (answer.status_code, answer.json()["versions"]) == (409, {"bundle": first})
        assert "does not match its checksum" in answer.json()["failed"]["bundle"]
        shutil.rmtree(target)
        assert "is no bundle" in client.post("/admin/reload").json()["failed"]["bundle"]
        assert exports.check(client.post("/score", json={"rows": exports.rows})) == first
        assert server.metric("rechub_serving_reloads_total", bundle="bundle", result="failed") == 2
        assert f"{first} is served as before" in server.log.read_text()
        exports.put(0, target)
        assert client.post("/admin/reload").json() == {"versions": {"bundle": first}, "failed": {}}
        assert server.metric("rechub_serving_reloads_total", bundle="bundle", result="unchanged") == 1


@pytest.mark.slow
def test_a_signal_and_a_watch_reload(exports: Exports, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    exports.put(0, target)
    with serving(tmp_path / "log", str(target)) as server, load(server, exports, 1) as seen:
        wanted = exports.put(1, target)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: seen[-1:] == [wanted])
        assert server.process.poll() is None
    with (
        serving(tmp_path / "log", str(target), "--watch", "0.1", "--token-env", "SERVING_TOKEN", **ADMIN) as server,
        load(server, exports, 1) as seen,
    ):
        wait_until(lambda: seen[-1:] == [wanted])
        other = exports.put(2, target)
        wait_until(lambda: seen[-1:] == [other])
        httpx.post(f"{server.url}/admin/rollback", headers={"Authorization": f"Bearer {TOKEN}"})
        time.sleep(0.5)  # the watch does not undo a rollback
        assert seen[-1] == wanted


def test_a_folder_that_is_replaced_while_it_is_opened(exports: Exports, tmp_path: Path) -> None:
    """What is opened is one export, or none."""
    target = tmp_path / "bundle"
    exports.put(0, target)
    calls = 0

    def opened(folder: Path) -> Bundle:
        nonlocal calls
        calls += 1
        found = Bundle(folder, threads=1)
        if calls in (2, 3):  # just as it has been opened
            exports.put(calls - 1, target)
        return found

    served = Served("x", target, opened, 100)
    assert served.reload() is True
    assert (served.current.label, calls) == (exports.labels[2], 4)
    shutil.rmtree(target)
    with pytest.raises(UserError, match="is no bundle"):
        served.reload()
    assert served.current.label == exports.labels[2]


def test_overload_sends_away_and_recovers(bundles: dict[str, Path], tmp_path: Path) -> None:
    rows = rows_of(bundles["rows"], bundles["din"], 70) * 20
    with serving(tmp_path / "log", f"din={bundles['din']}", "--queue", "4", "--threads", "1") as server:

        async def flood() -> list[httpx.Response]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
                return await asyncio.gather(*(client.post("/score", json={"rows": rows}) for _ in range(60)))

        answers = asyncio.run(flood())
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 503}
        assert codes.count(200) >= 4
        for answer in answers:
            if answer.status_code == 503:
                assert answer.headers["retry-after"] == "1"
                assert "requests wait already" in answer.json()["detail"]
        with server.client() as client:
            for _ in range(20):
                assert client.post("/score", json={"rows": rows}).status_code == 200
        assert server.metric("rechub_serving_requests_total", bundle="din", code="503") == codes.count(503)
        assert server.metric("rechub_serving_queue") == 0


def test_requests_that_wait_are_scored_together(exports: Exports, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    exports.put(0, target)
    arguments = (str(target), "--batch-wait-ms", "300", "--batch-rows", "400", "--threads", "1")
    with serving(tmp_path / "log", *arguments) as server, server.client() as client:
        body = {"rows": exports.rows}  # ten of them fill a batch
        bad = {"rows": [{**exports.rows[0], "shop": 99}]}
        client.post("/score", json=body)
        began = time.monotonic()
        with ThreadPoolExecutor(10) as pool:
            list(pool.map(lambda _: exports.check(client.post("/score", json=body)), range(10)))
        assert time.monotonic() - began < 0.28  # a full batch waits no longer
        assert server.metric("rechub_serving_batch_requests_sum", bundle="bundle") == 11
        assert server.metric("rechub_serving_batch_requests_count", bundle="bundle") <= 4
        # one that is at fault does the others no harm
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda one: client.post("/score", json=one), [body, bad, body]))
        assert answers[1].status_code == 422
        assert [exports.check(answers[i]) for i in (0, 2)] == [exports.labels[0]] * 2


def test_sigterm_finishes_what_is_in_flight(exports: Exports, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    exports.put(0, target)
    with (
        serving(tmp_path / "log", str(target), "--batch-wait-ms", "1000") as server,
        server.client() as client,
        ThreadPoolExecutor(3) as pool,
    ):
        asked = [pool.submit(client.post, "/score", json={"rows": exports.rows}) for _ in range(3)]
        wait_until(lambda: server.metric("rechub_serving_queue") == 3)
        server.process.send_signal(signal.SIGTERM)
        for one in asked:
            exports.check(one.result())
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.log.read_text()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


def test_a_shadow_gets_the_same_requests(exports: Exports, bundles: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    exports.put(0, target)
    arguments = (f"ctr={target}", "--shadow", f"ctr={exports.folders[1]}", f"sas={bundles['sas']}")
    arguments = (*arguments, "--shadow", f"sas={bundles['din']}")  # which cannot answer these
    with serving(tmp_path / "log", *arguments) as server, server.client() as client:
        for _ in range(10):
            answer = client.post("/bundles/ctr/score", json={"rows": exports.rows})
            assert exports.check(answer) == exports.labels[0]  # never the shadow's
            assert client.post("/bundles/sas/retrieve", json={"rows": [{"history": ["item 1"]}]}).status_code == 200
        name = "rechub_serving_shadow_requests_total"
        wait_until(lambda: server.metric(name, bundle="ctr.shadow", result="compared") == 10)
        wait_until(lambda: server.metric(name, bundle="sas.shadow", result="failed") == 10)
        wanted = np.abs(exports.scores[exports.labels[0]] - exports.scores[exports.labels[1]]).max()
        total = server.metric("rechub_serving_shadow_difference_sum", bundle="ctr.shadow")
        assert total == pytest.approx(10 * wanted, rel=1e-3)
        assert server.metric("rechub_serving_step", bundle="ctr.shadow") == 2
        assert client.post("/bundles/ctr.shadow/score", json={"rows": []}).status_code == 404
