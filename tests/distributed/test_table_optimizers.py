"""The optimizers of tables against plain torch, over a resume on other ranks; and what cannot be had where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rechub_dist.assembly.code import table_optimizers
from rechub_dist.assembly.parts import build
from rechub_dist.data.run_file import load_run
from rechub_dist.errors import UserError
from rechub_tests.plain import PlainRun, assert_same_weights, rowwise_adagrad_
from rechub_tests.ranks import RankPool
from rechub_tests.representatives import slow
from rechub_tests.runs import config_of, last_checkpoint, losses, run_file, train


def ftrl_(weight: torch.nn.Parameter, z: torch.Tensor, n: torch.Tensor) -> None:
    """FTRL-Proximal of learning rate 0.1, beta 1, l1 0.002 and l2 0.01, for every weight with a gradient."""
    with torch.no_grad():
        for row, column in weight.grad.nonzero().tolist():
            g = weight.grad[row, column]
            z[row, column] += g - ((n[row, column] + g * g).sqrt() - n[row, column].sqrt()) / 0.1 * weight[row, column]
            n[row, column] += g * g
            z_, n_ = z[row, column], n[row, column]
            kept = z_ - torch.sign(z_) * 0.002 if z_.abs() > 0.002 else 0.0
            weight[row, column] = -kept / ((1 + n_.sqrt()) / 0.1 + 0.01)


def momentum_adagrad_(
    weight: torch.nn.Parameter, v: torch.Tensor, n: torch.Tensor, momentum: float, *, lazy: bool = True
) -> None:
    """Adagrad of learning rate 0.05 with momentum, for every row with a gradient."""
    assert weight.grad is not None
    with torch.no_grad():
        for row, grad in enumerate(weight.grad):
            if grad.any() or not lazy:
                n[row] += grad * grad
                v[row] = momentum * v[row] + 0.05 * grad / (n[row].sqrt() + 1e-8)
                weight[row] -= v[row]


WIDE = [
    {"tables": "*.linear", "sharding": "replicated", "optimizer": {"name": "ftrl", "lr": 0.1, "l1": 0.002, "l2": 0.01}}
]
CASES: dict[str, dict[str, Any]] = {
    "ftrl for the wide part": {"optimizer": {"name": "sgd", "lr": 0.1}, "rules": WIDE},
    "momentum": {"sharding": "replicated", "optimizer": {"name": "momentum_sgd", "lr": 0.02, "momentum": 0.8}},
    "momentum of Adagrad": {
        "sharding": "replicated",
        "optimizer": {"name": "momentum_adagrad", "lr": 0.05, "momentum": 0.6, "initial_accumulator": 0.02},
    },
    "accumulators": {
        "optimizer": {"name": "rowwise_adagrad", "lr": 0.05, "initial_accumulator": 0.01},
        "rules": [
            {"tables": "user*", "optimizer": {"name": "adagrad", "lr": 0.05, "initial_accumulator": 0.02}},
            {
                "tables": "item*",
                "sharding": "replicated",
                "optimizer": {"name": "adagrad", "lr": 0.05, "initial_accumulator": 0.02},
            },
            {"tables": "brands*", "sharding": "replicated"},
        ],
    },
    "torch's": {
        "sharding": "replicated",
        "optimizer": {"name": "torch.optim:NAdam", "lr": 0.01, "arguments": {"momentum_decay": 0.01, "eps": 1e-4}},
    },
}


@pytest.mark.parametrize("ranks", [(1, 2), slow((2, 1))])
@pytest.mark.parametrize("case", CASES)
def test_equals_plain_torch(pool: RankPool, data_root: Path, tmp_path: Path, case: str, ranks: tuple[int, int]) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", embedding=CASES[case], train={"epochs": 1, "log_every": 1})
    pool.run(ranks[0], train, path, ["train.max_steps=4"])
    pool.run(ranks[1], train, path)
    run = PlainRun(path)
    dense = torch.optim.Adam(run.model.parameters(), lr=0.01)
    weights = {name: run.tables.weight(name) for name in run.placed}
    torchs: list[torch.optim.Optimizer] = []
    states = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    initial = 0.02 if case == "momentum of Adagrad" else 0.0
    squares = {name: torch.full_like(weight, initial) for name, weight in weights.items()}
    sums = {name: torch.full((len(weight),), 0.01) for name, weight in weights.items()}
    for name, chosen in run.placed.items():
        if chosen.name == "sgd":
            torchs.append(torch.optim.SGD([weights[name]], lr=0.1))
        elif chosen.name == "momentum_sgd":
            torchs.append(torch.optim.SGD([weights[name]], lr=0.02, momentum=0.8))
        elif chosen.name == "adagrad":
            torchs.append(torch.optim.Adagrad([weights[name]], lr=0.05, eps=1e-8, initial_accumulator_value=0.02))
        elif chosen.name == "torch.optim:NAdam":
            torchs.append(torch.optim.NAdam([weights[name]], lr=0.01, momentum_decay=0.01, eps=1e-4))

    def update(*_: Any) -> None:
        for optimizer in (dense, *torchs):
            optimizer.step()
        for name, chosen in run.placed.items():
            if chosen.name == "ftrl":
                ftrl_(weights[name], states[name], squares[name])
            elif chosen.name == "momentum_adagrad":
                momentum_adagrad_(weights[name], states[name], squares[name], 0.6)
            elif chosen.name == "rowwise_adagrad":
                rowwise_adagrad_(weights[name], sums[name], 0.05)

    torch.testing.assert_close(losses(path), run.train(update), rtol=0, atol=3e-5)
    found = last_checkpoint(path)
    assert_same_weights(found, run.weights())
    if case == "ftrl for the wide part":
        linear = found["tables/user.linear/weight"]
        assert 0 < int((linear == 0).sum()) < len(linear)


def test_dense_parameters_with_the_momentum_of_adagrad(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    settings = {"name": "momentum_adagrad", "lr": 0.05, "momentum": 0.4}
    tables = {"optimizer": {"name": "sgd", "lr": 0.1}}
    path = run_file(tmp_path, data_root, "DeepFM", optimizer=settings, embedding=tables, train={"epochs": 1})
    pool.run(1, train, path, ["train.max_steps=4"])
    pool.run(2, train, path)
    run = PlainRun(path)
    parameters = list(run.model.parameters())
    states, squares = ([torch.zeros_like(one) for one in parameters] for _ in range(2))

    def update(*_: Any) -> None:
        for one, v, n in zip(parameters, states, squares, strict=True):
            momentum_adagrad_(one, v, n, 0.4, lazy=False)
        with torch.no_grad():
            for name in run.placed:
                run.tables.weight(name).add_(run.tables.weight(name).grad, alpha=-0.1)

    torch.testing.assert_close(losses(path), run.train(update), rtol=0, atol=3e-5)
    assert_same_weights(last_checkpoint(path), run.weights())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("embedding.optimizer.name=ftrl", "no fused kernel of ftrl for sharded tables; use .*replicate the table"),
        ("embedding.optimizer.name=momentum_sgd", "no fused kernel of momentum_sgd"),
        ("embedding.optimizer.name=torch.optim:RAdam", "no fused kernel of torch.optim:RAdam"),
        ("embedding.optimizer.name=partial_rowwise_adam", "fused Adam .partial_rowwise_adam. is not available on CPU"),
        ("embedding.optimizer.name=adagrd", "did you mean 'adagrad'"),
        (
            "embedding.optimizer={name: sgd, momentum: 0.5}",
            "momentum is for momentum_sgd, momentum_adagrad, not for sgd",
        ),
        ("optimizer={name: adam, momentum: 0.5}", "momentum is for momentum_adagrad, not for adam"),
        ("embedding.optimizer={name: ftrl, weight_decay: 0.5}", "ftrl takes no weight_decay; write l1 and l2 instead"),
        ("embedding.optimizer={name: adam, arguments: {a: 1}}", "arguments are for a package.module:Class"),
        ("embedding.optimizer={name: 'torch.optim:RAdm'}", "has no 'RAdm': did you mean 'RAdam'"),
        ("embedding.optimizer={name: 'torch.optim:RAdam', betas: [0.5, 0.5]}", "write embedding.optimizer.arguments"),
        (
            "embedding.rules=[{tables: '*', optimizer: {name: 'torch.optim:RAdam', arguments: {bets: 1}}}]",
            r"embedding\.rules\.0\.optimizer\.arguments\.bets",
        ),
    ],
)
def test_what_cannot_be_had(data_root: Path, tmp_path: Path, override: str, message: str) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", embedding={"optimizer": {"lr": 0.05}})

    def made() -> None:
        config = load_run(path, [override])
        table_optimizers(config)
        build(config, device="cpu", world_size=1)

    with pytest.raises(UserError, match=message):
        made()


def test_each_optimizer_is_found_by_its_settings(data_root: Path, tmp_path: Path) -> None:
    rules = [{"tables": "user", "optimizer": {"name": "torch.optim:RAdam", "lr": 0.3}}]
    own = {"name": "torch.optim:NAdam", "lr": 0.2}
    config = config_of(
        run_file(tmp_path, data_root, "DeepFM", embedding={"sharding": "replicated", "optimizer": own, "rules": rules})
    )
    make = table_optimizers(config)
    weights = [torch.nn.Parameter(torch.ones(2))]
    for name, placed in build(config, device="cpu", world_size=1).layout.tables.items():
        maker = make(placed.optimizer)
        assert maker is not None
        assert type(maker(weights)) is (torch.optim.RAdam if name == "user" else torch.optim.NAdam)
