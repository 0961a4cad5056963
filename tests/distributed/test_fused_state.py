"""The state of fused optimizers: all of it is in a checkpoint, and what is not known is an error.

Fused Adam runs on CUDA alone. Its kernel can be built on CPU where asserts are off, which is enough for its state.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rechub_dist.checkpoint.state import fused_states
from rechub_tests.runs import run_file

ADAM = """
import sys
from pathlib import Path

import torch

import rechub_dist.embedding.layout as layout
from rechub_dist.data.run_file import load_run
from rechub_dist.embedding.optim import kernels
from rechub_dist.distributed.runtime import runtime
from rechub_dist.checkpoint.state import train_state
from rechub_dist.training.trainer import Trainer

refuse = layout._refuse
layout._refuse = lambda placed, device: refuse(placed, "cuda")
config = load_run(Path(sys.argv[1]))


def opened(rt):
    trainer = Trainer(config, rt)
    state = train_state(trainer.module, trainer.parts.layout, trainer.optimizers)
    trainer.report.close()
    return trainer, {key: entry for key, entry in state.items() if "/exp_avg" in key}


with runtime("cpu", 60) as rt:
    trainer, state = opened(rt)
    names = {key.rpartition("/")[2] for key in state}
    assert names == {"exp_avg", "exp_avg_sq"}, names
    assert {(k.optimizer_args.beta1, k.optimizer_args.beta2) for k in kernels(trainer.module)} == {(0.8, 0.99)}
    torch.manual_seed(0)
    for entry in state.values():
        entry.pieces[0].values.normal_()
    trainer.loop.saves.keep(trainer.position)
    trainer.checkpoints.check_last()
    _, again = opened(rt)
    rowwise = {len(entry.shape) for key, entry in state.items() if key.endswith("/exp_avg_sq")}
    assert rowwise == {1 if sys.argv[2] == "partial_rowwise_adam" else 2}, rowwise
    for key, entry in state.items():
        assert len(again[key].pieces) == 1
        assert torch.equal(entry.pieces[0].values, again[key].pieces[0].values), key
    # An evaluation's lookups count in the kernel, but not in the next training step.
    for kernel in kernels(trainer.module):
        kernel.iter_cpu.fill_(99)
    trainer.optimizers.set_step(7, {})
    assert {(int(k.iter_cpu), int(k.iter)) for k in kernels(trainer.module)} == {(7, 7)}
print("well")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lazy_adam", "partial_rowwise_adam"])
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_fused_adam_is_built_and_saved_whole(data_root: Path, tmp_path: Path, name: str, sharding: str) -> None:
    decay = {"weight_decay": 0.01, "decay": "decoupled"}
    table = {"sharding": sharding, "optimizer": {"name": name, "lr": 0.01, "betas": [0.8, 0.99], **decay}}
    path = run_file(tmp_path, data_root, "DIN", embedding=table, train={"epochs": 1})
    done = subprocess.run(
        [sys.executable, "-O", "-c", ADAM, str(path), name], capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("well\n"), done.stderr


KNOWN = {"exp_avg": "momentum1", "exp_avg_sq": "exp_avg_sq"}


def test_states_by_canonical_name() -> None:
    first, second = torch.zeros(3), torch.ones(3)
    fused = {"t.momentum1": first, "t.exp_avg_sq": second, "t/linear.momentum1": first}
    assert fused_states(fused, "t", KNOWN) == {"exp_avg": first, "exp_avg_sq": second}


@pytest.mark.parametrize("there", [("momentum1",), ("momentum1", "momentum2"), ("momentum1", "exp_avg_sq", "more"), ()])
def test_a_state_that_is_missing_or_unknown_is_an_error(there: tuple[str, ...]) -> None:
    with pytest.raises(RuntimeError, match="table 't': its kernel keeps the states"):
        fused_states({f"t.{name}": torch.zeros(3) for name in there}, "t", KNOWN)
