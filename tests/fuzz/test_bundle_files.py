"""Damaged bundles: the scores that it gave, or one line that says what is damaged."""

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
from rechub_dist.inference.bundle.engines import Engine
from rechub_dist.inference.bundle.manifest import MANIFEST, BundleManifest, records_of, write_manifest
from rechub_dist.inference.export import export_bundle
from rechub_dist.typed import validated
from rechub_tests.mutations import BYTES, MUTATIONS, Cut, Mutation, cut, cuts, fuzz, mutated, outcome
from rechub_tests.runs import run_file, train, write_data

Scored = tuple[Path, pa.Table, np.ndarray]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """A bundle, rows, and its scores of them."""
    folder = tmp_path_factory.mktemp("bundle")
    write_data(folder / "data")
    train(run_file(folder, folder / "data", "DIN", train={"epochs": 1, "max_steps": 2}))
    export_bundle(str(folder / "out"), folder / "bundle", formats=("onnx", "torch"))
    rows = pq.read_table(folder / "data" / "test").slice(0, 5)
    return folder / "bundle", rows, scores(folder / "bundle", rows)


def scores(folder: Path, rows: pa.Table, engine: Engine = "onnx") -> np.ndarray:
    found: np.ndarray = Bundle(folder, threads=1, check=True, engine=engine).score(rows)["predicted_click"].to_numpy()
    return found


def copied(bundle: Path) -> Path:
    target = bundle.with_name("damaged")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(bundle, target)
    return target


FILES = (MANIFEST, "dataset.yaml", "score.onnx", "tables.safetensors")


@fuzz(60)
@given(st.sampled_from(FILES), cuts(BYTES))
def test_bytes_of_any_file(bundle: Scored, name: str, changes: list[Cut]) -> None:
    folder, rows, wanted = bundle
    target = copied(folder)
    before = (folder / name).read_bytes()
    (target / name).write_bytes(cut(before, changes))
    found = outcome(lambda: scores(target, rows))
    assert found is None or np.array_equal(found, wanted)


@pytest.mark.slow
@fuzz(60)
@given(cuts(BYTES))
def test_a_program_that_somebody_has_sealed_again(bundle: Scored, changes: list[Cut]) -> None:
    """Whatever it is: scores, of other weights perhaps, or one line."""
    folder, rows, wanted = bundle
    target = copied(folder)
    (target / "score.pt2").write_bytes(cut((folder / "score.pt2").read_bytes(), changes))
    manifest = BundleManifest.model_validate_json((folder / MANIFEST).read_bytes())
    write_manifest(target, manifest.model_copy(update={"files": records_of(target)}))
    found = outcome(lambda: scores(target, rows, "torch"))
    assert found is None or found.shape == wanted.shape


@fuzz(60)
@given(MUTATIONS)
def test_a_manifest_that_somebody_has_sealed_again(bundle: Scored, mutations: list[Mutation]) -> None:
    """Whatever it says: scores, or one line; nothing outside the folder is read."""
    folder, rows, _ = bundle
    target = copied(folder)
    tree = mutated(json.loads((folder / MANIFEST).read_text()), mutations)

    def work() -> np.ndarray:
        manifest = validated("bundle.json", BundleManifest, tree)
        write_manifest(target, manifest)
        return scores(target, rows)

    outcome(work)
