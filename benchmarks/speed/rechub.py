"""torch-rechub as it is used: its DeepFM and trainer, Adam over everything, one process; it knows no other way."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from handwritten.common import HIDDEN, WIDTH
from speed.shapes import DENSE_LR, Shape, pieces
from speed.turns import Seat, serve


def is_there() -> bool:
    """Whether torch-rechub is installed."""
    return importlib.util.find_spec("torch_rechub") is not None


def loop(pipe: Connection, seat: Seat, shape: Shape, cache: Path, batches: int, loader: bool) -> None:
    """Its DeepFM, which has batch norms and no first-order tables, fed by its own loader or from memory."""
    from torch_rechub.basic.features import DenseFeature, SparseFeature  # noqa: PLC0415 - may not be installed
    from torch_rechub.models.ranking import DeepFM  # noqa: PLC0415
    from torch_rechub.trainers import CTRTrainer  # noqa: PLC0415
    from torch_rechub.utils.data import DataGenerator  # noqa: PLC0415

    torch.set_num_threads(seat.threads)
    torch.manual_seed(0)
    data = shape.data
    sparse = [SparseFeature(name, vocab_size=data.vocabulary, embed_dim=WIDTH) for name in data.names]
    dense = [DenseFeature(name) for name in data.dense_names]
    model = DeepFM(sparse + dense, sparse, mlp_params={"dims": HIDDEN, "dropout": 0.0, "activation": "relu"})
    trainer = CTRTrainer(model, optimizer_params={"lr": DENSE_LR}, n_epoch=1, model_path=str(seat.scratch))
    folder = data.prepare(cache)
    feed: Iterator[Any]
    if loader:
        x, labels = _arrays(next(pieces(folder, batches * shape.batch, range(1))), shape)
        own, *_ = DataGenerator(x, labels).generate_dataloader(x, labels, x, labels, batch_size=shape.batch)
        feed = itertools.chain.from_iterable(itertools.repeat(own))
    else:
        held = []
        for piece in pieces(folder, shape.batch, range(batches)):
            x, labels = _arrays(piece, shape)
            held.append(({name: torch.from_numpy(v) for name, v in x.items()}, torch.from_numpy(labels)))
        feed = itertools.cycle(held)
    serve(pipe, lambda steps: trainer.train_one_epoch(itertools.islice(feed, steps)))


def _arrays(piece: pa.Table, shape: Shape) -> tuple[dict[str, np.ndarray], np.ndarray]:
    x = {name: piece[name].to_numpy().astype(np.int64) for name in shape.data.names}
    x |= {name: piece[name].to_numpy().astype(np.float32) for name in shape.data.dense_names}
    return x, piece["label"].to_numpy().astype(np.float32)
