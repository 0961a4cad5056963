"""A trained run in one process: its weights whole, and what the command line does with them, for rows in memory too."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from rechub_dist.assembly.identity import vocabularies_of
from rechub_dist.assembly.parts import Parts, build
from rechub_dist.assembly.readers import (
    evaluation_batch_size,
    evaluation_reader,
    items_spec,
    prediction_reader,
    prediction_spec,
)
from rechub_dist.batch import Batch
from rechub_dist.builds import require_builds
from rechub_dist.checkpoint import open_checkpoints
from rechub_dist.checkpoint.state import local_weights_state
from rechub_dist.checkpoint.trained import trained_config
from rechub_dist.config import EmbeddingConfig, RunConfig, TableOptimizerConfig
from rechub_dist.data.given import like
from rechub_dist.data.rows import RowEncoder
from rechub_dist.data.stored import StoredRows
from rechub_dist.distributed.runtime import Runtime, alone, device_type
from rechub_dist.embedding.layout import REPLICATED
from rechub_dist.errors import UserError
from rechub_dist.evaluation.batches import agreed_batches
from rechub_dist.evaluation.evaluate import calibrate, evaluate
from rechub_dist.evaluation.ranking import batch_of_items
from rechub_dist.inference.predict import Origins, catalogue_if_any, predicted, user_vectors, words
from rechub_dist.metrics.ranking import Catalogue
from rechub_dist.objectives import Ranking
from rechub_dist.reporting.reporter import Reporter
from rechub_dist.skips import Tally


def load(
    output_dir: str | Path,
    device: Literal["auto", "cpu", "cuda"] = "cpu",
    overrides: Mapping[str, Any] | None = None,
    *,
    settings: Iterable[str] = (),
    allowed_code: Iterable[str] = (),
    step: int | None = None,
) -> Run:
    """The best weights of a trained run (its newest, where none are best), whole in this process.

    No process group is made: under torchrun each rank that calls this has all tables. For data that one process is too
    slow for, or tables that it has no room for, there is `rechub-dist predict --nproc`.

    Args:
        output_dir: of the run, or its folder of checkpoints; path or address.
        device: where the model computes, and its tables lie.
        overrides: dotted keys with other values than in training: `{"data.root": "/new/place"}`.
        settings: the same as text, `data.root=/new/place`.
        allowed_code: modules of the run's own classes, which may be imported.
        step: of another checkpoint than the best.

    Raises:
        UserError: there is no checkpoint, the newest one is damaged, or a vocabulary is not that of the training.
    """
    require_builds()
    kind = device_type(device)
    trained = trained_config(str(output_dir), [*as_settings(overrides), *settings], allowed_code=allowed_code)
    config = in_one_process(trained, kind)
    rt = alone(torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu"))
    with random_state_kept():
        parts = build(config, device=kind, world_size=1)
    parts.train_module.to(rt.device).eval()
    checkpoints = open_checkpoints(config, rt)
    step = checkpoints.load_best(local_weights_state(parts.train_module, parts.layout), vocabularies_of(parts), step)
    calibrate(parts, rt)
    return Run(config, parts, rt, step)


def in_one_process(trained: RunConfig, device: Literal["cpu", "cuda"]) -> RunConfig:
    """The configuration for whole tables in plain torch, which need no groups, wherever they lay in training."""
    whole = EmbeddingConfig(dim=trained.embedding.dim, sharding=REPLICATED, optimizer=TableOptimizerConfig(name="sgd"))
    return trained.model_copy(update={"embedding": whole, "device": device})


class Run:
    """A trained run; made by `load`.

    Rows are a pandas DataFrame, an Arrow table, a dict of columns, or the path or address of Parquet files. Their
    columns are those of the training data, as they are there: ids and strings become table ids by the run's own
    vocabularies and hashes, numbers go through its transforms; derived columns may be left out where they can be
    computed. Of an encoded feature, rows in memory hold values, files ids. Labels are not needed. What is found for
    rows in memory comes in their order and as what they are (a DataFrame keeps its index), for files as an Arrow table.

    Every method raises UserError, one line, for rows that do not fit.

    Attributes:
        config: of the training, but for `device` and the placement of tables.
        step: that the weights are of.
        parts: with the weights.
        runtime: of this process.
    """

    def __init__(self, config: RunConfig, parts: Parts, rt: Runtime, step: int) -> None:
        self.config = config
        self.step = step
        self.parts = parts
        self.runtime = rt

    @property
    def calibrators(self) -> dict[str, nn.Module]:
        """What calibrates its probabilities, by name: modules of [B], where `evaluation.calibration` is set."""
        return self.parts.train_module.objective.calibrators

    def __repr__(self) -> str:
        return f"<{self.config.model.name} of {self.config.output_dir}, step {self.step}, on {self.runtime.device}>"

    def predict(self, rows: Any, *, keep: tuple[str, ...] = (), top_k: int = 100) -> Any:
        """What the model says of each row, as `rechub-dist predict` writes it.

        Args:
            rows: see the class.
            keep: of files, columns to copy.
            top_k: items a row, of a recall model.

        Returns:
            `predicted_<label>`, float32, a probability or value, of C classes a list of C; of a recall model
            `predicted_items`, the best first, and `predicted_scores`. For files also `source_file`, `source_row` and
            the columns to keep.
        """
        if top_k < 1:
            raise UserError(f"top_k: must be at least 1, got {top_k}")
        if isinstance(rows, str | Path):
            return self._of_files(str(rows), tuple(keep), top_k)
        if keep:
            raise UserError("keep: is for files; predictions of rows in memory come in the rows' order")
        return self._of_rows(rows, lambda batch: predicted(self.parts, batch, self._catalogue, top_k, self.runtime))

    def top_k(self, users: Any, k: int = 10) -> Any:
        """The `k` best items of the whole catalogue for each row: `predict` of a recall model.

        Left out are the items of the row's history, unless the run's `evaluation.exclude_seen` is false.
        """
        self._recall("top_k")
        return self.predict(users, top_k=k)

    def vectors(self, side: Literal["item", "user"], rows: Any = None) -> Any:
        """A recall model's vectors: a user's score for an item is the largest inner product with one of the user's.

        Args:
            side: `user` for the vectors of users; `item` for those of items.
            rows: in memory. Users need their own columns, items theirs. Without rows: the whole catalogue.

        Returns:
            Of users `vectors`, a list of vectors in each row: one for most models, several for MIND, none
            for a user without a history. Of items `vector`; of the catalogue, an Arrow table, also `item`: the id, or
            the word that stands for it in the data. Vectors are float32, all of one width.
        """
        ranking = self._recall("vectors")
        if side == "user":
            if rows is None:
                raise UserError("vectors('user'): give the users' rows")
            return self._of_rows(rows, lambda batch: {"vectors": _lists(*user_vectors(self.parts, batch))})
        if side != "item":
            raise UserError(f"vectors: the side is 'item' or 'user', not {side!r}")
        if rows is not None:
            encoder = RowEncoder(items_spec(ranking, self.parts.spec).of_values())
            return self._of_rows(rows, lambda batch: self._items(batch, ranking), encoder)
        catalogue = self._catalogue
        assert catalogue is not None
        ids = (catalogue.place >= 0).nonzero()[:, 0].cpu()
        vectors = catalogue.vectors[catalogue.place[catalogue.place >= 0]]
        return pa.table({"item": words(ids, ranking), "vector": _fixed(vectors)})

    def evaluate(self, data: str | Path) -> dict[str, float]:
        """The metrics on files with labels, as `rechub-dist evaluate --json` prints them: `step`, `rows`, metrics."""
        parts, rt = self.parts, self.runtime
        reader = evaluation_reader(self.config, parts, rt, str(data))
        report = Reporter(None, quiet=False)
        report.start(f"evaluating {data}", reader.steps)
        try:
            found = evaluate(parts, reader, rt, report.advance)
            report.skipped(str(data), self.step, (*reader.manifest.left_out, *found.skips))
        finally:
            report.close()
        return {"step": self.step, **found.counts, **found.metrics}

    @cached_property
    def _catalogue(self) -> Catalogue | None:
        with torch.no_grad():
            return catalogue_if_any(self.parts, self.runtime)

    @cached_property
    def _encoder(self) -> RowEncoder:
        return RowEncoder(prediction_spec(self.parts).of_values())

    def _recall(self, what: str) -> Ranking:
        ranking = self.parts.train_module.objective.ranking
        if ranking is None:
            raise UserError(f"{what}: {self.config.model.name} is no recall model; use predict")
        return ranking

    def _of_rows(self, rows: Any, found_of: Any, encoder: RowEncoder | None = None) -> Any:
        """The columns that `found_of` makes of each batch, for rows in memory."""
        if isinstance(rows, str | Path):
            raise UserError(f"vectors: wants rows in memory, not the path {rows}; read it with pyarrow or pandas")
        batches = (encoder or self._encoder).batches(rows, evaluation_batch_size(self.config))
        with torch.no_grad():
            pieces = [pa.table(found_of(batch.to(self.runtime.device))) for batch in batches]
        return like(rows, pa.concat_tables(pieces).combine_chunks())

    def _of_files(self, data: str, keep: tuple[str, ...], top_k: int) -> pa.Table:
        parts, rt = self.parts, self.runtime
        reader = prediction_reader(self.config, parts, rt, data)
        origins, stored = Origins(keep, parts, reader.manifest), StoredRows(reader, 0)
        report = Reporter(None, quiet=False)
        report.start(f"predicting {data}", reader.steps)
        pieces = []
        try:
            with torch.no_grad():
                batches = agreed_batches(reader, rt, report.advance, lambda: False, Tally(), [])
                for number, batch in enumerate(batches):
                    found = predicted(parts, batch.to(rt.device), self._catalogue, top_k, rt)
                    pieces.append(origins.of(stored.of(number), found))
        finally:
            origins.close()
            report.close()
        return pa.concat_tables([piece for piece in pieces if piece is not None]).combine_chunks()

    def _items(self, batch: Batch, ranking: Ranking) -> dict[str, pa.Array]:
        whole = batch_of_items(batch.to(torch.device("cpu")), self.parts, ranking)
        return {"vector": _fixed(ranking.vectors(self.parts.train_module.stage(whole.to(self.runtime.device))))}


def as_settings(overrides: Mapping[str, Any] | None) -> list[str]:
    """Values of dotted keys as `--set` takes them, `key=value`."""
    return [f"{key}={json.dumps(value, default=str, ensure_ascii=False)}" for key, value in (overrides or {}).items()]


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Torch's generators, which building a run seeds, are afterwards where they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield


def _fixed(vectors: Tensor) -> pa.Array:
    """[n, D] as n lists of D."""
    flat = pa.array(vectors.float().cpu().numpy().reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def _lists(vectors: Tensor, live: Tensor) -> pa.Array:
    """The live ones of [B, Q, D] as B lists of vectors."""
    offsets = np.zeros(len(vectors) + 1, np.int32)
    np.cumsum(live.sum(dim=1).cpu().numpy(), out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), _fixed(vectors[live]))
