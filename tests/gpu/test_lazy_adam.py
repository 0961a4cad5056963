"""`lazy_adam`, which CUDA alone has: as a plain Adam that moves looked-up rows only; saved, resumed, undisturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from rechub_dist.embedding import optim
from rechub_tests.ranks import RankPool
from rechub_tests.runs import last_checkpoint, losses, run_file, train

STEPS = 50


class RowAdam(torch.optim.Adam):
    """Adam that leaves a row alone, with its moments, in steps without a gradient for it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move the rows that have a gradient; the count for the bias correction is that of all steps."""
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                count, rows = float(state["step"]), parameter.grad.abs().sum(dim=1) > 0
                gradient, first, second = parameter.grad[rows], state["exp_avg"], state["exp_avg_sq"]
                first[rows] = beta1 * first[rows] + (1 - beta1) * gradient
                second[rows] = beta2 * second[rows] + (1 - beta2) * gradient.square()
                scale = (second[rows] / (1 - beta2**count)).sqrt() + group["eps"]
                parameter[rows] -= group["lr"] * (first[rows] / (1 - beta1**count)) / scale


def train_by_rows(path: Path) -> None:
    """Train with `RowAdam` where the run file says adam."""
    with mock.patch.dict(optim._DENSE, {"adam": RowAdam}):
        train(path)


def run_of(folder: Path, root: Path, device: str, table: dict[str, Any], **sections: Any) -> Path:
    more = {
        "device": device,
        "embedding": table,
        "optimizer": {"name": "adamw", "lr": 0.002},  # of the dense parameters: not what RowAdam stands for
        "data": {"valid": None, "test": None},
        "train": {"epochs": 6, "max_steps": STEPS},
        "checkpoint": {"every_steps": 25},
    }
    return run_file(folder, root, "DeepFM", **{**more, **sections})


def by_rows(folder: Path, root: Path) -> Path:
    return run_of(folder, root, "cpu", {"sharding": "replicated", "optimizer": {"name": "adam", "lr": 0.005}})


def fused(folder: Path, root: Path, **sections: Any) -> Path:
    table = {"sharding": "table_wise", "optimizer": {"name": "lazy_adam", "lr": 0.005}}
    return run_of(folder, root, "cuda", table, **sections)


def test_the_reference() -> None:
    """Where every row has a gradient it is Adam; a row without one stays, while Adam's momentum moves it on."""
    torch.manual_seed(0)
    start = torch.randn(5, 3)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    by_row, adam = RowAdam([ours], lr=0.1), torch.optim.Adam([theirs], lr=0.1)
    optim._init_state(by_row)
    for step in range(4):
        gradient = torch.randn(5, 3)
        if step == 3:
            gradient[2] = 0
        before = ours[2].detach().clone()
        for parameter, optimizer in ((ours, by_row), (theirs, adam)):
            parameter.grad = gradient.clone()
            optimizer.step()
        others = [0, 1, 3, 4]
        torch.testing.assert_close(ours[others], theirs[others])
        assert torch.equal(ours[2], before) == (step == 3)
        assert torch.allclose(ours[2], theirs[2]) == (step < 3)


@pytest.mark.gpu
def test_losses_weights_and_states(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    expected, found = by_rows(tmp_path / "rows", data_root), fused(tmp_path / "fused", data_root)
    pool.run(1, train_by_rows, expected)
    pool.run(1, train, found)
    assert len(losses(found)) == STEPS
    torch.testing.assert_close(losses(found), losses(expected), rtol=0, atol=1e-5)
    wanted, saved = last_checkpoint(expected), last_checkpoint(found)
    for name in ("user", "item", "tags", "item.linear"):
        for state in ("weight", "exp_avg", "exp_avg_sq"):
            key = f"tables/{name}/{state}"
            assert wanted[key].norm() > 0, key
            # the smallest gradients are rounding errors, so tables are compared as wholes
            assert (saved[key] - wanted[key]).norm() < 1e-2 * wanted[key].norm(), key


@pytest.mark.gpu
def test_resumed(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    whole, cut = (fused(tmp_path / name, data_root) for name in ("whole", "cut"))
    pool.run(1, train, whole)
    pool.run(1, train, cut, ["train.max_steps=25"])
    assert len(losses(cut)) == 25
    pool.run(1, train, cut)
    assert losses(cut) == losses(whole)
    wanted, found = last_checkpoint(whole), last_checkpoint(cut)
    assert wanted.keys() == found.keys()
    assert not [key for key, value in wanted.items() if not torch.equal(value, found[key])]


@pytest.mark.gpu
def test_evaluations_change_nothing(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    """The kernel counts their lookups, too, and the bias correction follows from its count."""
    plain = fused(tmp_path / "plain", data_root)
    steps = {"epochs": 6, "max_steps": STEPS, "eval_every": 7}
    evaluated = fused(tmp_path / "evaluated", data_root, data={"test": None}, train=steps)
    for path in (plain, evaluated):
        pool.run(1, train, path)
    assert losses(evaluated) == losses(plain)
