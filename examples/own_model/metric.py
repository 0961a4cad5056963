"""What it brings to act on the predictions: of each row that is chosen, a gain or a cost."""

import torch

from rechub_dist.distributed.runtime import Runtime
from rechub_dist.metrics.metric import Scored


class Profit:
    """Mean over all rows of `gain` for each chosen positive less `cost` for each chosen negative."""

    direction = "max"
    group = None  # no column to group rows by

    def __init__(self, threshold: float = 0.5, gain: float = 1.0, cost: float = 1.0) -> None:
        self.threshold, self.gain, self.cost = threshold, gain, cost
        self.sums = torch.zeros(2, dtype=torch.float64)

    def update(self, rows: Scored) -> None:
        """Add rows of this rank."""
        chosen = (rows.predictions >= self.threshold) * rows.weights
        worth = rows.targets * self.gain - (1 - rows.targets) * self.cost
        self.sums += torch.tensor([chosen @ worth, rows.weights.sum()], dtype=torch.float64)

    def merge(self, ranks: Runtime) -> None:
        """Add the ranks' sums."""
        self.sums = ranks.all_reduce_sum(self.sums)

    def compute(self) -> float:
        """Profit a row."""
        profit, rows = self.sums.tolist()
        return profit / rows if rows else float("nan")
