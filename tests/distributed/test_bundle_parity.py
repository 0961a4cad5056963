"""Every model, on ten thousand raw rows: what a bundle says of them beside what `predict` says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.run import load
from rechub_dist.models import catalogue, family
from rechub_tests.raw import PLAIN, write_raw
from rechub_tests.runs import PLAIN as FEW
from rechub_tests.runs import parameters
from rechub_tests.serving import make_bundle

pytestmark = pytest.mark.slow
ROWS = 10_000
K = 10
Table = dict[str, dict[str, float]]
Best = tuple[NDArray[Any], NDArray[Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("raw") / "data", {"train": 2000, "valid": 200, "test": ROWS})


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    """The largest differences by model and output, printed in the end."""
    found: Table = {}
    yield found
    print(f"\n| model | largest differences on {ROWS:,} rows |\n|---|---|")
    for model, apart in found.items():
        print(f"| {model} | {', '.join(f'{name} {value:.1e}' for name, value in apart.items())} |")


def features(model: str) -> dict[str, Any]:
    """Its parameters, with every kind of plain feature in the place of those of the small data set."""
    found = {
        name: [*PLAIN, *(feature for feature in value if feature not in (*FEW, *PLAIN))]
        for name, value in parameters(model).items()
        if isinstance(value, list) and set(FEW) <= set(value)
    }
    if model == "WideDeep":
        found["wide_features"] = ["user", "user_x_tags", "city_x_genres", "hour", "age"]
    return found


@pytest.mark.parametrize("model", list(catalogue()))
def test_a_bundle_says_what_predict_says(data: Path, tmp_path: Path, table: Table, model: str) -> None:
    bundle = Bundle(make_bundle(tmp_path, data, model, model=features(model)), check=True)
    run, rows = load(tmp_path / "out"), pq.read_table(data / "test")
    wanted = run.predict(data / "test", top_k=K)
    assert wanted["source_row"].to_pylist() == list(range(ROWS))
    if family(catalogue()[model]) == "recall":
        table[model] = apart_of_items(run, bundle, rows, wanted)
    else:
        got = bundle.score(rows)
        table[model] = {name: np.abs(wanted[name].to_numpy() - got[name].to_numpy()).max() for name in got.column_names}
        assert all(np.ptp(wanted[name].to_numpy()) > 1e-3 for name in got.column_names)
    assert max(table[model].values()) < 1e-5, table[model]


def apart_of_items(run: Any, bundle: Bundle, rows: pa.Table, wanted: pa.Table) -> dict[str, float]:
    """Relative differences of vectors and of the best items' scores; the items are the same, but for ties."""
    found = {}
    for side in ("user", "item"):
        one, other = (flat(one.vectors(side, rows).column(0)) for one in (run, bundle))
        assert one.shape == other.shape
        found[f"{side} vectors"] = float(np.abs(one - other).max() / np.abs(one).max())
    best = pairs(wanted)
    size = np.abs(best[1][best[1] > -np.inf]).max()
    for other in (run.top_k(rows, K), bundle.retrieve(rows, K)):
        found["top scores"] = apart_of_best(best, pairs(other), size)
    return found


def apart_of_best(one: Best, other: Best, size: float) -> float:
    """The largest difference of scores, relative to `size`; the items are the same, but for ties."""
    there = one[1] > -np.inf
    np.testing.assert_array_equal(there, other[1] > -np.inf)
    # what one has found and the other has not is as good as the last
    last = np.where(there, one[1], np.inf).min(axis=1, keepdims=True)
    for (mine, scores), (its, _) in ((one, other), (other, one)):
        alone = there & ~(mine[:, :, None] == its[:, None, :]).any(axis=2)
        np.testing.assert_allclose(scores[alone], np.broadcast_to(last, scores.shape)[alone], atol=2e-5 * size)
    return float(np.abs(one[1][there] - other[1][there]).max() / size)


def pairs(found: pa.Table) -> Best:
    """Items, object [B, 10], and scores, -inf where there is none."""
    ids, scores = np.full((ROWS, K), "", object), np.full((ROWS, K), -np.inf)
    for name, array in (("predicted_items", ids), ("predicted_scores", scores)):
        column = found[name].combine_chunks()
        lengths = np.diff(column.offsets.to_numpy())
        there = np.arange(K) < lengths[:, None]
        array[there] = column.flatten().to_numpy(zero_copy_only=False)
    return ids, scores


def flat(column: pa.ChunkedArray) -> NDArray[Any]:
    """All numbers of a column of vectors, or of lists of them."""
    array = column.combine_chunks()
    while not pa.types.is_floating(array.type):
        array = array.flatten()
    return np.asarray(array.to_numpy())
