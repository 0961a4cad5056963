"""The multi-layer perceptron of all towers."""

from __future__ import annotations

from torch import Tensor, nn

from rechub_dist.layers.activation import activation as make_activation
from rechub_dist.layers.arguments import check_widths
from rechub_dist.layers.norm import batch_norm as normalize


class MLP(nn.Module):
    """Linear, (batch norm,) activation, dropout for each of `hidden_units`, then a plain linear layer to `out_dim`.

    Args:
        in_dim: width of the input.
        hidden_units: widths of the hidden layers; may be empty.
        dropout_rates: one rate a hidden layer; a single float stands for all.
        activation: a name that `layers.activation` knows.
        batch_norm: normalise before each activation, by batch statistics.
        out_dim: width of the last, linear layer; None leaves it out.

    Shapes: [N, in_dim] -> [N, self.out_dim]. All rows are real: with batch norm or Dice they make the statistics.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_units: list[int],
        dropout_rates: float | list[float] = 0.0,
        *,
        activation: str = "relu",
        batch_norm: bool = False,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        rates = dropouts(dropout_rates, hidden_units)
        layers: list[nn.Module] = []
        width = in_dim
        for units, rate in zip(hidden_units, rates, strict=True):
            # Before batch norm a bias would have no effect, and an optimizer would drive it by rounding errors.
            layers.append(nn.Linear(width, units, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm1d(units))
            layers.append(make_activation(activation, units))
            if rate > 0:
                layers.append(nn.Dropout(rate))
            width = units
        if out_dim is not None:
            layers.append(nn.Linear(width, out_dim))
            width = out_dim
        self.layers = nn.ModuleList(layers)
        self.out_dim = width

    def forward(self, x: Tensor) -> Tensor:
        return self.behind_first(self.first(x)) if self.layers else x

    @property
    def first(self) -> nn.Linear:
        """The first linear layer."""
        layer = self.layers[0]
        assert isinstance(layer, nn.Linear)
        return layer

    def behind_first(self, x: Tensor) -> Tensor:
        """What follows the first linear layer, from that layer's output."""
        for layer in self.layers[1:]:
            x = normalize(layer, x)
        return x


def dropouts(dropout_rates: float | list[float], hidden_units: list[int]) -> list[float]:
    """One dropout rate for each of `hidden_units`: those given, or the one given for all.

    Raises:
        ValueError: for a width that no layer has, a rate outside [0, 1), or another number of rates than layers.
    """
    check_widths("hidden layers", hidden_units)
    if isinstance(dropout_rates, int | float):
        rates = [float(dropout_rates)] * len(hidden_units)
    else:
        rates = [float(rate) for rate in dropout_rates]
    if len(rates) != len(hidden_units):
        raise ValueError(
            f"{len(rates)} dropout rates {rates} for {len(hidden_units)} hidden layers {list(hidden_units)}: give one "
            f"rate a layer, or a single number for all"
        )
    if not all(0 <= rate < 1 for rate in rates):
        raise ValueError(f"dropout rates are {rates}: each must be at least 0 and less than 1")
    return rates
