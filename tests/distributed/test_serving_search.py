"""What a server searches: indexes and filters of the version that answers; and requests that nobody waits for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.data.parquet.outputs import whole_folder
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.bundle.manifest import ITEMS, read_manifest, record, write_manifest
from rechub_dist.inference.export import export_bundle
from rechub_dist.inference.index import Wanted, make_index
from rechub_tests.serving import TOKEN, Server, label, rows_of, serving, variant, wait_until
from rechub_tests.shop import DSSM, import_shop, trained

ADMIN = {"env": {"SERVING_TOKEN": TOKEN}}
USERS = {"user": ["u1", "u2", "u3"], "seen": [["thing 3"], [], ["thing 8", "thing 9"]]}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shop")
    export_bundle(str(trained(root / "run", import_shop(root / "data"), DSSM)), root / "bundle")
    return root / "bundle"


class Told(NamedTuple):
    """An answer of `retrieve`."""

    version: str
    items: list[list[str]]


def retrieved(client: httpx.Client, where: str | None = None) -> Told:
    answer = client.post(
        "/retrieve", params={"k": 5, **({} if where is None else {"where": where})}, json={"columns": USERS}
    )
    assert answer.status_code == 200, answer.text
    return Told(answer.json()["version"], answer.json()["columns"]["predicted_items"])


def wanted(bundle: Path, where: str | None = None, index: Path | None = None) -> Told:
    found = Bundle(bundle, index=index).retrieve(pa.table(USERS), 5, where=where)
    return Told(label(bundle), found["predicted_items"].to_pylist())


def copied(bundle: Path, folder: Path, category: str) -> Path:
    """The same bundle, whose items are all of one category."""
    with whole_folder(folder, "bundle", replace=True) as work:
        manifest = read_manifest(bundle)
        for name in manifest.files:
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_bytes((bundle / name).read_bytes())
        items = pq.read_table(bundle / ITEMS)
        place = items.column_names.index("category")
        pq.write_table(items.set_column(place, "category", pa.array([category] * len(items))), work / ITEMS)
        files = {**manifest.files, ITEMS: record(work / ITEMS)}
        write_manifest(work, manifest.model_copy(update={"step": manifest.step + 1, "files": files}))
    return folder


def test_an_index_is_searched_while_it_is_of_what_answers(shop: Path, tmp_path: Path) -> None:
    target, index = tmp_path / "bundle", tmp_path / "index"
    variant(shop, target, 1)
    first = label(target)
    make_index(str(target), index, Wanted("hnsw", k=5))
    by_first = wanted(target, index=index)
    arguments = (f"recall={target}", "--index", f"recall={index}", "--token-env", "SERVING_TOKEN")
    with serving(tmp_path / "log", *arguments, **ADMIN) as server, server.client(TOKEN) as client:

        def facts() -> Any:
            return client.get("/bundles").json()["recall"]["index"]

        assert facts()["kind"] == "hnsw"
        assert retrieved(client) == by_first
        variant(shop, target, 2)  # the index is that of another model now
        assert client.post("/admin/reload").json()["versions"] == {"recall": label(target)}
        assert "refused" in facts()
        assert "is an index of other items, or of another model" in server.log.read_text()
        assert "search is exact" in server.log.read_text()
        assert retrieved(client) == wanted(target)
        assert client.post("/admin/reload").json()["versions"] == {"recall": label(target)}
        assert server.metric("rechub_serving_reloads_total", bundle="recall", result="unchanged") == 1
        make_index(str(target), index, Wanted("flat", k=5))
        client.post("/admin/reload")
        assert (facts()["kind"], facts()["recall"]) == ("flat", 1.0)
        assert retrieved(client) == wanted(target, index=index)
        client.post("/admin/rollback")
        assert "refused" in facts()
        assert retrieved(client) == wanted(target)
        assert first != label(target)


@pytest.mark.slow
def test_a_watch_sees_a_new_index(shop: Path, tmp_path: Path) -> None:
    make_index(str(shop), tmp_path / "index", Wanted("flat", k=5))
    arguments = (f"recall={shop}", "--index", f"recall={tmp_path / 'index'}", "--watch", "0.1")
    with serving(tmp_path / "log", *arguments) as server, server.client() as client:
        assert client.get("/bundles").json()["recall"]["index"]["kind"] == "flat"
        make_index(str(shop), tmp_path / "index", Wanted("hnsw", k=5))
        server.wait_for("before:")
        assert client.get("/bundles").json()["recall"]["index"]["kind"] == "hnsw"


@pytest.mark.slow
def test_filters_are_those_of_the_version_that_answers(shop: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    variant(shop, target, 1)
    words = ["category = 'book'", "category = 'lamp' and price < 0.7", "category = 'book' or false", "price > 0.5"]
    before = {where: wanted(target, where) for where in words}
    assert before[words[0]].items != wanted(target).items
    with (
        serving(tmp_path / "log", str(target), "--token-env", "SERVING_TOKEN", **ADMIN) as server,
        server.client(TOKEN) as client,
    ):
        assert retrieved(client, words[0]) == before[words[0]]
        copied(shop, target, "lamp")
        after = {where: wanted(target, where) for where in words}
        assert after[words[1]] != before[words[1]]
        assert retrieved(client, words[1]) == before[words[1]]  # asked for the first time
        client.post("/admin/reload")
        assert [retrieved(client, where) for where in words] == [after[where] for where in words]
        assert after[words[0]].items == [[], [], []]
        client.post("/admin/rollback")
        assert [retrieved(client, where) for where in words] == [before[where] for where in words]
        for where, told in (
            ("color = 'red'", "where: \"color = 'red'\": there is no column 'color'"),
            ("price", "is FLOAT, not true or false"),
            ("(select count(*) from items) > 0", "where: "),
            ("price > 0; drop table items", "where: "),
        ):
            answer = client.post("/retrieve", params={"where": where}, json={"columns": USERS})
            assert answer.status_code == 422, answer.text
            assert told in answer.json()["detail"]
            assert str(tmp_path) not in answer.text
        assert client.post("/retrieve", params={"where": "x" * 5000}, json={"columns": USERS}).status_code == 422


@pytest.mark.slow
def test_indexes_that_cannot_be_served_are_one_line(shop: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    make_index(str(shop), tmp_path / "index", Wanted("flat", k=5))
    for arguments, told in (
        ([f"a={shop}", "--index", f"b={tmp_path / 'index'}"], "--index: b is no bundle that is served; they are a"),
        ([f"a={shop}", "--index", f"a={tmp_path}"], "is no index: it has no index.json"),
        (
            [f"a={bundles['din']}", "--index", f"a={tmp_path / 'index'}"],
            "--index: a is of DIN, which is no recall model",
        ),
    ):
        line = [sys.executable, "-m", "rechub_dist", "serve", *arguments]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("error: ")) == (2, 1), done.stderr
        assert told in done.stderr


SLOW = """
import sys, time
from pathlib import Path
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.server.run import serve
from rechub_dist.inference.server.serving import Serving
from rechub_dist.inference.server.settings import Settings
from rechub_dist.inference.server.versions import Served

