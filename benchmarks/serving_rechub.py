"""Exports torch-rechub's own DIN, of the sizes of `serving.py`, by its own exporter. Needs not this package.

    python serving_rechub.py din.onnx

Weights are as they are drawn: what is measured is time. Its DIN has no room for dense features: it has none here.
"""

from __future__ import annotations

import sys

from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.models.ranking import DIN
from torch_rechub.utils.onnx_export import ONNXExporter

SPARSE, ROWS, DIM, LENGTH = 10, 100_000, 16, 20

if __name__ == "__main__":
    features = [SparseFeature(f"sparse_{i}", ROWS, DIM) for i in range(SPARSE)]
    target = [SparseFeature("item", ROWS, DIM)]
    history = [SequenceFeature("history", ROWS, DIM, pooling="concat", shared_with="item")]
    model = DIN(
        features, history, target, {"dims": [200, 80], "dropout": 0.0}, {"dims": [64, 16], "activation": "dice"}
    )
    ONNXExporter(model).export(sys.argv[1], batch_size=3, seq_length=LENGTH, opset_version=18)
