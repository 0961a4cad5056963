"""Optimizers of runs on several ranks against plain torch: groups, frozen parts, decay, dropout, averages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rechub_dist.assembly.parts import build
from rechub_dist.batch import Batch
from rechub_dist.data.run_file import load_run
from rechub_dist.embedded import Embedded
from rechub_dist.errors import UserError
from rechub_dist.evaluation.evaluate import evaluate_run
from rechub_dist.seeds import seed_from
from rechub_tests.plain import PlainRun, assert_same_weights, rowwise_adagrad_
from rechub_tests.ranks import RankPool
from rechub_tests.representatives import slow
from rechub_tests.runs import SCHEMA, config_of, last_checkpoint, losses, run_file, train

MIXED = [{"tables": "user*", "sharding": "row_wise"}, {"tables": "item*", "sharding": "replicated"}]


def initial(path: Path) -> dict[str, torch.Tensor]:
    """All weights before the first step, by canonical name."""
    return {name: weight.clone() for name, weight in PlainRun(path).weights().items()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_groups_of_dense_parameters(pool: RankPool, data_root: Path, tmp_path: Path, ranks: int) -> None:
    rules = [
        {"parameters": "*.bias", "lr": 0.002},
        {"parameters": "first_order.*", "frozen": True},
        {"parameters": "mlp.*", "weight_decay": 0.3},
    ]
    settings = {"name": "adamw", "weight_decay": 0.1, "weight_decay_of": "matrices", "rules": rules}
    path = run_file(tmp_path, data_root, "DeepFM", optimizer=settings)
    pool.run(ranks, train, path, ["train.max_steps=7"])
    pool.run(ranks, train, path)
    run = PlainRun(path)
    named = dict(run.model.named_parameters())
    assert {name.split(".")[0] for name in named} >= {"mlp", "first_order"}
    frozen = {name for name in named if name.startswith("first_order.") and not name.endswith(".bias")}
    assert frozen
    groups = [
        {
            "params": [parameter],
            "lr": 0.002 if name.endswith(".bias") else 0.01,
            "weight_decay": 0.0 if parameter.dim() < 2 else 0.3 if name.startswith("mlp.") else 0.1,
        }
        for name, parameter in named.items()
        if name not in frozen
    ]
    dense = torch.optim.AdamW(groups)
    sums = {name: torch.zeros(len(run.tables.weight(name))) for name in run.placed}

    def update(*_: Any) -> None:
        dense.step()
        for name, state in sums.items():
            rowwise_adagrad_(run.tables.weight(name), state, 0.05)

    before = initial(path)
    torch.testing.assert_close(losses(path), run.train(update), rtol=0, atol=3e-6)
    found = last_checkpoint(path)
    assert_same_weights(found, run.weights())
    for name in frozen:
        assert torch.equal(found[f"dense/{name}"], before[f"dense/{name}"])
        assert not [key for key in found if key.startswith(f"dense_optim/{name}/")]


@pytest.mark.parametrize("ranks", [1, 2])
def test_frozen_tables_stay_bit_for_bit(pool: RankPool, data_root: Path, tmp_path: Path, ranks: int) -> None:
    rules = [
        {"tables": "user", "sharding": "row_wise", "frozen": True},
        {"tables": "item", "sharding": "replicated", "frozen": True},
        {"tables": "tags", "frozen": True},
        {"tables": "item.linear", "sharding": "replicated"},
        {"tables": "brands", "optimizer": {"name": "sgd", "lr": 0.5}},
    ]
    table = {"optimizer": {"name": "sgd", "lr": 0.1}, "rules": rules}
    path = run_file(tmp_path, data_root, "DeepFM", embedding=table)
    pool.run(ranks, train, path, ["train.max_steps=7"])
    pool.run(ranks, train, path)
    run, before = PlainRun(path), initial(path)
    dense = torch.optim.Adam(run.model.parameters(), lr=0.01)
    trained = set(run.placed) - {"user", "item", "tags"}

    def update(*_: Any) -> None:
        dense.step()
        with torch.no_grad():
            for name in trained:
                run.tables.weight(name).add_(run.tables.weight(name).grad, alpha=-0.5 if name == "brands" else -0.1)

    torch.testing.assert_close(losses(path), run.train(update), rtol=0, atol=3e-6)
    found = last_checkpoint(path)
    assert_same_weights(found, run.weights())
    for name in ("user", "item", "tags"):
        assert torch.equal(found[f"tables/{name}/weight"], before[f"tables/{name}/weight"])
        assert {key for key in found if key.startswith(f"tables/{name}/")} == {f"tables/{name}/weight"}
    for name in trained:
        assert not torch.equal(found[f"tables/{name}/weight"], before[f"tables/{name}/weight"])


def test_a_model_may_be_frozen_whole(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(
        tmp_path, data_root, "DeepFM", optimizer={"rules": [{"parameters": "*", "frozen": True}]}, train={"epochs": 1}
    )
    pool.run(2, train, path)
    found, before = last_checkpoint(path), initial(path)
    for name, weight in before.items():
        assert torch.equal(found[name], weight) == name.startswith("dense/"), name


@pytest.mark.parametrize(
    ("optimizer", "decay", "sharding", "ranks"),
    [
        slow("rowwise_adagrad", "l2", "table_wise", 1),
        ("rowwise_adagrad", "l2", "row_wise", 2),
        slow("rowwise_adagrad", "l2", "mixed", 3),
        slow("rowwise_adagrad", "decoupled", "mixed", 2),
        slow("adagrad", "l2", "replicated", 2),
        slow("adagrad", "decoupled", "replicated", 1),
        slow("sgd", "l2", "replicated", 2),
        slow("adam", "l2", "replicated", 2),
        ("adam", "decoupled", "replicated", 2),
    ],
)
def test_weight_decay_of_looked_up_rows(
    pool: RankPool, data_root: Path, tmp_path: Path, optimizer: str, decay: str, sharding: str, ranks: int
) -> None:
    settings = {"name": optimizer, "lr": 0.05, "weight_decay": 0.4, "decay": decay}
    where = {"sharding": "table_wise", "rules": MIXED} if sharding == "mixed" else {"sharding": sharding}
    path = run_file(tmp_path, data_root, "DIN", embedding={"optimizer": settings, **where})
    pool.run(ranks, train, path, ["train.max_steps=7"])
    pool.run(ranks, train, path)
    run = PlainRun(path)
    dense = torch.optim.Adam(run.model.parameters(), lr=0.01)
    weights = {name: run.tables.weight(name) for name in run.placed}
    classes = {"adam": torch.optim.AdamW if decay == "decoupled" else torch.optim.Adam, "adagrad": torch.optim.Adagrad}
    more = {"weight_decay": 0.4} if optimizer == "adam" else {"eps": 1e-8}
    torchs = {name: classes[optimizer]([weights[name]], lr=0.05, **more) for name in weights if optimizer in classes}
    sums = {name: torch.zeros(len(weight)) for name, weight in weights.items()}

    @torch.no_grad()
    def update(_: int, batch: Batch) -> None:
        dense.step()
        looked_up = run.looked_up(batch)
        assert not all(rows.all() for rows in looked_up.values())
        for name, weight in weights.items():
            if optimizer != "adam":  # which torch decays, all rows of it
                for row in looked_up[name].nonzero().flatten():
                    if decay == "l2":
                        weight.grad[row] += 0.4 * weight[row]
                    else:
                        weight[row] -= 0.05 * 0.4 * weight[row]
            if optimizer == "rowwise_adagrad":
                rowwise_adagrad_(weight, sums[name], 0.05)
            elif optimizer == "sgd":
                weight.sub_(0.05 * weight.grad)
            else:
                torchs[name].step()

    torch.testing.assert_close(losses(path), run.train(update), rtol=0, atol=3e-6)
    assert_same_weights(last_checkpoint(path), run.weights())


@pytest.mark.parametrize("model", ["DeepFM", "DIN"])
def test_dropout_of_what_was_looked_up(pool: RankPool, data_root: Path, tmp_path: Path, model: str) -> None:
    where = {"dropout": 0.4, "rules": [{**MIXED[1], "dropout": 0.25}, {"tables": "u*", "dropout": 0}]}
    path = run_file(tmp_path, data_root, model, embedding=where, train={"epochs": 1})
    pool.run(1, train, path, ["train.max_steps=4"])
    [summary] = pool.run(1, train, path)
    run = PlainRun(path)
    dense = torch.optim.Adam(run.model.parameters(), lr=0.01)
    sums = {name: torch.zeros(len(run.tables.weight(name))) for name in run.placed}
    rates = {name: placed.dropout for name, placed in run.parts.layout.tables.items()}
    assert set(rates.values()) >= {0.4, 0.25}

    def look_up(step: int) -> Any:
        def dropped(*given: Any) -> Embedded:
            embedded = run.tables(*given)
            torch.manual_seed(seed_from(repr((run.config.seed, step, 0))))
            for lookup in run.parts.layout.lookups:
                rate, name = rates[lookup.table.name], lookup.name
                if rate and name in embedded.vectors:
                    embedded.vectors[name] = F.dropout(embedded.vectors[name], rate)
                elif rate:
                    sequence = embedded.sequences[name]
                    embedded.sequences[name] = sequence._replace(values=F.dropout(sequence.values, rate))
            return embedded

        return dropped

    found = []
    for step, batch in enumerate(run.batches()):
        run.model.zero_grad()
        run.tables.zero_grad()
        loss = run.loss(batch, look_up(step))
        loss.backward()
        dense.step()
        for name, state in sums.items():
            rowwise_adagrad_(run.tables.weight(name), state, 0.05)
        found.append(loss.item())
    torch.testing.assert_close(losses(path), found, rtol=0, atol=3e-6)
    assert summary.test  # and evaluation draws nothing: see below


def test_evaluation_drops_nothing(data_root: Path, tmp_path: Path) -> None:
    config = config_of(run_file(tmp_path, data_root, "DeepFM", embedding={"dropout": 0.5}))
    assemble = build(config, device="cpu", world_size=1).train_module.eval().stage.assemble
    assert assemble.dropouts
    assert not assemble.training


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"optimizer": {"rules": [{"parameters": "mpl.*", "lr": 1}]}},
            r"'mpl\.\*' matches no .*did you mean 'mlp\.\*'",
        ),
        ({"optimizer": {"rules": [{"parameters": "*", "lr": 1, "frozen": True}]}}, "neither lr nor weight_decay"),
        ({"embedding": {"rules": [{"tables": "*", "frozen": True, "optimizer": {}}]}}, "has no optimizer"),
        (
            {
                "optimizer": {"rules": [{"parameters": "*", "frozen": True}]},
                "embedding": {"rules": [{"tables": "*", "frozen": True}]},
            },
            "freeze every parameter and table",
        ),
        (
            {"embedding": {"optimizer": {"name": "adagrad", "weight_decay": 0.1}}},
            "kernels of adagrad have no weight decay; use rowwise_adagrad, or replicate",
        ),
        ({"embedding": {"dropout": 1.0}}, "embedding.dropout"),
    ],
)
def test_what_cannot_be_had(data_root: Path, tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", **sections)
    with pytest.raises(UserError, match=message):
        build(config_of(path), device="cpu", world_size=1)


LOCAL = {"sharding": "replicated", "optimizer": {"name": "adagrad", "lr": 0.05}}


def adagrad(run: PlainRun) -> list[torch.optim.Optimizer]:
    """As `LOCAL`, and Adam for the dense parameters."""
    weights = [run.tables.weight(name) for name in run.placed]
    return [torch.optim.Adagrad(weights, lr=0.05, eps=1e-8), torch.optim.Adam(run.model.parameters(), lr=0.01)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "parts", "ranks"), [("DIN", 3, 1), ("DIN", 2, 2), ("SASRec", 50, 3), ("SharedBottom", 4, 2)]
)
def test_parts_of_a_batch_add_up(
    pool: RankPool, data_root: Path, tmp_path: Path, model: str, parts: int, ranks: int
) -> None:
    more: dict[str, Any] = {"data": {"dataset": {**SCHEMA, "weight": "importance"}}} if model == "SharedBottom" else {}
    if model != "SASRec":  # statistics over a batch are those of its parts
        more["model"] = {"batch_norm": False, **({"activation": "relu"} if model == "DIN" else {})}
    path = run_file(tmp_path, data_root, model, embedding=LOCAL, **more)
    pool.run(ranks, train, path, [f"train.accumulate={parts}"])
    run = PlainRun(path)
    optimizers = adagrad(run)
    wanted = run.train(lambda *_: [optimizer.step() for optimizer in optimizers])
    torch.testing.assert_close(losses(path), wanted, rtol=0, atol=3e-6)
    assert_same_weights(last_checkpoint(path), run.weights())


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_of_tables_are_clipped(pool: RankPool, data_root: Path, tmp_path: Path, ranks: int) -> None:
    settings = {**LOCAL, "clip_norm": 0.18, "optimizer": {"name": "sgd", "lr": 2.0}}
    path = run_file(tmp_path, data_root, "DeepFM", embedding=settings, optimizer={"clip_norm": 0.1})
    pool.run(ranks, train, path, ["train.accumulate=2"] if ranks == 2 else [])
    run = PlainRun(path)
    weights = [run.tables.weight(name) for name in run.placed]
    optimizers = [torch.optim.SGD(weights, lr=2.0), torch.optim.Adam(run.model.parameters(), lr=0.01)]
    norms = []

    def update(*_: Any) -> None:
        norms.append(torch.nn.utils.clip_grad_norm_(weights, 0.18))
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
        for optimizer in optimizers:
            optimizer.step()

    wanted = run.train(update)
    assert max(norms) > 0.18 > min(norms)
    if ranks == 1:  # batch norm sees the parts of a batch one by one
        torch.testing.assert_close(losses(path), wanted, rtol=0, atol=3e-6)
        assert_same_weights(last_checkpoint(path), run.weights())


def evaluation(path: Path) -> dict[str, float]:
    """The metrics of the run's best checkpoint on the valid split."""
    config = config_of(path)
    return evaluate_run(config, f"{config.data.root}/valid")[1].metrics


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_average_of_dense_parameters_is_what_is_served(
    pool: RankPool, data_root: Path, tmp_path: Path, ranks: int
) -> None:
    sections = {"embedding": {"rules": MIXED}, "train": {"epochs": 2, "log_every": 1, "ema": 0.9}}
    reference = run_file(tmp_path / "reference", data_root, "DeepFM", **sections)
    [summary, *_] = pool.run(ranks, train, reference, ["train.eval_epochs=2"])
    path = run_file(tmp_path / "resumed", data_root, "DeepFM", **sections)
    pool.run(ranks, train, path, ["train.max_steps=7"])
    pool.run(ranks, train, path)
    run = PlainRun(path)
    dense = torch.optim.Adam(run.model.parameters(), lr=0.01)
    sums = {name: torch.zeros(len(run.tables.weight(name))) for name in run.placed}
    averages = {name: weight.clone() for name, weight in run.weights().items() if name.startswith("dense/")}

    def update(*_: Any) -> None:
        dense.step()
        for name, state in sums.items():
            rowwise_adagrad_(run.tables.weight(name), state, 0.05)
        for name, weight in run.weights().items():
            if name in averages:
                averages[name] = 0.9 * averages[name] + 0.1 * weight

    torch.testing.assert_close(losses(path), run.train(update), rtol=0, atol=3e-6)
    found, wanted = last_checkpoint(path), last_checkpoint(reference)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    assert_same_weights(found, averages)
    trained = {name: found[f"dense_optim/{name.removeprefix('dense/')}/trained"] for name in averages}
    assert_same_weights(trained, {name: run.weights()[name] for name in averages})
    assert not any(torch.equal(found[name], trained[name]) for name in averages)
    # What is evaluated in training is what a checkpoint gives to others.
    [again] = pool.run(1, evaluation, reference)
    assert summary.valid == pytest.approx(again, abs=1e-6)


