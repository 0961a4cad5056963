"""The checkpoints of a run as it is trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torchrec.distributed.model_parallel import DistributedModelParallel

from rechub_dist.assembly.parts import Parts
from rechub_dist.checkpoint import Checkpoints, Position
from rechub_dist.checkpoint.state import placement, train_state
from rechub_dist.data.passes import Passes
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.distributed.watchdog import Watchdog
from rechub_dist.embedding.optim import Optimizers
from rechub_dist.reporting.reporter import Reporter
from rechub_dist.training.output import write_config


class Saves:
    """Saves where the run stands, once for each position, and reports what has come of it. All methods are collective.

    Args:
        identity: the run's, when it has done so many steps.
        plan: where the tables lie, to be recorded.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        parts: Parts,
        module: DistributedModelParallel,
        optimizers: Optimizers,
        passes: Passes,
        rt: Runtime,
        report: Reporter,
        watchdog: Watchdog,
        identity: Callable[[int], dict[str, Any]],
        plan: dict[str, Any],
    ) -> None:
        self._checkpoints = checkpoints
        self._parts = parts
        self._module = module
        self._optimizers = optimizers
        self._passes = passes
        self._rt = rt
        self._report = report
        self._watchdog = watchdog
        self._identity = identity
        self._plan = plan

    def keep(self, position: Position) -> None:
        """Begin to save, unless this position is saved; training waits until the state is copied."""
        if self._checkpoints.has(position):
            return
        self._watchdog.mark("saving a checkpoint", slow=True)
        state = train_state(self._module, self._parts.layout, self._optimizers)
        config = self._parts.config
        run = {
            "identity": self._identity(position.step),
            "config": config.dump(),
            "tables": placement(self._parts.layout),
            "plan": self._plan,
        }
        self._checkpoints.save(state, position, run)
        if self._rt.is_main and not (config.output_dir / "config.yaml").exists():
            with suppress(OSError):  # somebody has removed the folder
                write_config(config)
        self.tell()

    def amend(self, position: Position) -> None:
        """Put what an evaluation has found into the checkpoint of the same step."""
        self._checkpoints.amend(position)

    def tell(self) -> None:
        """Report the saves that have ended."""
        for save in self._checkpoints.news():
            self._report.saved(save, self._passes.current(save.step - 1).number if save.step else 0)
