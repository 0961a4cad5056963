"""Damaged deltas: the scores that they lead to, or one line that says what is damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.bundle.deltas import DELTA, ROWS, DeltaManifest, read_state
from rechub_dist.inference.bundle.manifest import record
from rechub_dist.inference.export import export_bundle, export_delta
from rechub_dist.typed import validated
from rechub_tests.mutations import BYTES, MUTATIONS, Cut, Mutation, cut, cuts, fuzz, mutated, outcome
from rechub_tests.runs import run_file, train, write_data

Scored = tuple[Path, Path, pa.Table, np.ndarray]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """A bundle, a delta, rows, and their scores."""
    folder = tmp_path_factory.mktemp("delta")
    write_data(folder / "data")
    for step, name in ((1, "bundle"), (2, "full")):
        train(run_file(folder, folder / "data", "DIN", train={"max_steps": step}))
        export_bundle(str(folder / "out"), folder / name, tables="int8")
    export_delta(str(folder / "out"), folder / "delta", read_state(folder / "bundle"))
    rows = pq.read_table(folder / "data" / "test").slice(0, 5)
    return folder / "bundle", folder / "delta", rows, scores(folder / "full", None, rows)


def scores(folder: Path, delta: Path | None, rows: pa.Table) -> np.ndarray:
    bundle = Bundle(folder, [] if delta is None else [delta], threads=1, check=True)
    found: np.ndarray = bundle.score(rows)["predicted_click"].to_numpy()
    return found


def copied(delta: Path) -> Path:
    target = delta.with_name("damaged")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(delta, target)
    return target


@fuzz(60)
@given(st.sampled_from((DELTA, ROWS, "score.onnx")), cuts(BYTES))
def test_bytes_of_any_file(made: Scored, name: str, changes: list[Cut]) -> None:
    bundle, delta, rows, wanted = made
    target = copied(delta)
    (target / name).write_bytes(cut((delta / name).read_bytes(), changes))
    found = outcome(lambda: scores(bundle, target, rows))
    assert found is None or np.array_equal(found, wanted)


@fuzz(60)
@given(cuts(BYTES))
def test_rows_that_somebody_has_sealed_again(made: Scored, changes: list[Cut]) -> None:
    """Whatever they are: scores, or one line."""
    bundle, delta, rows, _ = made
    target = copied(delta)
    (target / ROWS).write_bytes(cut((delta / ROWS).read_bytes(), changes))
    manifest = DeltaManifest.model_validate_json((delta / DELTA).read_text())
    files = {**manifest.files, ROWS: record(target / ROWS)}
    (target / DELTA).write_text(manifest.model_copy(update={"files": files}).sealed.model_dump_json())
    outcome(lambda: scores(bundle, target, rows))


@fuzz(60)
@given(MUTATIONS)
def test_a_manifest_that_somebody_has_sealed_again(made: Scored, mutations: list[Mutation]) -> None:
    bundle, delta, rows, _ = made
    target = copied(delta)
    tree = mutated(json.loads((delta / DELTA).read_text()), mutations)

    def work() -> np.ndarray:
        manifest = validated("delta.json", DeltaManifest, tree)
        (target / DELTA).write_text(manifest.sealed.model_dump_json())
        return scores(bundle, target, rows)

    outcome(work)
