"""Weight decay of replicated tables: of the rows that a step looks up, as the fused kernels do it for sharded ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from rechub_dist.config import TableOptimizerConfig
from rechub_dist.embedding.local import LocalTables


class ReplicatedDecay:
    """Decays the rows of replicated tables that were looked up since `clear`, on any rank.

    With learning rate r and weight decay c, `l2` adds c times the weights to the rows' gradients, `decoupled`
    multiplies the rows by 1 - r c. A row that was looked up twice decays once; one that was looked up decays even if
    its gradient is zero.

    Args:
        local: the replicated tables.
        tables: the optimizers of those that decay.
        looked_up: by table, bool [rows], which rows this rank has looked up.
        group: the ranks.
    """

    def __init__(
        self,
        local: LocalTables,
        tables: Mapping[str, TableOptimizerConfig],
        looked_up: Mapping[str, Tensor],
        group: dist.ProcessGroup | None,
    ) -> None:
        self._tables = tables
        self._weights = {name: local.weight(name) for name in tables}
        self._looked_up = looked_up
        self._group = group

    def clear(self) -> None:
        """Forget what was looked up."""
        for rows in self._looked_up.values():
            rows.zero_()

    @torch.no_grad()
    def apply(self, rates: Mapping[str, float]) -> None:
        """Decay the rows, given the tables' learning rates; before the optimizers' step. Collective."""
        rows = torch.cat([self._looked_up[name] for name in self._tables]).to(torch.uint8)
        dist.all_reduce(rows, dist.ReduceOp.MAX, group=self._group)
        parts = rows.split([len(weight) for weight in self._weights.values()])
        for (name, config), part in zip(self._tables.items(), parts, strict=True):
            weight, here = self._weights[name], part[:, None].to(torch.float32)
            if config.decay == "decoupled":
                weight.mul_(1 - rates[name] * config.weight_decay * here)
            else:
                assert weight.grad is not None
                weight.grad.add_(here * weight, alpha=config.weight_decay)
