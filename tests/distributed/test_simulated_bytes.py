"""`simulate` against real ranks: the bytes of a step that it says are those that the collectives carry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rechub_dist.assembly.estimate import estimate
from rechub_dist.assembly.simulate import _network, traffic
from rechub_dist.data.run_file import load_run
from rechub_dist.embedding.planning import Cluster
from rechub_tests.ranks import RankPool
from rechub_tests.representatives import slow
from rechub_tests.runs import run_file, train

BATCH = 64
FEATURES = ["user", "item", "shop", "age"]  # one id each


def counted(path: Path) -> dict[str, float]:
    """Train, and return a rank's bytes of a step: of integers received, and of vectors sent or received."""
    calls: list[tuple[torch.dtype, int, int]] = []  # of a call: what it carries, bytes sent to and received from others
    original = {
        name: getattr(dist, name) for name in ("all_to_all_single", "reduce_scatter_tensor", "all_gather_into_tensor")
    }
    rank, world = -1, 0

    def others(tensor: Tensor, splits: list[int] | None) -> int:
        own = tensor.shape[0] // world if splits is None else splits[rank]
        return (tensor.shape[0] - own) * (tensor[:1].numel() if len(tensor) else 0) * tensor.element_size()

    def all_to_all(
        output: Tensor,
        input: Tensor,  # noqa: A002
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *rest: Any,
        **keys: Any,
    ) -> Any:
        calls.append((input.dtype, others(input, input_split_sizes), others(output, output_split_sizes)))
        return original["all_to_all_single"](output, input, output_split_sizes, input_split_sizes, *rest, **keys)

    def reduce_scatter(output: Tensor, input: Tensor, *rest: Any, **keys: Any) -> Any:  # noqa: A002
        moved = (world - 1) * output.numel() * output.element_size()
        calls.append((input.dtype, moved, moved))
        return original["reduce_scatter_tensor"](output, input, *rest, **keys)

    def all_gather(output: Tensor, input: Tensor, *rest: Any, **keys: Any) -> Any:  # noqa: A002
        moved = (world - 1) * input.numel() * input.element_size()
        if input.dtype.is_floating_point:
            calls.append((input.dtype, moved, moved))
        return original["all_gather_into_tensor"](output, input, *rest, **keys)

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.all_to_all_single, dist.reduce_scatter_tensor, dist.all_gather_into_tensor = (
        all_to_all,
        reduce_scatter,
        all_gather,
    )
    try:
        steps = train(path).step
    finally:
        for name, function in original.items():
            setattr(dist, name, function)
    return {
        "ids": sum(received for dtype, _, received in calls if not dtype.is_floating_point) / steps,
        "vectors": sum(max(sent, received) for dtype, sent, received in calls if dtype.is_floating_point) / steps,
    }


@pytest.mark.parametrize("ranks", [2, slow(4)])
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "column_wise"])
def test_bytes_are_those_of_real_ranks(
    pool: RankPool, data_root: Path, tmp_path: Path, sharding: str, ranks: int
) -> None:
    path = run_file(
        tmp_path, data_root, "DeepFM",
        data={"batch_size": BATCH, "valid": None, "test": None, "drop_last": True},
        model={"features": FEATURES, "embedding_dim": 16},
        embedding={"sharding": sharding, "optimizer": {"name": "adagrad"}},
        train={"epochs": 1},
    )  # fmt: skip
    told = pool.run(ranks, counted, path)
    config = load_run(path)
    cluster = Cluster(ranks, ranks, "cpu", 1 << 30)
    _, dense = _network(config, cluster)
    found = traffic(estimate(config, cluster), BATCH, dense)
    print(told, found)
    assert max(one["vectors"] for one in told) == pytest.approx(found.vectors, rel=0.02)
    assert max(one["ids"] for one in told) == pytest.approx(found.ids, rel=0.1)
