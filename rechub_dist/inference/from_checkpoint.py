"""A trained run whose tables stay in its checkpoint: of these it has in memory the rows that it is told to hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rechub_dist.assembly.parts import OF_OBJECTIVE, Parts, Plan, TrainModule, plan
from rechub_dist.assembly.readers import evaluation_batch_size
from rechub_dist.batch import Batch
from rechub_dist.checkpoint.find import find_checkpoint
from rechub_dist.checkpoint.folder import Folder
from rechub_dist.checkpoint.load import read_rows, read_some
from rechub_dist.checkpoint.manifest import CheckpointManifest
from rechub_dist.checkpoint.trained import trained_config
from rechub_dist.data.rows import RowEncoder
from rechub_dist.data.spec import BatchSpec
from rechub_dist.distributed.runtime import alone
from rechub_dist.embedded import Embedded
from rechub_dist.embedding.layout import REPLICATED, Layout
from rechub_dist.embedding.local import module_key
from rechub_dist.embedding.stage import EmbeddingStage
from rechub_dist.errors import UserError, nearest
from rechub_dist.evaluation.evaluate import calibrate
from rechub_dist.features import DenseFeature
from rechub_dist.inference.run import Run, in_one_process

ReadTable = Callable[[str, Tensor], Tensor]  # a table's name, and ids, ascending -> their vectors


class HeldRows(EmbeddingStage):
    """An embedding stage that has those rows of its tables in memory that some batches read.

    Args:
        layout: of replicated tables alone.
        dense: features.
        read: reads rows of a table.
    """

    def __init__(self, layout: Layout, dense: tuple[DenseFeature, ...], read: ReadTable) -> None:
        unfilled = (replace(lookup, table=replace(lookup.table, init_std=0.0)) for lookup in layout.lookups)
        with torch.device("meta"):
            super().__init__(replace(layout, lookups=tuple(unfilled)), dense, 0)
        self._read = read
        self._tables = {f: p.table.name for p in layout.tables.values() for f in p.features}
        self._held: dict[str, Tensor] = {}
        self.one_by_one = False  # whether each batch is held as it comes

    def hold(self, batches: Sequence[Batch]) -> None:
        """Hold the rows that these batches read, and no others."""
        assert self.replicated is not None
        for name, placed in self.layout.tables.items():
            read = [batch.jagged[REPLICATED][feature].values() for feature in placed.features for batch in batches]
            ids = torch.cat(read).unique()
            weight = torch.zeros(max(1, len(ids)), placed.table.stored_dim)
            weight[: len(ids), : placed.table.dim] = self._read(name, ids)
            self._held[name] = ids
            self.replicated.local.tables[module_key(name)].weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, batch: Batch) -> Embedded:
        """As an `EmbeddingStage`, for the batches whose rows it holds."""
        if self.one_by_one:
            self.hold([batch])
        given = batch.jagged[REPLICATED]
        features = given.to_dict()
        places = [torch.searchsorted(self._held[self._tables[key]], features[key].values()) for key in given.keys()]  # noqa: SIM118
        held = KeyedJaggedTensor(given.keys(), torch.cat(places), lengths=given.lengths(), stride=given.stride())
        return super().forward(replace(batch, jagged={REPLICATED: held}))


def hold(parts: Parts, batches: Sequence[Batch]) -> None:
    """Have the rows of tables in memory that these batches read, where they are not all there."""
    if isinstance(parts.train_module.stage, HeldRows):
        parts.train_module.stage.hold(batches)


def batches_of(run: Run, rows: pa.Table, spec: BatchSpec) -> list[Batch]:
    """Rows as the run's stage takes them, which holds what they read of its tables."""
    encoded = RowEncoder(spec).batches(rows, evaluation_batch_size(run.config))
    batches = [batch.to(run.runtime.device) for batch in encoded]
    hold(run.parts, batches)
    return batches


def open_run(
    output_dir: str,
    settings: Iterable[str] = (),
    allowed_code: Iterable[str] = (),
    wanted: Literal["best"] | int = "best",
) -> Run:
    """The best weights of a run, as `load`; its tables are read when `hold` says which of their rows. On the CPU.

    `wanted` is the step of another checkpoint.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    config = in_one_process(trained_config(output_dir, settings, allowed_code=allowed_code), "cpu")
    folder, manifest = find_checkpoint(str(config.checkpoint.folder or config.output_dir), config.storage, wanted)
    found = plan(config, device="cpu", world_size=1)
    load_dense(found, folder, manifest)

    def read(table: str, ids: Tensor) -> Tensor:
        return read_some(folder, manifest, f"tables/{table}/weight", ids)

    stage = HeldRows(found.layout, found.model.dense_features(), read)
    train_module = TrainModule(stage, found.model, found.objective, 1).eval()
    run = Run(config, Parts(**vars(found), train_module=train_module), alone(torch.device("cpu")), manifest.step)
    stage.one_by_one = True
    calibrate(run.parts, run.runtime)
    stage.one_by_one = False
    return run


def load_dense(found: Plan, folder: Folder, manifest: CheckpointManifest) -> None:
    """Fill the model's parameters and buffers from the checkpoint, and what is learnt of the objective."""
    own = {f"{OF_OBJECTIVE}{name}": value for name, value in found.objective.learned().items()}
    state: dict[str, Any] = {**found.model.state_dict(), **own}
    for name, value in state.items():
        key = next((k for k in (f"dense/model.{name}", f"dense/{name}") if k in manifest.tensors), None)
        if key is None:
            raise UserError(f"{folder.address}: the checkpoint has no {name}: {nearest(name, manifest.tensors)}")
        rows = torch.cat([block.view(-1) for block in read_rows(folder, manifest, key)] or [value.new_zeros(0)])
        with torch.no_grad():
            value.copy_(rows.view(value.shape))
