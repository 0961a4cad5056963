"""Optimizers: fused ones for sharded tables, torch's for replicated tables and dense parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.optim.optimizers import Adam as FusedAdam
from torchrec.optim.optimizers import PartialRowWiseAdam
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from rechub_dist.config import OptimizerConfig, TableOptimizerConfig
from rechub_dist.embedding.adagrad import MomentumAdagrad
from rechub_dist.embedding.decay import ReplicatedDecay
from rechub_dist.embedding.dense import Maker, parameter_groups
from rechub_dist.embedding.ftrl import Ftrl
from rechub_dist.embedding.layout import REPLICATED, Layout, PlacedTable
from rechub_dist.embedding.local import LocalTables, module_key
from rechub_dist.embedding.rates import Plateaus, Rates
from rechub_dist.embedding.stage import Replicated
from rechub_dist.errors import UserError, one_line

_DENSE: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "momentum_sgd": torch.optim.SGD,
    "momentum_adagrad": MomentumAdagrad,
    "ftrl": Ftrl,
}
_FUSED_ADAMS: dict[str, type[torch.optim.Optimizer]] = {
    "lazy_adam": FusedAdam,
    "partial_rowwise_adam": PartialRowWiseAdam,
}
_COUNTING = (EmbOptimType.ADAM, EmbOptimType.PARTIAL_ROWWISE_ADAM)


def fused_optimizer(config: TableOptimizerConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer class and arguments that select a fused kernel's optimizer in TorchRec."""
    arguments: dict[str, Any] = {"lr": config.lr}
    if config.name in _FUSED_ADAMS:
        beta1, beta2 = config.betas
        moments = {"eps": config.eps, "beta1": beta1, "beta2": beta2}
        return _FUSED_ADAMS[config.name], {**arguments, **moments, "weight_decay": config.weight_decay}
    if config.weight_decay and config.name == "rowwise_adagrad":
        mode = WeightDecayMode.L2 if config.decay == "l2" else WeightDecayMode.DECOUPLE
        arguments |= {"weight_decay": config.weight_decay, "weight_decay_mode": mode}
    return _DENSE[config.name], _with_eps(config, arguments)


