"""Makes a checkpoint of a run from weights that something else has trained."""

from __future__ import annotations

from pathlib import Path

import xxhash

from rechub_dist.assembly.identity import identity
from rechub_dist.assembly.parts import build, plan
from rechub_dist.builds import require_builds
from rechub_dist.checkpoint import Position, open_checkpoints
from rechub_dist.checkpoint.lease import Lease
from rechub_dist.checkpoint.state import local_weights_state, placement
from rechub_dist.config import EmbeddingConfig, RunConfig, TableOptimizerConfig
from rechub_dist.distributed.runtime import runtime
from rechub_dist.embedding.layout import REPLICATED
from rechub_dist.errors import UserError
from rechub_dist.inference.torch_rechub import fill
from rechub_dist.training.output import make_output, refuse_foreign


def convert(weights: Path, config: RunConfig) -> None:
    """Write a checkpoint of step 0, and config.yaml, into the run's output folder; no data is read.

    Args:
        weights: a file of torch-rechub's `torch.save(model.state_dict(), ...)`.
        config: of the run whose model they are to be.

    Raises:
        UserError: the weights do not fit, the folder has checkpoints already, or cannot be written.
    """
    require_builds()
    # Whole tables in plain torch; without states of optimizers, which the file has not.
    whole = EmbeddingConfig(dim=config.embedding.dim, sharding=REPLICATED, optimizer=TableOptimizerConfig(name="sgd"))
    local = config.model_copy(update={"embedding": whole, "device": "cpu"})
    parts = build(local, device="cpu", world_size=1)
    assert parts.train_module.stage.replicated is not None  # there is no model without tables
    tables = parts.train_module.stage.replicated.local
    by_name = {name: tables.weight(name).data[:, : placed.table.dim] for name, placed in parts.layout.tables.items()}
    fill(weights, parts.train_module.model, by_name)
    trained = f"weights of torch-rechub, {xxhash.xxh3_128_hexdigest(weights.read_bytes())}"
    record = {
        "identity": identity(plan(config, device="cuda", world_size=1), trained),  # wherever its tables may lie
        "config": config.dump(),
        "tables": placement(parts.layout),
    }
    with runtime("cpu", config.distributed.timeout_seconds, config.distributed.threads) as rt:
        lease = Lease(config, rt)
        try:
            checkpoints = open_checkpoints(config, rt, lease)
            if steps := checkpoints.steps():
                raise UserError(
                    f"{checkpoints.folder.address} has a checkpoint of step {steps[-1]} already, which is not "
                    "replaced; choose another --out"
                )
            refuse_foreign(config.output_dir)
            lease.take()
            make_output(config, rt)
            checkpoints.save(local_weights_state(parts.train_module, parts.layout), Position(), record)
            checkpoints.check_last()
        finally:
            lease.release()
