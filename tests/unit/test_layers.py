from __future__ import annotations

import pytest
import torch
from torch import nn

from rechub_dist.features import SparseFeature, Table
from rechub_dist.layers.activation import Dice, activation
from rechub_dist.layers.attention import ActivationUnit, BilinearAttention, CausalSelfAttention, SelfAttention
from rechub_dist.layers.fm import pair_sum
from rechub_dist.layers.grouped import GroupedLinear, GroupedMLP
from rechub_dist.layers.inputs import Fields
from rechub_dist.layers.masking import following, last, newest_first, zero_padding
from rechub_dist.layers.mlp import MLP
from rechub_dist.layers.norm import batch_norm
from rechub_dist.layers.recurrent import AIGRU, AUGRU


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


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "prelu", "sigmoid", "tanh", "gelu", "silu", "dice"])
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


def separate(grouped: GroupedMLP, width: int, **options: object) -> list[MLP]:
    """Each group as an MLP of its own, with its slice of the weights and of the statistics."""
    mlps = []
    for g in range(grouped.groups):
        mlp = MLP(width, **options).double()
        for layer, own in zip(grouped.layers, mlp.layers, strict=True):
            assert isinstance(own, nn.Linear) == isinstance(layer, GroupedLinear)
            if isinstance(own, nn.Linear):
                own.weight.data = layer.weight.data[g].T.clone()
                assert (own.bias is None) == (layer.bias is None)
                if own.bias is not None:
                    own.bias.data = layer.bias.data[g].clone()
                continue
            state = layer.state_dict()
            parts = {name: value.view(grouped.groups, -1)[g] if value.dim() else value for name, value in state.items()}
            own.load_state_dict(parts)
        mlps.append(mlp)
    return mlps


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("name", ["relu", "dice", "prelu"])
@pytest.mark.parametrize(
    ("units", "out_dim", "shared"),
    [
        ([4, 3], 2, True),
        ([4, 3], 2, False),
        ([5], None, True),
        ([5], None, False),
        ([], 2, True),
        ([], 2, False),
        ([], None, False),
    ],
)
def test_a_grouped_mlp_is_its_groups_apart(
    normalised: bool, name: str, units: list[int], out_dim: int | None, shared: bool
) -> None:
    options = {"hidden_units": units, "activation": name, "batch_norm": normalised, "out_dim": out_dim}
    grouped = GroupedMLP(3, 4, **options).double()
    for parameter in grouped.parameters():
        nn.init.normal_(parameter)
    mlps = separate(grouped, 4, **options)
    for training in (True, True, False):
        x = torch.randn(*((6, 4) if shared else (6, 3, 4)), dtype=torch.float64)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        actual = grouped.train(training)(mine)
        expected = torch.stack([m.train(training)(theirs if shared else theirs[:, g]) for g, m in enumerate(mlps)], 1)
        torch.testing.assert_close(actual, expected)
        assert actual.shape == (6, 3, grouped.out_dim)
        weight = torch.randn_like(expected)
        (actual * weight).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad)
    for i, layer in enumerate(grouped.layers):
        for key, parameter in layer.named_parameters():
            own = torch.stack([dict(mlp.layers[i].named_parameters())[key].grad for mlp in mlps])
            grad = own.transpose(1, 2) if own.dim() == 3 else own
            torch.testing.assert_close(parameter.grad, grad.reshape(parameter.shape))
        for key, buffer in layer.named_buffers():
            if buffer.dim():
                torch.testing.assert_close(buffer, torch.cat([dict(m.layers[i].named_buffers())[key] for m in mlps]))


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("options", [{"batch_norm": True}, {"activation": "dice"}, {}])
def test_a_grouped_mlp_takes_one_row_or_none(rows: int, options: dict) -> None:
    grouped = GroupedMLP(3, 4, [5, 2], out_dim=1, **options)
    for x in (torch.randn(rows, 4), torch.randn(rows, 3, 4)):
        y = grouped(x)
        assert y.shape == (rows, 3, 1)
        y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in grouped.parameters())


