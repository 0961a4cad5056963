"""Requests that nobody would send: a right answer, or a line that says what does not fit; the server never fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rechub_dist.errors import LONGEST, UserError
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_tests.mutations import BYTES, MUTATIONS, Cut, Mutation, Place, cut, cuts, fuzz, mutated
from rechub_tests.serving import ARROW, Server, rows_of, serving

ROOTS: list[Place] = [("rows",), ("columns",), ("user",), ("candidates",)]


class Target(NamedTuple):
    """A server, and what its answers are compared with."""

    server: Server
    client: httpx.Client
    bundles: dict[str, Bundle]
    rows: dict[str, list[dict[str, Any]]]
    table: pa.Table

    def __repr__(self) -> str:
        return "..."


@pytest.fixture(scope="module")
def target(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    names = ("din", "wide", "sas")
    opened = {name: Bundle(bundles[name], threads=1) for name in names}
    rows = {name: rows_of(bundles["rows"], bundles[name], 3) for name in names}
    arguments = (f"{name}={bundles[name]}" for name in names)
    with (
        serving(tmp_path_factory.mktemp("fuzz") / "log", *arguments, "--max-mb", "1") as server,
        server.client() as client,
    ):
        table = pq.read_table(bundles["rows"]).slice(0, 3)
        yield Target(server, client, opened, rows, table)
        assert server.process.poll() is None
        assert "Traceback" not in server.log.read_text()


def checked(target: Target, answer: httpx.Response) -> dict[str, Any] | None:
    """The columns of an answer; None where it is a line that says what does not fit."""
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, (answer.status_code, answer.text)
    if answer.status_code == 200:
        found: dict[str, Any] = answer.json()["columns"]
        return found
    detail = answer.json()["detail"]
    assert detail.isprintable()
    assert 0 < len(detail) <= LONGEST
    assert str(target.bundles["din"].folder.parent.parent) not in detail
    return None


def asked(target: Target, path: str, tree: Any) -> dict[str, Any] | None:
    body = json.dumps(tree).encode("utf-8", "surrogatepass")
    headers = {"Content-Type": "application/json"}
    return checked(target, target.client.post(path, content=body, headers=headers))


def scores(bundle: Bundle, rows: list[dict[str, Any]]) -> Any:
    """What the bundle says of rows by another way than the server's; None where it takes them not."""
    try:
        table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in bundle.columns})
        return bundle.score(table)["predicted_click"].to_numpy()
    except (UserError, pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
        return None


def same(found: dict[str, Any], wanted: Any, rows: int) -> None:
    got = np.array([np.nan if value is None else value for value in found["predicted_click"]], np.float32)
    assert len(got) == rows
    if wanted is not None:
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@fuzz(300)
@given(st.sampled_from(["din", "wide"]), MUTATIONS)
def test_rows(target: Target, name: str, mutations: list[Mutation]) -> None:
    tree = mutated({"rows": target.rows[name]}, mutations, ROOTS)
    found = asked(target, f"/bundles/{name}/score", tree)
    if found is not None and set(tree) == {"rows"}:
        same(found, scores(target.bundles[name], tree["rows"]), len(tree["rows"]))


@fuzz(200)
@given(st.sampled_from(["din", "wide"]), MUTATIONS)
def test_columns(target: Target, name: str, mutations: list[Mutation]) -> None:
    rows = target.rows[name]
    tree = mutated({"columns": {key: [row[key] for row in rows] for key in rows[0]}}, mutations, ROOTS)
    found = asked(target, f"/bundles/{name}/score", tree)
    if found is not None and set(tree) == {"columns"}:
        columns = {key: tree["columns"][key] for key in target.bundles[name].columns}
        turned = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        same(found, scores(target.bundles[name], turned), len(turned))


@fuzz(200)
@given(st.sampled_from(["din", "wide"]), st.integers(0, 2**12 - 1), MUTATIONS)
def test_candidates(target: Target, name: str, split: int, mutations: list[Mutation]) -> None:
    rows = target.rows[name]
    of_user = [key for place, key in enumerate(rows[0]) if split >> place & 1]
    tree = {
        "user": {key: rows[0][key] for key in of_user},
        "candidates": [{key: row[key] for key in row if key not in of_user} for row in rows],
    }
    changed = mutated(tree, mutations, ROOTS)
    for one in (tree, changed):
        found = asked(target, f"/bundles/{name}/score", one)
        if found is not None and set(one) == {"user", "candidates"}:
            whole = [{**one["user"], **candidate} for candidate in one["candidates"]]
            same(found, scores(target.bundles[name], whole), len(whole))


@fuzz(100)
@given(st.sampled_from(["retrieve", "retrieve?k=70", "vectors", "vectors?side=item"]), MUTATIONS)
def test_recall(target: Target, what: str, mutations: list[Mutation]) -> None:
    rows = [{"item": "item 1"}] * 3 if what.endswith("item") else target.rows["sas"]
    tree = mutated({"rows": rows}, mutations, ROOTS)
    found = asked(target, f"/bundles/sas/{what}", tree)
    if found is not None and set(tree) == {"rows"}:
        assert all(len(values) == len(tree["rows"]) for values in found.values())


@fuzz(150)
@given(cuts(BYTES))
def test_bytes_of_json(target: Target, changes: list[Cut]) -> None:
    body = cut(json.dumps({"rows": target.rows["din"]}).encode(), changes)
    answer = target.client.post("/bundles/din/score", content=body, headers={"Content-Type": "application/json"})
    checked(target, answer)


@fuzz(300)
@given(cuts(BYTES), st.booleans())
def test_bytes_of_arrow(target: Target, changes: list[Cut], words: bool) -> None:
    sink = pa.BufferOutputStream()
    table = target.table
    if words:
        place = table.column_names.index("item")
        table = table.set_column(place, "item", table["item"].dictionary_encode())
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    body = cut(sink.getvalue().to_pybytes(), changes)
    headers = {"Content-Type": ARROW, "Accept": "application/json"}
    checked(target, target.client.post("/bundles/din/score", content=body, headers=headers))