def _with_eps(config: TableOptimizerConfig | OptimizerConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments if config.name in ("sgd", "momentum_sgd", "ftrl") else {**arguments, "eps": config.eps}


class Optimizers:
    """All optimizers of a run, stepped together.

    `dense` updates the parameters of model and objective; `replicated` has one torch optimizer per replicated table;
    `fused` updates the sharded tables within backward, and is stepped to pass the learning rate on.

    Args:
        module: the sharded train module.
        dense: settings of the dense optimizer.
        rates: the learning rates.
        make_dense: creates the dense optimizer where it is the user's own class.
        make_table: the same for the optimizer of a table, given its settings.
        group: the ranks, if they are not all of the default process group.
        clip_tables: clips the norm of the gradient of all replicated tables together.
        average: decay of the moving average of the dense parameters, if there is to be one.

    Attributes:
        averages: of the dense parameters, by name; each begins as the parameter, and after each step is
            average * itself + (1 - average) * the parameter.

    Raises:
        UserError: an optimizer whose state cannot be checkpointed.
    """

    def __init__(
        self,
        module: DistributedModelParallel,
        layout: Layout,
        dense: OptimizerConfig,
        rates: Rates,
        make_dense: Maker | None = None,
        make_table: Callable[[TableOptimizerConfig], Maker | None] = lambda _: None,
        group: dist.ProcessGroup | None = None,
        *,
        clip_tables: float | None = None,
        average: float | None = None,
    ) -> None:
        self.rates = rates
        self._clip, self._clip_tables = dense.clip_norm, clip_tables
        train_module = module.module
        self.parameters: dict[str, nn.Parameter] = train_module.dense_parameters()
        arguments: dict[str, Any] = {"lr": dense.lr, "weight_decay": dense.weight_decay}
        if dense.name in ("adam", "adamw"):
            arguments["betas"] = dense.betas
        elif dense.name == "momentum_adagrad":
            arguments["momentum"] = dense.momentum
        self._average = average
        averaged = self.parameters if average is not None else {}
        self.averages = {name: parameter.detach().clone() for name, parameter in averaged.items()}
        self.dense: torch.optim.Optimizer | None = None
        groups = parameter_groups(self.parameters, dense)
        self._unknown: dict[str, torch.optim.Optimizer] = {}  # users' own, by table; the dense one's is ""
        if groups and make_dense is not None:
            self.dense = self._unknown[""] = make_dense(groups)
            _takes(self.dense, dense.name, groups)
            _room_for_state(self.dense, dense.name)
        elif groups:
            self.dense = _made("optimizer", dense, groups, arguments)
        self.replicated: dict[str, torch.optim.Optimizer] = {}
        trained = [placed for placed in layout.tables_in(REPLICATED) if not placed.frozen]
        for placed in trained:
            local: LocalTables = train_module.stage.replicated.local
            weights = [local.weight(placed.table.name)]
            if (make := make_table(placed.optimizer)) is not None:
                optimizer = self._unknown[placed.table.name] = make(weights)
                _room_for_state(optimizer, placed.optimizer.name, "embedding.optimizer")
            else:
                optimizer = _of_replicated(placed.optimizer, weights)
            self.replicated[placed.table.name] = optimizer
        self._decay = _decay(train_module.stage.replicated, [placed for placed in trained if placed.decays], group)
        self.fused: KeyedOptimizer = module.fused_optimizer
        self._counting = [kernel for kernel in kernels(module) if kernel.optimizer in _COUNTING]
        denses = [self.dense] if self.dense else []
        self._all: list[Any] = [*denses, *self.replicated.values(), self.fused]
        for optimizer in self._all[:-1]:
            if optimizer not in self._unknown.values():
                _init_state(optimizer)
        self._accumulators = {
            f"{module_key(name)}.momentum1": placed.optimizer.initial_accumulator
            for name, placed in layout.tables.items()
            if placed.collection != REPLICATED and placed.optimizer.initial_accumulator
        }
        self._base = [
            [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
            for optimizers in (denses, self._all[len(denses) :])
        ]

    def start(self) -> None:
        """Start without a checkpoint: drops the state that `_room_for_state` has created for one to be loaded into.

        And gives sharded tables their initial accumulators.
        """
        for optimizer in self._unknown.values():
            optimizer.state.clear()
        if self._accumulators:
            states = list(self.fused.state_dict()["state"].values())
            for name, initial in self._accumulators.items():
                for shard in (shard for state in states if name in state for shard in state[name].local_shards()):
                    shard.tensor.fill_(initial)

    def set_step(self, step: int, plateaus: Plateaus) -> float:
        """Set the learning rates of (0-based) `step`, and the step count of fused Adam's bias correction.

        Fused kernels count their forward passes, including those of evaluation, and no checkpoint holds the count. So
        it is set from the step.

        Returns:
            The dense learning rate.
        """
        for kernel in self._counting:
            kernel.iter_cpu.fill_(step)
            kernel.iter.fill_(step)
        for factor, groups in zip(self.rates.factors(step, plateaus), self._base, strict=True):
            for group, base in groups:
                group["lr"] = base * factor
        return self._base[0][0][0]["lr"] if self._base[0] else 0.0

    @torch.no_grad()
    def start_from_averages(self) -> None:
        """Make the dense parameters what their averages are: where a warm start has put weights."""
        for name, average in self.averages.items():
            self.parameters[name].copy_(average)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has the averages of its parameters meanwhile, if there are any."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.averages.items():
            trained = self.parameters[name].clone()
            self.parameters[name].copy_(average)
            average.copy_(trained)

    def zero_grad(self) -> None:
        """Clear all gradients."""
        for optimizer in self._all:
            optimizer.zero_grad()
        if self._decay is not None:
            self._decay.clear()

    def step(self) -> None:
        """Clip and apply the dense gradients; fused optimizers did theirs in backward, with the rates of `set_step`."""
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), self._clip)
        if self._clip_tables is not None:
            weights = [p for o in self.replicated.values() for group in o.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(weights, self._clip_tables)
        if self._decay is not None:
            self._decay.apply({name: optimizer.param_groups[0]["lr"] for name, optimizer in self.replicated.items()})
        for optimizer in self._all:
            optimizer.step()
        if self._average is not None:
            with torch.no_grad():
                for name, average in self.averages.items():
                    average.lerp_(self.parameters[name], 1 - self._average)


def kernels(module: nn.Module) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
    """The fused kernels with this rank's shards of the tables in `module`."""
    # a sharded collection keeps its lookups in a plain list, which `modules` does not enter
    lookups = [lookup for child in module.modules() for lookup in getattr(child, "_lookups", ())]
    found = [child for lookup in lookups for child in lookup.modules()]
    return [child for child in found if isinstance(child, SplitTableBatchedEmbeddingBagsCodegen)]


def _made(where: str, config: Any, parameters: list[Any], arguments: dict[str, Any]) -> torch.optim.Optimizer:
    """An optimizer of torch by our short name. Raises UserError for arguments that it refuses."""
    try:
        return _DENSE[config.name](parameters, **_with_eps(config, arguments))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{where}: torch refuses these settings of {config.name} ({one_line(error)}); set others"
        ) from error


