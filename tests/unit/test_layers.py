from __future__ import annotations

import pytest
import torch
from torch import nn

from rechub_dist.layers.activation import Dice, activation
from rechub_dist.layers.attention import ActivationUnit, CausalSelfAttention
from rechub_dist.layers.fm import pair_sum
from rechub_dist.layers.masking import following, last, zero_padding
from rechub_dist.layers.mlp import MLP
from rechub_dist.layers.norm import batch_norm


def test_dice_is_its_formula() -> None:
    dice = Dice(3).double()
    nn.init.uniform_(dice.alpha)
    x = torch.randn(5, 3, dtype=torch.float64) * 3 + 1
    p = 1 / (1 + torch.exp(-(x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + 1e-8)))
    torch.testing.assert_close(dice(x), p * x + (1 - p) * dice.alpha * x)


def test_dice_uses_running_statistics_when_evaluated() -> None:
    dice = Dice(2).double()
    for _ in range(200):
        dice(torch.randn(64, 2, dtype=torch.float64) * 2 + 3)
    torch.testing.assert_close(dice.norm.running_mean, torch.full((2,), 3.0).double(), rtol=0, atol=0.3)
    torch.testing.assert_close(dice.norm.running_var, torch.full((2,), 4.0).double(), rtol=0, atol=1.0)
    dice.eval()
    x = torch.randn(4, 2, dtype=torch.float64)
    p = torch.sigmoid((x - dice.norm.running_mean) / torch.sqrt(dice.norm.running_var + 1e-8))
    torch.testing.assert_close(dice(x), p * x)
    torch.testing.assert_close(dice(x[:1]), dice(x)[:1])


def test_dice_starts_with_alpha_zero_and_its_norm_can_be_replaced() -> None:
    dice = Dice(2)
    assert not dice.alpha.any()
    assert type(dice.norm) is nn.BatchNorm1d
    assert not list(dice.norm.parameters())


@pytest.mark.parametrize("name", ["relu", "prelu", "sigmoid", "tanh", "gelu", "silu", "dice"])
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_activations_by_name(name: str, rows: int) -> None:
    layer = activation(name, 3)
    x = torch.randn(rows, 3, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert all(parameter.grad is not None and parameter.shape == (3,) for parameter in layer.parameters())


@pytest.mark.parametrize("rows", [0, 1])
def test_a_batch_without_a_variance_uses_running_statistics(rows: int) -> None:
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(8, 3))
    mean, tracked = norm.running_mean.clone(), norm.num_batches_tracked.clone()
    x = torch.randn(rows, 3)
    y = batch_norm(norm, x)
    assert torch.equal(norm.running_mean, mean)
    assert norm.num_batches_tracked == tracked
    torch.testing.assert_close(y, norm.eval()(x))
    y.sum().backward()
    assert norm.weight.grad is not None


def test_a_norm_in_the_place_of_another_is_called() -> None:
    class Global(nn.BatchNorm1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    assert batch_norm(Global(3), torch.zeros(1, 3)).eq(1).all()


def test_mlp_layers() -> None:
    mlp = MLP(3, [5, 4], [0.2, 0.1], batch_norm=True, out_dim=2)
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    assert [type(layer) for layer in mlp.layers] == [*kinds, *kinds, nn.Linear]
    assert [layer.p for layer in mlp.layers if isinstance(layer, nn.Dropout)] == [0.2, 0.1]
    assert mlp.out_dim == 2
    assert MLP(3, [5, 4]).out_dim == 4
    assert MLP(3, []).out_dim == 3
    assert [layer.p for layer in MLP(3, [5, 4], 0.3).layers if isinstance(layer, nn.Dropout)] == [0.3, 0.3]


@pytest.mark.parametrize(
    ("units", "rates", "message"),
    [
        ([4, 3], [0.1], "1 dropout rates .* 2 hidden layers"),
        ([4], [-0.1], "at least 0"),
        ([4, 0], 0.1, "every width must be at least 1"),
    ],
)
def test_mlp_wrong_arguments(units: list[int], rates: float | list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLP(3, units, rates)


def test_pair_sum() -> None:
    v = torch.randn(3, 4, 2, dtype=torch.float64)
    expected = sum((v[:, i] * v[:, j]).sum(1) for i in range(4) for j in range(i + 1, 4))
    torch.testing.assert_close(pair_sum(v), expected)
    assert not pair_sum(v[:, :1]).any()


def test_masking() -> None:
    values = torch.arange(1.0, 13).view(2, 3, 2)
    lengths = torch.tensor([2, 0])
    assert last(values, lengths).tolist() == [[3, 4], [0, 0]]
    assert zero_padding(values, torch.tensor([[True, False, True], [False] * 3]))[0].tolist() == [
        [1, 2],
        [0, 0],
        [5, 6],
    ]
    final = torch.tensor([[-1.0, -2], [-3, -4]])
    assert following(values, lengths, final).tolist() == [[[3, 4], [-1, -2], [0, 0]], [[0, 0]] * 3]
    assert following(values, torch.tensor([3, 1]), final)[:, :, 0].tolist() == [[3, 5, -1], [-3, 0, 0]]
    assert following(values[:0], lengths[:0], final[:0]).shape == (0, 3, 2)
    assert last(values[:0], lengths[:0]).shape == (0, 2)


def test_the_activation_unit_keeps_padding_out_of_the_statistics() -> None:
    unit = ActivationUnit(2, [3], "dice")
    behaviors, target = torch.randn(2, 4, 2), torch.randn(2, 2)
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    unit(behaviors, target, mask)
    statistics = unit.mlp.layers[1].norm.running_mean.clone()
    other = ActivationUnit(2, [3], "dice")
    other.mlp.layers[0].load_state_dict(unit.mlp.layers[0].state_dict())
    other(behaviors.masked_fill(~mask[..., None], 1e6), target, mask)
    torch.testing.assert_close(other.mlp.layers[1].norm.running_mean, statistics)


def test_attention_heads_divide_the_width() -> None:
    with pytest.raises(ValueError, match="must divide"):
        CausalSelfAttention(6, 4, 0.0)
