"""What only runs of recall models have: items of several features, auxiliary tasks, padded sequences."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from rechub_dist.assembly.parts import build
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.reader import ParquetReader
from rechub_dist.embedded import Jagged
from rechub_dist.errors import UserError
from rechub_dist.objectives import retrieval
from rechub_dist.reporting.summary import Summary
from rechub_tests.items import ITEMS, several_features, write_items
from rechub_tests.ranks import RankPool
from rechub_tests.representatives import slow
from rechub_tests.runs import config_of, labels, last_weights, losses, records, run_file, train, write_data


@pytest.fixture
def items_root(tmp_path: Path) -> Path:
    """Data with a file of items, in another order than their ids."""
    root = tmp_path / "data"
    write_data(root)
    write_items(root, np.random.default_rng(5).permutation(ITEMS))
    return root


def ranked_by_hand(path: Path) -> float:
    """ndcg@10 of the last weights on the test split, user by user: seen items left out, ties half a place."""
    config = config_of(path)
    parts, tables = last_weights(path)
    model = parts.train_module.model
    ids = torch.arange(ITEMS)
    none = Jagged(torch.empty(0, dtype=torch.int64), torch.zeros(ITEMS, dtype=torch.int32))
    every = dict.fromkeys(parts.layout.features, none)
    every |= {"item": Jagged.single(ids), "shop": Jagged.single(ids % 17)}
    vectors = model.item(tables(every, {"age": (ids / ITEMS).float()[:, None], "profile": torch.zeros(ITEMS, 3)}))
    reader = ParquetReader(
        Manifest.read(f"{config.data.root}/test"), parts.spec, batch_size=70, shuffle=False, prefetch=0
    )
    [batch] = reader.batches(0)
    given = {
        name: Jagged(batch.feature(name).values(), batch.feature(name).lengths()) for name in parts.layout.features
    }
    dense = dict(
        zip([f.name for f in parts.spec.dense], batch.dense.split([f.dim for f in parts.spec.dense], 1), strict=True)
    )
    user = model.user(tables(given, dense))[0][:, 0]
    history = batch.feature("history").to_dense()
    total = 0.0
    for row in range(70):
        target = int(given["item"].values[row])
        scores = (vectors @ user[row]).tolist()
        others = set(range(ITEMS)) - set(history[row].tolist()) - {target}
        place = sum((scores[i] > scores[target]) + 0.5 * (scores[i] == scores[target]) for i in others)
        total += 1 / np.log2(place + 2) if place < 10 else 0.0
    return total / 70


@pytest.mark.parametrize("ranks", [1, 3])
def test_items_with_several_features(pool: RankPool, items_root: Path, tmp_path: Path, ranks: int) -> None:
    path = several_features(tmp_path, items_root)
    summary, *_ = pool.run(ranks, train, path, ["data.valid=null"])
    assert summary.test["ndcg@10"] == pytest.approx(ranked_by_hand(path), abs=1e-6)
    assert summary.test["ndcg@10"] > 0


@pytest.mark.parametrize(
    ("items", "message"), [(np.arange(ITEMS - 1), "item 60 0 times"), (np.arange(ITEMS + 3) % ITEMS, "item 0 2 times")]
)
def test_items_that_are_missing_or_twice(
    pool: RankPool, items_root: Path, tmp_path: Path, items: np.ndarray, message: str
) -> None:
    write_items(items_root, items)
    with pytest.raises(UserError, match=message):
        pool.run(2, train, several_features(tmp_path, items_root))


@pytest.mark.slow
def test_weighted_features_of_replicated_tables(pool: RankPool, items_root: Path, tmp_path: Path) -> None:
    """A pass over the items has no ids of users' features, and so no weights for them."""
    model = {"user_features": ["user", "brands"], "item_features": ["item", "shop"]}
    sharded = run_file(tmp_path / "sharded", items_root, "DSSM", model=model, objective={"negatives": "in_batch"})
    replicated = run_file(
        tmp_path / "replicated",
        items_root,
        "DSSM",
        model=model,
        objective={"negatives": "in_batch"},
        embedding={"sharding": "replicated"},
    )
    found = [pool.run(2, train, path)[0].test for path in (sharded, replicated)]
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def train_as_on_a_device(path: Path) -> Summary:
    """Ranks do not ask how many of the candidates that they bring together are distinct."""
    with mock.patch.object(retrieval, "counts_at_once", return_value=False):
        return train(path)


@pytest.mark.parametrize(("loss", "log_q"), [slow("softmax", False), ("softmax", True), slow("bpr", False)])
def test_candidates_that_are_not_counted(
    pool: RankPool, items_root: Path, tmp_path: Path, loss: str, log_q: bool
) -> None:
    """Items that several ranks bring stand there twice and count once."""
    objective = {"name": "retrieval", "negatives": "in_batch", "loss": loss, "log_q": log_q}
    paths = [run_file(tmp_path / name, items_root, "DSSM", objective=objective) for name in ("here", "device")]
    for path, function in zip(paths, (train, train_as_on_a_device), strict=True):
        pool.run(2, function, path)
    assert len(losses(paths[0])) > 5
    torch.testing.assert_close(losses(paths[0]), losses(paths[1]), rtol=1e-5, atol=0)


def test_no_file_of_items(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"items"):
        pool.run(1, train, several_features(tmp_path, data_root))


def test_auxiliary_tasks_are_measured(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "FacebookDSSM")
    assert labels("FacebookDSSM") == ["click", "stay"]
    summary, *_ = pool.run(2, train, path)
    assert {"ndcg@10", "click/auc", "stay/mse"} <= summary.test.keys()
    again = run_file(tmp_path / "one", data_root, "FacebookDSSM")
    alone, *_ = pool.run(1, train, again)
    for name, value in alone.test.items():
        assert summary.test[name] == pytest.approx(value, abs=1e-4), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_share_of_padding(pool: RankPool, data_root: Path, tmp_path: Path, ranks: int) -> None:
    path = run_file(tmp_path, data_root, "SASRec", train={"epochs": 1, "log_every": 3})
    pool.run(ranks, train, path)
    config = config_of(path)
    parts = build(config, device="cpu", world_size=1)
    manifest = Manifest.read(str(data_root / "train"))
    real, computed = np.zeros(9), np.zeros(9)
    for rank in range(ranks):
        reader = ParquetReader(manifest, parts.spec, batch_size=64, rank=rank, world_size=ranks, seed=config.seed)
        for step, batch in enumerate(reader.batches(0)):
            lengths = batch.feature("history").lengths()[: batch.rows].numpy()
            real[step] += lengths.sum()
            computed[step] += len(lengths) * lengths.max()
    expected = 1 - real.reshape(3, 3).sum(axis=1) / computed.reshape(3, 3).sum(axis=1)
    found = [record["padded_share"] for record in records(path, "train")]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert 0.2 < min(found) < max(found) < 0.7


def test_no_share_of_padding_without_sequences(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", train={"epochs": 1})
    pool.run(1, train, path)
    assert "padded_share" not in records(path, "train")[0]