def test_a_run_that_starts_warm_from_averages_trains_them(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    averaged = {"train": {"epochs": 1, "ema": 0.5}}
    first = run_file(tmp_path / "first", data_root, "DeepFM", **averaged)
    pool.run(1, train, first)
    warm = {"warm_start": {"from": str(tmp_path / "first" / "out")}, "optimizer": {"lr": 1e-12}}
    path = run_file(tmp_path / "second", data_root, "DeepFM", **averaged, **warm)
    pool.run(1, train, path)
    before, after = last_checkpoint(first), last_checkpoint(path)
    for name in [name for name in before if name.startswith("dense/") and "running" not in name]:
        if before[name].is_floating_point():
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)
    for name in [name for name in after if name.endswith("/trained")]:
        served = before[f"dense/{name.removeprefix('dense_optim/').removesuffix('/trained')}"]
        torch.testing.assert_close(after[name], served, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "override", "message"),
    [
        ("DeepFM", "train.accumulate=2", "train.accumulate: table 'user' is sharded, .* within each backward pass"),
        ("DeepFM", "embedding.clip_norm=1", "embedding.clip_norm: table 'user' is sharded"),
        ("DeepFM", "embedding.rules=[{tables: '*', frozen: true}]", ""),
        ("DSSM", "objective.negatives=in_batch", "compares rows of the whole batch"),
        ("MMoE", "objective={name: pointwise, task_weighting: gradnorm}", "compares rows of the whole batch"),
    ],
)
def test_what_needs_whole_gradients(data_root: Path, tmp_path: Path, model: str, override: str, message: str) -> None:
    accumulates = model in ("DSSM", "MMoE")
    path = run_file(tmp_path, data_root, model, train={"accumulate": 2 if accumulates else 1})
    config = load_run(path, [override, *(["embedding.sharding=replicated"] if accumulates else [])])
    if not message:
        build(config, device="cpu", world_size=1)
        return
    with pytest.raises(UserError, match=message):
        build(config, device="cpu", world_size=1)


