"""Adagrad with momentum in plain torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class MomentumAdagrad(torch.optim.Optimizer):
    """Adagrad whose steps have momentum, as GRU4Rec's code trains (Hidasi & Karatzoglou 2018).

    Per weight w with gradient g: n += g^2; v = momentum v + lr g / (sqrt(n) + eps); w -= v.

    Args:
        lr: base learning rate; a change of it leaves v as it is.
        momentum: 0 is Adagrad.
        eps: in the divisor.
        weight_decay: times the weight, is added to the gradient.
        initial_accumulator_value: of n.
        lazy: rows of matrices whose gradient is zero keep their weights and v: those of a table that no batch has
            looked up.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        *,
        lazy: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay})
        self._lazy = lazy
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "sum": torch.full_like(parameter, initial_accumulator_value),
                    "momentum_buffer": torch.zeros_like(parameter),
                }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002 - no loss is computed here
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if (grad := parameter.grad) is None:
                    continue
                trained = (grad != 0).any(dim=1, keepdim=True) if self._lazy else None
                if group["weight_decay"]:
                    grad = grad.add(parameter, alpha=group["weight_decay"])
                n, velocity = self.state[parameter]["sum"], self.state[parameter]["momentum_buffer"]
                squares = n + grad.square()
                step = group["momentum"] * velocity + group["lr"] * grad / (squares.sqrt() + group["eps"])
                if trained is None:
                    n.copy_(squares)
                    velocity.copy_(step)
                    parameter.sub_(step)
                else:
                    n.copy_(torch.where(trained, squares, n))
                    velocity.copy_(torch.where(trained, step, velocity))
                    parameter.sub_(torch.where(trained, step, 0.0))