def _of_replicated(config: TableOptimizerConfig, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a replicated table, but for the decay of looked-up rows."""
    arguments: dict[str, Any] = {"lr": config.lr}
    if config.name == "adam":
        arguments |= {"betas": config.betas, "weight_decay": config.weight_decay}
        if config.decay == "decoupled":
            config = config.model_copy(update={"name": "adamw"})
    elif config.name == "momentum_sgd":
        arguments["momentum"] = config.momentum
    elif config.name == "ftrl":
        arguments |= {key: getattr(config, key) for key in ("beta", "l1", "l2", "initial_accumulator")}
    elif config.name in ("adagrad", "rowwise_adagrad"):
        arguments["initial_accumulator_value"] = config.initial_accumulator
    elif config.name == "momentum_adagrad":
        arguments |= {"momentum": config.momentum, "lazy": True}
        arguments["initial_accumulator_value"] = config.initial_accumulator
    return _made("embedding.optimizer", config, weights, arguments)


def _decay(replicated: Replicated | None, tables: list[PlacedTable], group: Any) -> ReplicatedDecay | None:
    """What decays replicated tables, if any of them has a decay of its looked-up rows."""
    if replicated is None or not tables:
        return None
    for placed in tables:
        weight = replicated.local.weight(placed.table.name)
        replicated.looked_up[placed.table.name] = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    optimizers = {placed.table.name: placed.optimizer for placed in tables}
    return ReplicatedDecay(replicated.local, optimizers, replicated.looked_up, group)


def _takes(optimizer: torch.optim.Optimizer, name: str, groups: list[dict[str, Any]]) -> None:
    """Raise UserError if a user's optimizer has none of the settings that single groups of parameters have."""
    for key in {key for group in groups for key in group} - {"params", *optimizer.defaults}:
        raise UserError(f"optimizer.rules: {name} has no {key}; leave it out of the rules and of optimizer")


def _room_for_state(optimizer: torch.optim.Optimizer, name: str, where: str = "optimizer") -> None:
    """Make a user's optimizer create its state, by a step that is then undone.

    Raises:
        UserError: it keeps state that a checkpoint cannot hold.
    """
    # frozen parameters get no gradient in training either, and so no state
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    before = [parameter.detach().clone() for parameter in parameters]
    settings = _settings(optimizer)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"{where}.name: {name} cannot make a step with dense gradients: {one_line(error)[:200]}; name another"
        ) from error
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    if _settings(optimizer) != settings:
        raise UserError(
            f"{where}.name: {name} keeps state outside of its parameters', which no checkpoint holds; name another"
        )
    for state in optimizer.state.values():
        for key, value in state.items():
            if not isinstance(value, torch.Tensor):
                raise UserError(
                    f"{where}.name: {name} keeps {key!r} as {type(value).__name__}, but checkpoints hold tensors; "
                    f"make it one"
                )


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, str]]:
    return [{key: repr(value) for key, value in g.items() if key != "params"} for g in optimizer.param_groups]


def _init_state(optimizer: torch.optim.Optimizer) -> None:
    """Create Adam's state and SGD's momentum before the first step, so that a checkpoint can be loaded into them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
                optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
            if not isinstance(optimizer, torch.optim.Adam):  # includes AdamW
                continue
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
