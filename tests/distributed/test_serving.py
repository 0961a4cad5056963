"""`rechub-dist serve`: real servers on loopback answer what the bundle answers, and refuse what does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.inference.bundle.bundle import Bundle
from rechub_tests.derived import write_derived
from rechub_tests.listening import listening, others_reach
from rechub_tests.serving import ARROW, TOKEN, Server, label, make_bundle, serving

DERIVED = {
    "features": ["user", "genres", "taste", "hour", "age_bucket", "age", "relative", "liked"],
    "embedding_dim": 4,
}


@pytest.fixture(scope="module")
def bundles(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("derived")
    data = write_derived(root / "data", held=False)
    made = make_bundle(root, data, "DeepFM", model=DERIVED)
    return {**bundles, "derived": made, "derived rows": next((data / "test").glob("*.parquet"))}


@pytest.fixture(scope="module")
def server(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    names = ("din", "wide", "sas", "derived")
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(log, *(f"{name}={bundles[name]}" for name in names), "--max-rows", "500", "--max-mb", "1") as found:
        yield found


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


def stream(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def columns(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return answer.json()["columns"]


@pytest.mark.parametrize("name", ["din", "wide", "derived"])
def test_scores_are_those_of_the_bundle(client: httpx.Client, bundles: dict[str, Path], name: str) -> None:
    table = pq.read_table(bundles["derived rows" if name == "derived" else "rows"])
    wanted = Bundle(bundles[name]).score(table)["predicted_click"].to_numpy()
    assert np.ptp(wanted) > 1e-3
    names = [column["name"] for column in client.get("/bundles").json()[name]["columns"]["score"]]
    table = table.select([column for column in names if column in table.column_names])
    rows = table.to_pylist()
    path = f"/bundles/{name}/score"
    by_rows = client.post(path, json={"rows": rows})
    by_columns = client.post(path, json={"columns": table.to_pydict()})
    by_arrow = client.post(path, content=stream(table), headers={"Content-Type": ARROW})
    for answer in (by_rows, by_columns):
        np.testing.assert_allclose(columns(answer)["predicted_click"], wanted, rtol=1e-5, atol=1e-6)
    assert by_rows.json().items() >= {"bundle": name, "version": label(bundles[name])}.items()
    assert by_arrow.headers["content-type"] == ARROW
    assert {answer.headers["x-rechub-version"] for answer in (by_rows, by_arrow)} == {label(bundles[name])}
    found = pa.ipc.open_stream(by_arrow.content).read_all()
    np.testing.assert_allclose(found["predicted_click"].to_numpy(), wanted, rtol=1e-5, atol=1e-6)
    mixed = client.post(path, json={"rows": rows[:3]}, headers={"Accept": ARROW})
    assert pa.ipc.open_stream(mixed.content).read_all().num_rows == 3
    assert columns(client.post(path, json={"rows": []})) == {"predicted_click": []}


@pytest.mark.parametrize(
    ("name", "of_candidate"),
    [
        ("din", ("item", "shop")),
        ("din", ("item", "shop", "tags", "age")),
        ("wide", ("tags",)),  # crossed with the user
        ("wide", ("user", "age")),
        ("derived", ("genre_text", "released", "price")),  # what is derived needs columns of both
    ],
)
def test_candidates_of_one_user(
    client: httpx.Client, bundles: dict[str, Path], name: str, of_candidate: tuple[str, ...]
) -> None:
    path = bundles["derived rows" if name == "derived" else "rows"]
    bundle, table = Bundle(bundles[name]), pq.read_table(path)
    kept = [column for column in table.column_names if column not in of_candidate]
    candidates = pa.concat_tables([table.select(of_candidate)] * 3).slice(0, 200)
    for row in range(4):
        user = table.select(kept).slice(row, 1)
        whole = candidates
        for column in kept:
            whole = whole.append_column(column, user[column].take(pa.array([0] * 200)))
        wanted = bundle.score(whole)["predicted_click"].to_numpy()
        asked = {"user": user.to_pylist()[0], "candidates": candidates.to_pylist()}
        answer = client.post(f"/bundles/{name}/score", json=asked)
        np.testing.assert_allclose(columns(answer)["predicted_click"], wanted, rtol=1e-5, atol=1e-6)


def test_items_and_vectors_are_those_of_the_bundle(client: httpx.Client, bundles: dict[str, Path]) -> None:
    bundle, table = Bundle(bundles["sas"]), pq.read_table(bundles["rows"]).slice(0, 20)
    asked = {"columns": table.select(["history"]).to_pydict()}
    wanted = bundle.retrieve(table, k=7)
    found = columns(client.post("/bundles/sas/retrieve?k=7", json=asked))
    assert found["predicted_items"] == wanted["predicted_items"].to_pylist()
    assert found["predicted_items"][0][0].startswith("item ")
    for one, other in zip(found["predicted_scores"], wanted["predicted_scores"].to_pylist(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    users = columns(client.post("/bundles/sas/vectors", json=asked))["vectors"]
    for one, other in zip(users, bundle.vectors("user", table)["vectors"].to_pylist(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    items = {"columns": {"item": ["item 3", "item 5"]}}
    vectors = columns(client.post("/bundles/sas/vectors?side=item", json=items))["vector"]
    np.testing.assert_allclose(vectors, bundle.vectors("item", items["columns"])["vector"].tolist(), rtol=1e-5)


GOOD = {
    "user": 1, "item": "item 3", "shop": 3, "tags": [1, 2], "history": ["item 1"], "history_shop": [1], "brands": [1],
    "brand_weights": [0.5], "age": 0.25, "profile": [1, 2, 3],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ({"user": None, "age": None, "history": None, "history_shop": None}, 200, ""),
        ({"age": 1, "history": ["nothing", None], "history_shop": [1, 2], "more": {"x": 1}}, 200, ""),
        ({"history": ["item 1", "item 2"]}, 422, "columns 'history' and 'history_shop' have 2 and 1 ids in one row"),
        ({"age": float("nan")}, 422, "rows.0.age: should be a number, or null, got nan"),
        ({"item": "nothing"}, 422, "column 'item': 'nothing' is not in vocabulary"),
        ({"item": 3}, 422, "rows.0.item: should be a string, or a list of strings, got 3"),
        ({"item": None}, 422, "rows.0.item: should be a string, or a list of strings, got null"),
        ({"shop": 17}, 422, "column 'shop': id 17 is outside table 'shop' of 17 rows"),
        ({"shop": 1.5}, 422, "rows.0.shop: should be an integer, or a list of integers, got 1.5"),
        ({"shop": True}, 422, "rows.0.shop: should be an integer"),
        ({"shop": 2**64}, 422, "rows.0.shop: should be an integer"),
        ({"shop": 2**63}, 422, f"column 'shop': id {2**63} is outside"),
        ({"tags": [1, "x"]}, 422, "rows.0.tags"),
        ({"tags": [[1]]}, 422, "rows.0.tags"),
        ({"age": "old"}, 422, "rows.0.age: should be a number, or null, got 'old'"),
        ({"age": 1e300}, 200, ""),  # beyond float32 counts as missing
        ({"profile": [1, 2]}, 422, "rows.0.profile: should be a list of 3 numbers, got [1, 2]"),
        ({"profile": [1, 2, None]}, 422, "column 'profile': 1 value(s) are missing"),
        ({"brand_weights": [0.5, 0.5]}, 422, "column 'brand_weights': a row has 2 weights for 1 ids"),
        ({"brand_weights": [-1]}, 422, "column 'brand_weights': weight -1.0"),
        ({"user": ...}, 422, "missing key 'rows.0.user'"),
    ],
)
def test_a_row_that_does_not_fit_names_the_column(
    client: httpx.Client, change: dict[str, Any], status: int, told: str
) -> None:
    row = {name: value for name, value in {**GOOD, **change}.items() if value is not ...}
    for rows in ([row], [row, GOOD]):
        body = json.dumps({"rows": rows})
        answer = client.post("/bundles/din/score", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status, answer.text
        if status != 200:
            detail = answer.json()["detail"]
            assert told in detail
            assert "\n" not in detail
            assert "/" not in detail.replace("_vocabularies/item.parquet", "")  # no folder of the server's


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"", 400, "the body is no JSON"),
        (b"{", 400, "the body is no JSON"),
        (b'{"rows": [NaN]}', 422, "rows.0: should be an object of columns, got nan"),
        (b"\xff\xfe", 400, "the body is no JSON"),
        (b"[" * 100_000, 400, "the body is no JSON"),
        (b"[]", 422, 'the body: should be {"rows": [...]} or {"columns": {...}}, got []'),
        (b"{}", 422, "the body has nothing"),
        (b'{"row": []}', 422, "unknown key 'row'"),
        (b'{"rows": 3}', 422, "rows: should be a list of objects, one for each row, got 3"),
        (b'{"rows": [3]}', 422, "rows.0: should be an object of columns, got 3"),
        (b'{"rows": [], "columns": {}}', 422, ""),
        (b'{"user": {}, "candidates": [{"item": "item 1"}]}', 422, "there is no column"),
        (b'{"user": {"item": "item 1"}, "candidates": [{"item": "item 1"}]}', 422, "column 'item' is in the user and"),
    ],
)
def test_a_body_that_does_not_fit(client: httpx.Client, body: bytes, status: int, told: str) -> None:
    answer = client.post("/bundles/din/score", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert told in answer.json()["detail"]


def test_columns_must_be_of_one_length_and_kind(client: httpx.Client) -> None:
    unequal = {"columns": {**{name: [value] for name, value in GOOD.items()}, "age": [1, 2]}}
    told = client.post("/bundles/din/score", json=unequal)
    assert (told.status_code, told.json()["detail"]) == (422, "columns 'user' and 'age' have 1 and 2 rows")
    unlike = client.post("/bundles/din/score", json={"rows": [GOOD, {**GOOD, "tags": 3}]})
    assert unlike.status_code == 422
    assert "the rows of a column must be alike" in unlike.json()["detail"]


@pytest.mark.slow
def test_arrow_that_does_not_fit(client: httpx.Client, bundles: dict[str, Path]) -> None:
    table = pq.read_table(bundles["rows"]).slice(0, 5)
    whole = stream(table)

    def asked(body: bytes) -> httpx.Response:
        return client.post("/bundles/din/score", content=body, headers={"Content-Type": ARROW})

    assert asked(whole).status_code == 200
    for body in (b"", whole[:-40], whole[:100], b"x" * 1000):
        answer = asked(body)
        assert answer.status_code in (400, 200 if body == whole[:-40] else 400), answer.text
    bomb = stream(pa.table({"item": pa.array([0] * 200_000_000, pa.int8())}), compression="zstd")
    assert len(bomb) < 100_000
    answer = asked(bomb)
    assert (answer.status_code, answer.json()["detail"]) == (
        400, "the body is a compressed Arrow stream; send it without compression",
    )  # fmt: skip
    offsets = pa.array([0, 2**31 - 2], pa.int32())
    endless = pa.table({"tags": pa.ListArray.from_arrays(offsets, pa.nulls(2**31 - 2))})
    assert "more elements than the body has bytes" in asked(stream(endless)).json()["detail"]
    missing = asked(stream(table.drop_columns(["age"])))
    assert (missing.status_code, "there is no column 'age'" in missing.text) == (422, True)


def test_requests_have_bounds(client: httpx.Client) -> None:
    rows = client.post("/bundles/din/score", json={"rows": [GOOD] * 501})
    assert (rows.status_code, "501 rows, at most 500" in rows.text) == (413, True)
    body = json.dumps({"rows": [{**GOOD, "more": "x" * 2_000_000}]}).encode()
    for content in (body, iter([body[:1_500_000], body[1_500_000:]])):  # of a known length, and not
        answer = client.post("/bundles/din/score", content=content, headers={"Content-Type": "application/json"})
        assert (answer.status_code, "larger than 1048576 bytes" in answer.text) == (413, True)
    many = {**{k: v for k, v in GOOD.items() if k != "item"}, "user": [1] * 30_000, "tags": [1] * 30_000}
    crossed = client.post("/bundles/wide/score", json={"rows": [many]})
    assert (crossed.status_code, "feature 'user_x_tags' would have 900,000,000 combinations" in crossed.text) == (
        413,
        True,
    )
    assert client.post("/bundles/din/score", json={"rows": [GOOD]}).status_code == 200


def test_several_bundles(client: httpx.Client, bundles: dict[str, Path]) -> None:
    found = client.get("/bundles").json()
    assert {name: (one["model"], one["operations"]) for name, one in found.items()} == {
        "din": ("DIN", ["score"]),
        "wide": ("WideDeep", ["score"]),
        "sas": ("SASRec", ["retrieve", "vectors"]),
        "derived": ("DeepFM", ["score"]),
    }
    assert client.get("/ready").json() == {"versions": {name: label(bundles[name]) for name in found}}
    for path, told in (
        ("/bundles/none/score", "there is no bundle 'none'"),
        ("/bundles/sas/score", "SASRec is a recall model"),
        ("/bundles/din/retrieve", "DIN is no recall model"),
        ("/score", "there are several bundles: use /bundles/NAME/score with din, wide, sas, derived"),
    ):
        answer = client.post(path, json={"rows": []})
        assert (answer.status_code, told in answer.json()["detail"]) == (404, True)
    for query in ("k=0", "k=x", "k=100000"):
        assert client.post(f"/bundles/sas/retrieve?{query}", json={"rows": []}).status_code == 422
    assert client.post("/bundles/sas/vectors?side=shop", json={"rows": []}).status_code == 422
    assert client.post("/bundles/din/score", content=b"{}").status_code == 415


def test_the_description_has_types_and_examples_that_score(client: httpx.Client) -> None:
    tree = client.get("/openapi.json").json()
    paths = {path: routes["post"] for path, routes in tree["paths"].items() if path.startswith("/bundles/")}
    assert set(paths) == {
        "/bundles/din/score", "/bundles/wide/score", "/bundles/derived/score", "/bundles/sas/retrieve",
        "/bundles/sas/vectors",
    }  # fmt: skip
    for path, route in paths.items():
        example = route["requestBody"]["content"]["application/json"]["example"]
        assert columns(client.post(path, json=example))
    row = tree["components"]["schemas"]["din-score-Row"]
    assert set(row["required"]) == set(GOOD)
    assert {"type": "number"} in row["properties"]["age"]["anyOf"]
    assert {"type": "null"} in row["properties"]["age"]["anyOf"]
    derived = tree["components"]["schemas"]["derived-score-Row"]
    assert set(derived["required"]) == {"user"}
    assert {"genre_text", "genres", "time", "age"} <= set(derived["properties"])


def test_metrics(server: Server, client: httpx.Client) -> None:
    before = server.metric("rechub_serving_requests_total", bundle="wide", code="200", operation="score")
    failed = server.metric("rechub_serving_requests_total", bundle="wide", code="422", operation="score")
    example = client.get("/bundles").json()["wide"]["examples"]["score"]
    client.post("/bundles/wide/score", json={"rows": [example] * 3})
    client.post("/bundles/wide/score", json={"rows": [{}]})
    assert server.metric("rechub_serving_requests_total", bundle="wide", code="200", operation="score") == before + 1
    assert server.metric("rechub_serving_requests_total", bundle="wide", code="422", operation="score") == failed + 1
    assert server.metric("rechub_serving_seconds_count", bundle="wide", operation="score") > 1
    assert server.metric("rechub_serving_batch_rows_sum", bundle="wide") >= 3
    assert server.metric("rechub_serving_step", bundle="wide") > 0
    assert server.metric("rechub_serving_queue") == 0


def test_nothing_that_trains_is_in_the_process(server: Server, client: httpx.Client) -> None:
    assert client.post("/bundles/din/score", json={"rows": [GOOD]}).status_code == 200
    mapped = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "onnxruntime" in mapped
    assert [name for name in ("/torch/", "fbgemm", "/ray/") if name in mapped] == []
    code = (
        "import sys, rechub_dist.inference.server.run, rechub_dist.inference.bundle.bundle; "
        "print([n for n in ('torch', 'torchrec', 'fbgemm_gpu', 'ray') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_loopback_alone_is_open_to_anybody_here(server: Server, client: httpx.Client) -> None:
    assert others_reach(listening(server.process.pid)) == set()
    assert len(listening(server.process.pid)) == 1
    # a page of somebody else's that the browser was led to by a name that now means this host
    led = client.post("/bundles/din/score", json={"rows": [GOOD]}, headers={"Host": "evil.example:8000"})
    assert (led.status_code, "evil.example" in led.text) == (403, True)
    assert client.post("/admin/reload").status_code == 403
    assert client.post("/admin/rollback").status_code == 403


def test_the_page_needs_nothing_from_elsewhere(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http" not in answer.text.replace("http-equiv", "")


def test_other_addresses_need_a_token(bundles: dict[str, Path], tmp_path: Path) -> None:
    line = [sys.executable, "-m", "rechub_dist", "serve", f"din={bundles['din']}", "--address", "0.0.0.0"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, "name a variable with a token, --token-env NAME" in done.stderr) == (2, True)
    done = subprocess.run([*line, "--token-env", "NOT_SET"], capture_output=True, text=True, check=False)
    assert (done.returncode, "NOT_SET is not set" in done.stderr) == (2, True)
    arguments = (f"din={bundles['din']}", "--address", "0.0.0.0", "--token-env", "SERVING_TOKEN")
    with serving(tmp_path / "log", *arguments, env={"SERVING_TOKEN": TOKEN}) as server:
        assert TOKEN not in Path(f"/proc/{server.process.pid}/cmdline").read_text()
        wrong = (None, "x", TOKEN[:-1], TOKEN + "x", "ü")
        for token in wrong:
            headers = {} if token is None else {b"Authorization": f"Bearer {token}".encode()}
            for method, path in (("POST", "/score"), ("GET", "/bundles"), ("GET", "/metrics"), ("GET", "/openapi.json"),
                                 ("POST", "/admin/reload"), ("POST", "/admin/rollback")):  # fmt: skip
                answer = httpx.request(method, server.url + path, headers=headers)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        for path in ("/health", "/ready", "/"):
            assert httpx.get(server.url + path).status_code == 200
        with server.client(TOKEN) as client:
            assert client.post("/score", json={"rows": [GOOD]}).status_code == 200
            assert client.get("/bundles").status_code == 200


@pytest.mark.slow
def test_what_cannot_be_served_is_one_line(bundles: dict[str, Path], tmp_path: Path) -> None:
    for arguments, told in (
        ([str(tmp_path)], "is no bundle: it has no bundle.json"),
        ([f"a b={bundles['din']}"], "'a b' is no name for a bundle"),
        ([f"a={bundles['din']}", f"a={bundles['sas']}"], "two are named a"),
        ([f"a={bundles['din']}", "--shadow", f"b={bundles['din']}"], "b is no bundle that is served"),
        ([f"a={bundles['din']}", "--address", "example"], "'example' is no address"),
        ([f"a={bundles['din']}", "--address", "192.0.2.1", "--no-token"], "cannot listen on 192.0.2.1"),
    ):
        line = [sys.executable, "-m", "rechub_dist", "serve", *arguments]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("error: ")) == (2, 1), done.stderr
        assert told in done.stderr
