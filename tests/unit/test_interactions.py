from __future__ import annotations

import pytest
import torch

from rechub_dist.layers.arguments import check_choice, check_positive
from rechub_dist.layers.bilinear import Bilinear
from rechub_dist.layers.pairs import pairs


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("fields", [1, 2, 5])
def test_pairs(rows: int, fields: int) -> None:
    v = torch.randn(rows, fields, 2)
    order = [(i, j) for i in range(fields) for j in range(i + 1, fields)]
    left, right = pairs(v[:, :-1], v)
    assert left.shape == right.shape == (rows, len(order), 2)
    for place, (i, j) in enumerate(order):
        assert torch.equal(left[:, place], v[:, i])
        assert torch.equal(right[:, place], v[:, j])


def test_bilinear_matrices_are_told_apart_by_the_left_field() -> None:
    """What moves one matrix moves the pairs that it belongs to, and no others."""
    v = torch.randn(2, 4, 3)
    of = {"field_each": [(0, 1, 2), (3, 4), (5,)], "field_interaction": [(p,) for p in range(6)]}
    for kind, owned in of.items():
        layer = Bilinear(kind, 4, 3)
        before = layer(v)
        for matrix, own in enumerate(owned):
            with torch.no_grad():
                layer.linear.weight[matrix] += 1
            after = layer(v)
            moved = (after != before).any(dim=2).all(dim=0).nonzero().flatten()
            assert tuple(moved.tolist()) == own
            before = after


def test_arguments() -> None:
    check_choice("kind", "b", ("a", "b"))
    check_positive("count", 1)
    with pytest.raises(ValueError, match="kind is 'c': use one of a, b"):
        check_choice("kind", "c", ("a", "b"))
    with pytest.raises(ValueError, match="count is 0: it must be at least 1"):
        check_positive("count", 0)