@pytest.mark.parametrize(("model", "sharding"), [("DeepFM", "table_wise"), ("DIN", "row_wise")])
def test_half_precision_between_ranks_is_near(
    pool: RankPool, data_root: Path, tmp_path: Path, model: str, sharding: str
) -> None:
    settings = {"sharding": sharding, "optimizer": {"name": "rowwise_adagrad", "lr": 0.05}}
    half = {"forward": "fp16", "backward": "fp16", "gradient_scale": 64.0}
    path = run_file(tmp_path / "half", data_root, model, embedding={**settings, "communication": half})
    pool.run(2, train, path)
    run = PlainRun(path)
    dense = torch.optim.Adam(run.model.parameters(), lr=0.01)
    sums = {name: torch.zeros(len(run.tables.weight(name))) for name in run.placed}

    def update(*_: Any) -> None:
        dense.step()
        for name, state in sums.items():
            rowwise_adagrad_(run.tables.weight(name), state, 0.05)

    found, wanted = torch.tensor(losses(path)), torch.tensor(run.train(update))
    assert 1e-6 < float((found - wanted).abs().max()) < 2e-2
    assert float((found - wanted).abs().mean()) < 3e-3
    with pytest.raises(UserError, match=r"communication\.forward: bf16 cannot be exchanged on CPU"):
        pool.run(2, train, run_file(tmp_path / "b", data_root, model, embedding={"communication": {"forward": "bf16"}}))
