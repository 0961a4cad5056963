"""How the dense part of a model computes in training: in bf16, in TF32, compiled.

Tables, objectives, evaluation and prediction compute in float32, uncompiled, whatever is set here. It is set on a
model's instance rather than by a module around it, so that parameters keep their names and TorchRec its leaf modules.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rechub_dist.config import TrainConfig
from rechub_dist.embedded import Output
from rechub_dist.errors import UserError
from rechub_dist.models import Model, RecallModel

_AMPERE = (8, 0)  # compute capability of the first cards that multiply in bf16 and TF32


def check_precision(config: TrainConfig, device: torch.device) -> None:
    """Refuse what this rank's device has no use of, and what cannot be compiled on this host.

    Raises:
        UserError: names the key and the fix.
    """
    if config.tf32 and device.type != "cuda":
        raise UserError(f"train.tf32: only GPUs multiply in TF32, and this run is on {device.type}; leave it out")
    if device.type == "cuda" and (config.tf32 or config.precision == "bf16"):
        found = torch.cuda.get_device_capability(device)
        if found < _AMPERE:
            key = "train.tf32" if config.tf32 else "train.precision: bf16"
            raise UserError(
                f"{key} needs a GPU of compute capability 8.0 (Ampere) or newer, and "
                f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}; leave it out"
            )
    if config.compile:
        compiler = os.environ.get("CXX", "g++")  # as torch looks for it
        missing = [f"a C++ compiler ({compiler})"] if shutil.which(compiler) is None else []
        if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
            missing.append("Python's headers (Python.h, of python3-dev)")
        if device.type == "cuda" and importlib.util.find_spec("triton") is None:
            missing.append("the package triton")
        if missing:
            raise UserError(f"train.compile: this host lacks {' and '.join(missing)}; install it, or leave that out")


def set_training(model: Model, config: TrainConfig, device: str) -> None:
    """Have a model in training mode compute as `config` says, in place; in evaluation it computes as ever.

    Args:
        model: new; what takes a method of it for later (an objective does) does so after this.
        config: its `precision` and `compile`.
        device: the type of the one that the model will be on.
    """
    plain = model.forward
    forward: Callable[[Any], Any] = plain
    if config.compile:
        # Dropout from torch's own generator: the same masks as uncompiled. Lazily, as importing the compiler is slow.
        make = functools.cache(lambda: torch.compile(plain, dynamic=True, options={"fallback_random": True}))

        def forward(embedded: Any) -> Any:
            return make()(embedded)

    if config.precision == "bf16":
        forward = _in_bf16(forward, device)
        if isinstance(model, RecallModel):  # of items outside of `forward`: an objective's negatives
            model.item = _in_training(model, _in_bf16(model.item, device), model.item)  # type: ignore[method-assign, assignment]
        for child in model.modules():
            if isinstance(child, nn.BatchNorm1d):  # sums over a batch have no place in 8 bits
                child.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    if forward is not plain:
        model.forward = _in_training(model, forward, plain)  # type: ignore[method-assign, assignment]


@contextmanager
def tf32_products(on: bool) -> Iterator[None]:
    """With `on`, float32 matrix products on a GPU are computed in TF32 meanwhile, those of backward passes too."""
    before = torch.get_float32_matmul_precision()
    if on:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if on:
            torch.set_float32_matmul_precision(before)


def _in_training(model: Model, training: Callable[[Any], Any], otherwise: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def computed(embedded: Any) -> Any:
        return training(embedded) if model.training else otherwise(embedded)

    return computed


def _in_bf16(compute: Callable[[Any], Any], device: str) -> Callable[[Any], Any]:
    """The same under autocast: products in bf16, weights and what comes out in float32."""

    def computed(embedded: Any) -> Any:
        with torch.autocast(device, torch.bfloat16):
            found = compute(embedded)
        return _float32(found)

    return computed


def _float32(found: Any) -> Any:
    """A tensor, or an output's tensors, in float32 where they are of a smaller floating type."""
    if isinstance(found, Tensor):
        return found.float() if found.is_floating_point() else found
    if isinstance(found, dict):
        return {name: _float32(value) for name, value in found.items()}
    if isinstance(found, Output):
        return replace(found, **{field.name: _float32(getattr(found, field.name)) for field in fields(found)})
    return found
