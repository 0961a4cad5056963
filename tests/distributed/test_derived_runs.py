"""Runs whose derived columns are computed as files are read, against runs whose files hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

import rechub_dist
from rechub_dist.errors import UserError
from rechub_tests.derived import FEATURES, held_rows, raw_rows, write_derived
from rechub_tests.ranks import RankPool
from rechub_tests.representatives import slow
from rechub_tests.runs import last_checkpoint, losses, output, records, run_file, train

MODEL = {"features": FEATURES, "embedding_dim": 4}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("derived")
    return {name: write_derived(folder / name, held=name == "held") for name in ("raw", "held")}


def equal(path: Path, reference: Path) -> None:
    """Bit for bit."""
    assert losses(path) == losses(reference)
    found, wanted = last_checkpoint(path), last_checkpoint(reference)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    evaluated = [[{**each, "time": 0} for each in records(run, "valid")] for run in (path, reference)]
    assert [each["auc"] for each in evaluated[0]] == [each["auc"] for each in evaluated[1]] != []


@pytest.mark.parametrize("ranks", [slow(1), 2])
def test_a_run_on_raw_columns_is_the_run_on_derived_ones(
    pool: RankPool, roots: dict[str, Path], tmp_path: Path, ranks: int
) -> None:
    paths = {name: run_file(tmp_path / name, root, "DeepFM", model=MODEL) for name, root in roots.items()}
    # what it is evaluated on need not hold what it is trained on holds
    splits = {split: str(roots["raw"] / split) for split in ("valid", "test")}
    paths["mixed"] = run_file(tmp_path / "mixed", roots["held"], "DeepFM", model=MODEL, data=splits)
    for path in paths.values():
        pool.run(ranks, train, path)
    equal(paths["raw"], paths["held"])
    equal(paths["mixed"], paths["held"])


@pytest.mark.parametrize(("first", "then"), [("raw", "held"), slow("held", "raw")])
def test_a_run_goes_on_where_the_other_kind_of_file_is(
    pool: RankPool, roots: dict[str, Path], tmp_path: Path, first: str, then: str
) -> None:
    whole = run_file(tmp_path / "whole", roots[first], "DeepFM", model=MODEL)
    pool.run(2, train, whole)
    half = run_file(tmp_path / "half", roots[first], "DeepFM", model=MODEL)
    pool.run(2, train, half, ["train.epochs=1"])
    pool.run(2, train, half, [f"data.root={roots[then]}"])
    equal(half, whole)


def test_a_run_does_not_go_on_with_other_derived_columns(
    pool: RankPool, roots: dict[str, Path], tmp_path: Path
) -> None:
    path = run_file(tmp_path, roots["raw"], "DeepFM", model=MODEL)
    pool.run(1, train, path, ["train.epochs=1"])
    with pytest.raises(UserError, match=r"data.derived.hour.utc_offset 8.0 -> 0.0"):
        pool.run(1, train, path, ["data.dataset=" + str(other_offset(roots["raw"], tmp_path))])


def other_offset(root: Path, folder: Path) -> Path:
    text = (root / "dataset.yaml").read_text()
    assert "utc_offset: 8" in text
    (folder / "other.yaml").write_text(text.replace("utc_offset: 8", "utc_offset: 0"))
    return folder / "other.yaml"


def test_a_mix_of_both_kinds_of_files(pool: RankPool, roots: dict[str, Path], tmp_path: Path) -> None:
    mix = [{"path": str(root / "train"), "weight": 1} for root in roots.values()]
    path = run_file(tmp_path, roots["raw"], "DeepFM", model=MODEL, data={"mix": mix})
    with pytest.raises(UserError, match=r"data.mix: .*raw/train and .*held/train differ in the derived columns .*hour"):
        pool.run(1, train, path)


def test_a_trained_run_is_given_raw_rows(pool: RankPool, roots: dict[str, Path], tmp_path: Path) -> None:
    path = run_file(tmp_path, roots["held"], "DeepFM", model=MODEL)
    pool.run(1, train, path)
    run = rechub_dist.load(output(path))
    rows = raw_rows(70, seed=2)
    expected = run.predict(held_rows(rows))["predicted_click"]
    assert run.predict(rows)["predicted_click"].equals(expected)
    assert run.predict(str(roots["raw"] / "test"))["predicted_click"].equals(expected)
    raw, held = (run.evaluate(root / "test") for root in (roots["raw"], roots["held"]))
    assert raw == held


def encoded_data(root: Path, into: Path, words: dict[str, int]) -> None:
    """The data with ids in place of the words of `genres`."""
    for part in root.glob("*/*.parquet"):
        table = pq.read_table(part)
        lists = table["genres"].combine_chunks()
        ids = pc.index_in(lists.values, value_set=pa.array(list(words)))
        column = pa.ListArray.from_arrays(lists.offsets, pa.array(list(words.values())).take(ids), mask=lists.is_null())
        target = into / part.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            table.set_column(table.column_names.index("genres"), "genres", column), target, row_group_size=70
        )
    (into / "dataset.yaml").write_text((root / "dataset.yaml").read_text())


def test_a_run_on_encoded_columns_is_the_run_on_values(pool: RankPool, roots: dict[str, Path], tmp_path: Path) -> None:
    words = {"drama": 5, "crime": 4, "war": 3, "sci-fi": 2, "docu": 1}
    vocabulary = tmp_path / "words.parquet"
    pq.write_table(pa.table({"value": list(words), "id": list(words.values())}), vocabulary)
    encoded_data(roots["held"], tmp_path / "data", words)
    genres: dict[str, Any] = {"kind": "sparse", "rows": 9, "pooling": "mean", "vocabulary": str(vocabulary)}
    paths = {}
    for name, root in (("values", roots["raw"]), ("encoded", tmp_path / "data")):
        how = genres | ({"encoded": True} if name == "encoded" else {})
        paths[name] = run_file(tmp_path / name, root, "DeepFM", model=MODEL, data={"features": {"genres": how}})
        pool.run(2, train, paths[name])
    equal(paths["encoded"], paths["values"])
    # a request brings values, whatever the files held
    rows = raw_rows(20)
    given = [rechub_dist.load(output(path)).predict(rows)["predicted_click"] for path in paths.values()]
    assert given[0].equals(given[1])