def test_grouped_mlp_layers() -> None:
    grouped = GroupedMLP(2, 3, [5, 4], [0.2, 0.1], batch_norm=True, out_dim=1)
    kinds = [GroupedLinear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    assert [type(layer) for layer in grouped.layers] == [*kinds, *kinds, GroupedLinear]
    assert [layer.p for layer in grouped.layers if isinstance(layer, nn.Dropout)] == [0.2, 0.1]
    # before batch norm a bias has no effect
    assert [layer.bias is None for layer in grouped.layers if isinstance(layer, GroupedLinear)] == [True, True, False]
    assert grouped.out_dim == 1
    assert GroupedMLP(2, 3, [5, 4]).out_dim == 4


def test_grouped_weights_start_like_those_of_linear_layers() -> None:
    layer = GroupedLinear(7, 16, 50)
    for parameter in (layer.weight, layer.bias):
        assert 0.24 < parameter.abs().max() <= 0.25  # 1 / sqrt(16)
        assert float(parameter.detach().std()) == pytest.approx(0.25 / 3**0.5, rel=0.1)
    assert not torch.equal(layer.weight[0], layer.weight[1])
    assert GroupedLinear(7, 16, 5, bias=False).bias is None


@pytest.mark.parametrize(
    ("units", "rates", "message"),
    [
        ([4, 3], [0.1], "1 dropout rates .* 2 hidden layers"),
        ([4], [-0.1], "at least 0"),
        ([4, 0], 0.1, "every width must be at least 1"),
    ],
)
def test_grouped_mlp_wrong_arguments(units: list[int], rates: float | list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupedMLP(2, 3, units, rates)


def test_grouped_mlp_wrong_activation() -> None:
    with pytest.raises(ValueError, match="activation 'rulu' is unknown"):
        GroupedMLP(2, 3, [4], activation="rulu")


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
    newest = newest_first(values, torch.tensor([2, 3]))
    assert newest.tolist() == [[[3, 4], [1, 2], [0, 0]], [[11, 12], [9, 10], [7, 8]]]
    assert not newest_first(values, torch.tensor([0, 0])).any()
    assert newest_first(values[:0], lengths[:0]).shape == (0, 3, 2)


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
    with pytest.raises(ValueError, match="must divide"):
        SelfAttention(6, 4)


def test_self_attention_sees_what_is_real() -> None:
    attention = SelfAttention(4, 2).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[3], [1]])
    attended = attention(x, mask)
    torch.testing.assert_close(attended[0, :3], attention(x[:1, :3], mask[:1, :3])[0])
    torch.testing.assert_close(attended[1, 0], attention.output(attention.value(x[1, 0])))
    torch.testing.assert_close(attention(x.masked_fill(~mask[..., None], 1e6), mask)[mask], attended[mask])
    moved = x.clone()
    moved[0, 2] += 1
    assert (attention(moved, mask) - attended)[0, 0].abs().max() > 1e-6  # the first sees the last


def test_bilinear_attention_without_a_real_position() -> None:
    attention = BilinearAttention(3, 2)
    states = torch.randn(2, 4, 3, requires_grad=True)
    mask = torch.tensor([[False] * 4, [True, True, False, False]])
    weights = attention(states, torch.randn(2, 2), mask)
    assert weights[0].tolist() == [0] * 4
    assert weights[1, 2:].tolist() == [0, 0]
    torch.testing.assert_close(weights[1].sum(), torch.tensor(1.0))
    (weights * torch.arange(4.0)).sum().backward()
    assert not states.grad[~mask].any()
    assert states.grad[mask].isfinite().all()
    assert attention.project.weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", [AUGRU, AIGRU])
def test_a_steered_gru_with_full_attention_is_a_gru(kind: type[AUGRU | AIGRU]) -> None:
    steered, plain = kind(3, 4).double(), nn.GRU(3, 4, batch_first=True).double()
    if isinstance(steered, AIGRU):
        steered.gru.load_state_dict(plain.state_dict())
    else:  # torch's second gate keeps the state where ours replaces it, and its candidate has a second bias
        sign = torch.ones(12, dtype=torch.float64)
        sign[4:8] = -1
        plain.bias_hh_l0.data[8:] = 0
        steered.input.weight.data = plain.weight_ih_l0.data * sign[:, None]
        steered.recurrent.weight.data = plain.weight_hh_l0.data * sign[:, None]
        steered.input.bias.data = (plain.bias_ih_l0.data + plain.bias_hh_l0.data) * sign
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(steered(x, torch.ones(2, 5).double()), plain(x)[0])
    weights = torch.full((2, 5), 0.5, dtype=torch.float64)
    assert (steered(x, weights) - plain(x)[0]).abs().max() > 1e-3
    assert steered(x[:0], weights[:0]).shape == (0, 5, 4)


def test_fields_may_keep_the_widths_of_tables() -> None:
    features = [SparseFeature("own", Table("own", 3, dim=2)), SparseFeature("bare", Table("bare", 3))]
    fields = Fields.of(features, 5, keep_dim=True)
    assert [lookup.dim for lookup in fields.lookups] == [2, 5]
    assert [lookup.feature for lookup in fields.lookups] == features
    with pytest.raises(ValueError, match="table 'own' has dim 2, but the model's hidden_size is 5"):
        Fields.of(features, 5, "hidden_size")