class Slow(Bundle):
    def score(self, rows):
        while rows.num_rows == 7 and not Path(sys.argv[2]).exists():
            time.sleep(0.01)
        return super().score(rows)

served = Served("din", Path(sys.argv[1]), Slow, 100)
serve(Serving([served], {}, Settings(port=0, threads=1)), lambda where: print(f"serving at {where}", file=sys.stderr))
"""


class Slow(NamedTuple):
    """A server whose only thread is busy with a request until a file is there."""

    server: Server
    rows: list[dict[str, Any]]
    go: Path
    busy: Future[httpx.Response]


@pytest.fixture
def slow(bundles: dict[str, Path], tmp_path: Path) -> Iterator[Slow]:
    log, go, rows = tmp_path / "log", tmp_path / "go", rows_of(bundles["rows"], bundles["din"], 7)
    with (
        log.open("wb") as file,
        subprocess.Popen([sys.executable, "-c", SLOW, bundles["din"], go], stderr=file) as process,
    ):
        try:
            server = Server(process, "", log)
            server.wait_for("serving at ")
            server.url = log.read_text().rpartition("serving at ")[2].strip()
            with ThreadPoolExecutor(1) as pool:
                busy = pool.submit(httpx.post, f"{server.url}/score", json={"rows": rows}, timeout=60)
                wait_until(lambda: server.metric("rechub_serving_queue") == 1)
                yield Slow(server, rows[:3], go, busy)
                go.touch()
        finally:
            process.kill()
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_a_request_whose_client_has_gone_is_not_scored(slow: Slow) -> None:
    with slow.server.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/score", json={"rows": slow.rows}, timeout=0.5)
    wait_until(lambda: slow.server.metric("rechub_serving_requests_total", bundle="din", code="499") == 1)
    assert slow.server.metric("rechub_serving_queue") == 1
    slow.go.touch()
    assert slow.busy.result().status_code == 200
    with slow.server.client() as client:
        assert client.post("/score", json={"rows": slow.rows}).status_code == 200
    assert slow.server.metric("rechub_serving_batch_requests_sum", bundle="din") == 2
    assert slow.server.metric("rechub_serving_queue") == 0


def test_a_request_has_a_deadline(slow: Slow) -> None:
    with slow.server.client() as client:

        def asked(milliseconds: str) -> httpx.Response:
            return client.post("/score", json={"rows": slow.rows}, headers={"X-Rechub-Deadline-Ms": milliseconds})

        late = asked("50")
        assert (late.status_code, late.json()) == (504, {"detail": "there was no answer within 50 ms"})
        assert slow.server.metric("rechub_serving_requests_total", bundle="din", code="504") == 1
        slow.go.touch()
        assert slow.busy.result().status_code == 200
        assert asked("60000").status_code == 200
        assert asked("1e9").status_code == 200
        for text in ("0", "-5", "soon", "nan", "inf"):
            answer = asked(text)
            assert answer.status_code == 400
            assert (
                answer.json()["detail"] == f"X-Rechub-Deadline-Ms is '{text}'; give milliseconds, as a number above 0"
            )
    assert slow.server.metric("rechub_serving_batch_requests_sum", bundle="din") == 3


def test_the_server_has_a_deadline(bundles: dict[str, Path], tmp_path: Path) -> None:
    arguments = (f"din={bundles['din']}", "--batch-wait-ms", "500", "--deadline-ms", "100")
    with serving(tmp_path / "log", *arguments) as server, server.client() as client:
        body = {"rows": rows_of(bundles["rows"], bundles["din"], 3)}
        for header in ({}, {"X-Rechub-Deadline-Ms": "60000"}):
            answer = client.post("/score", json=body, headers=header)
            assert (answer.status_code, answer.json()["detail"]) == (504, "there was no answer within 100 ms")
        assert "Traceback" not in server.log.read_text()
