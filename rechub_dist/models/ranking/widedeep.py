"""WideDeep: a linear model over ids and their crosses, trained together with a deep network over embeddings."""

from __future__ import annotations

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature
from rechub_dist.layers.inputs import Fields
from rechub_dist.layers.linear import FirstOrder
from rechub_dist.layers.mlp import MLP
from rechub_dist.models.base import Model


class WideDeep(Model):
    """logit = w^T [x, phi(x)] + MLP([v_1 .. v_F, dense values])  (sections 3.1 to 3.3).

    The wide part has one scalar per id (`<feature>.linear`), per hashed combination of a `CrossFeature` (phi(x)), and
    per dense value. The deep part has separate embeddings. The MLP's last bias is the
    global bias.

    The paper trains the two parts with different optimizers (FTRL and Adagrad); here the run's optimizers train both.

    Args:
        wide_features: inputs of the wide part: sparse, cross, sequence (pooled by their mean) and dense features. Their
            tables need no `dim`.
        deep_features: inputs of the deep part, of any of these kinds. Every table's width is its own `dim`. A feature
            may be in both lists.
        hidden_units: widths of the deep network.
        dropout_rates: one rate per hidden layer, or one for all.
        activation: the deep network's activation.
        batch_norm: batch normalisation in the deep network.
    """

    paper = "Cheng et al. 2016, Wide & Deep Learning for Recommender Systems"

    def __init__(
        self,
        wide_features: list[Feature],
        deep_features: list[Feature],
        hidden_units: list[int],
        dropout_rates: float | list[float],
        *,
        activation: str = "relu",
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        for name, features in {"wide_features": wide_features, "deep_features": deep_features}.items():
            if not features:
                raise ValueError(f"{name} is empty: give both parts at least one feature")
        self.wide = FirstOrder(wide_features)
        self.fields = Fields.of(deep_features)
        _check_same(wide_features, deep_features)
        self.mlp = MLP(
            self.fields.width, hidden_units, dropout_rates, activation=activation, batch_norm=batch_norm, out_dim=1
        )

    def lookups(self) -> tuple[Lookup, ...]:
        return (*self.wide.lookups, *self.fields.lookups)

    def dense_features(self) -> tuple[DenseFeature, ...]:
        return tuple(dict.fromkeys([*self.wide.dense, *self.fields.dense]))

    def forward(self, embedded: Embedded) -> Output:
        """Logits [B, 1]."""
        return Output(logits=self.wide(embedded) + self.mlp(self.fields.concat(embedded)))


def _check_same(wide_features: list[Feature], deep_features: list[Feature]) -> None:
    """Check that a name in both lists refers to the same feature."""
    wide = {feature.name: feature for feature in wide_features}
    for feature in deep_features:
        other = wide.get(feature.name, feature)
        if other != feature:
            here, there = vars(feature), vars(other)
            differ = ["kind"] if feature.kind != other.kind else [key for key in here if here[key] != there[key]]
            raise ValueError(
                f"feature {feature.name!r} has another {' and '.join(differ)} in wide_features than in "
                f"deep_features: put the same feature into both, or give one another name"
            )
