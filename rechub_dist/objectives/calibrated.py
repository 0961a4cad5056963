"""Calibration as modules: what evaluation, prediction and exported graphs apply to predicted probabilities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rechub_dist.metrics.calibrate import EDGE, SMALLEST, Curve, Temperature


class Calibrator(nn.Module):
    """A calibration of probabilities [N], of C classes [N, C], which stay in their type; see `metrics.calibrate`."""

    scores: Tensor
    probabilities: Tensor

    def __init__(self, calibration: Temperature | Curve) -> None:
        super().__init__()
        self.temperature = calibration.temperature if isinstance(calibration, Temperature) else None
        points = (calibration.scores, calibration.probabilities) if isinstance(calibration, Curve) else ((), ())
        for name, values in zip(("scores", "probabilities"), points, strict=True):
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float32))

    def forward(self, probabilities: Tensor) -> Tensor:
        if self.temperature is not None:
            if probabilities.dim() == 2:
                return (probabilities.clamp(min=SMALLEST).log() / self.temperature).softmax(dim=1)
            clipped = probabilities.clamp(EDGE, 1 - EDGE)
            return (torch.logit(clipped) / self.temperature).sigmoid()
        if len(self.scores) == 1:
            return probabilities * 0 + self.probabilities[0]
        # By comparison: what finds a place in a sorted list is no operator of ONNX.
        after = (probabilities[:, None] >= self.scores).sum(dim=1).clamp(1, len(self.scores) - 1)
        x0, x1 = self.scores[after - 1], self.scores[after]
        y0, y1 = self.probabilities[after - 1], self.probabilities[after]
        share = ((probabilities - x0) / (x1 - x0)).clamp(0, 1)
        return y0 + share * (y1 - y0)
