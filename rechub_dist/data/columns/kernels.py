"""FBGEMM's kernels for jagged arrays in host memory. They are imported where they are called: serving has none."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[Any]  # int32 or int64
Floats = NDArray[np.float32]


def complete_cumsum(lengths: Ints) -> Ints:
    """Running sums of lengths [n] with a leading 0, [n + 1]."""
    import fbgemm_gpu  # noqa: F401, PLC0415 - registers torch.ops.fbgemm
    import torch  # noqa: PLC0415

    sums: Ints = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.from_numpy(lengths)).numpy()
    return sums


def permuted_rows(
    permutation: Ints, lengths: Ints, values: Ints, weights: Floats | None
) -> tuple[Ints, Ints, Floats | None]:
    """Lengths [n], values and weights [sum of lengths] of jagged rows in the order of `permutation`, integers [n].

    Row by row in one pass; an index per value would take four.
    """
    import fbgemm_gpu  # noqa: F401, PLC0415
    import torch  # noqa: PLC0415

    permuted = torch.ops.fbgemm.permute_1D_sparse_data(
        torch.from_numpy(permutation.astype(np.int32)),
        torch.from_numpy(lengths),
        torch.from_numpy(np.require(values, requirements="W")),
        None if weights is None else torch.from_numpy(np.require(weights, requirements="W")),
        len(values),
    )
    return permuted[0].numpy(), permuted[1].numpy(), None if weights is None else permuted[2].numpy()
