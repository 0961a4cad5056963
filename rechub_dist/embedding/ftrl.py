"""FTRL-Proximal for tables in plain torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class Ftrl(torch.optim.Optimizer):
    """FTRL-Proximal (McMahan et al. 2013, "Ad click prediction: a view from the trenches", algorithm 1).

    Per weight w with gradient g and learning rate a:

        s = (sqrt(n + g^2) - sqrt(n)) / a;  z += g - s w;  n += g^2
        w = 0 where |z| <= l1, else -(z - sign(z) l1) / ((beta + sqrt(n)) / a + l2)

    A weight whose gradient is zero stays as it is, and so may start from anything. A learning rate of zero changes
    nothing.

    Args:
        lr: a.
        beta: makes the first steps smaller.
        l1, l2: the regularisations' weights; l1 makes weights exactly zero.
        initial_accumulator: of n.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        beta: float = 1.0,
        l1: float = 0.0,
        l2: float = 0.0,
        initial_accumulator: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "l1": l1, "l2": l2})
        for group in self.param_groups:
            for parameter in group["params"]:
                z = torch.zeros_like(parameter)
                self.state[parameter] = {"z": z, "n": torch.full_like(parameter, initial_accumulator)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002 - no loss is computed here
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            if not group["lr"]:
                continue
            for parameter in group["params"]:
                if (grad := parameter.grad) is None:
                    continue
                z, n = self.state[parameter]["z"], self.state[parameter]["n"]
                root, squared = n.sqrt(), grad.square()
                n.add_(squared)
                new_root = n.sqrt()
                z.add_(grad - (new_root - root) / group["lr"] * parameter)
                shrunk = z.sign() * (z.abs() - group["l1"]).clamp(min=0)
                weight = -shrunk / ((group["beta"] + new_root) / group["lr"] + group["l2"])
                parameter.copy_(torch.where(grad != 0, weight, parameter))
