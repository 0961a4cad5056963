"""What would make the host wait for a device, found without one: tensors on `meta` stand for those of a device."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rechub_tests.pipelined import caller

_FROM_HOST = {torch.tensor, torch.as_tensor, Tensor.new_tensor}


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Counts copies between host and device within, by `file:function` of ours or of TorchRec's.

    These are copies of tensors, numbers put into a new tensor on the device, and tensors of the host among the
    arguments of an operator on the device (an index, say). What needs a number of the device's (`int(x)`, a mask as an
    index, `nonzero`, `unique`) raises, as `meta` has none.
    """
    seen: Counter[str] = Counter()
    with _Operators(seen), _Functions(seen):
        yield seen


class _Operators(TorchDispatchMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if len({tensor.is_meta for tensor in given}) == 2 or (given and not given[0].is_meta and _on_device(made)):
            self._seen[caller(traceback.extract_stack()[:-1])] += 1
        return result


class _Functions(TorchFunctionMode):
    """Numbers of the host that become a tensor on `meta` pass no operator."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _FROM_HOST and result.is_meta:
            self._seen[caller(traceback.extract_stack()[:-1])] += 1
        return result


def _on_device(tensors: list[Tensor]) -> bool:
    return any(tensor.is_meta for tensor in tensors)
