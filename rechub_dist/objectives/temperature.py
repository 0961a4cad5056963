"""What the scores of a recall model are divided by."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rechub_dist.config import RetrievalConfig

_LEAST = 0.01  # of a learnt one: scores are multiplied by 100 at most (Radford et al. 2021, section 2.5)


class Temperature(nn.Module):
    """A temperature in place of the model's own: scores become score * own / temperature.

    One that is learnt is exp(`log_value`), a parameter, and is kept at 0.01 or above.

    Args:
        config: has a temperature.
        own: what the model's scores have been divided by already.
    """

    def __init__(self, config: RetrievalConfig, own: float) -> None:
        super().__init__()
        self._own = own
        self._fixed: float | None = None
        if config.temperature == "learn":
            start = config.temperature_start or own
            self.log_value = nn.Parameter(torch.tensor(math.log(start)))
        else:
            self._fixed = config.temperature

    @property
    def learnt(self) -> float | None:
        """Its value so far, if it is learnt; the host waits for it."""
        return None if self._fixed is not None else max(_LEAST, math.exp(float(self.log_value)))

    def forward(self) -> Tensor | float:
        """What to multiply scores by, a scalar."""
        if self._fixed is not None:
            return self._own / self._fixed
        if self.training:
            with torch.no_grad():  # the value itself is bounded, so that its gradient does not vanish at the bound
                self.log_value.clamp_(min=math.log(_LEAST))
        return self._own * torch.exp(-self.log_value)
