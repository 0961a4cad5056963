"""GateNet: each input is opened or closed by all of them before a network reads it (Huang et al. 2020)."""

from torch import nn

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature
from rechub_dist.layers.inputs import Fields
from rechub_dist.layers.mlp import MLP
from rechub_dist.models import Model


class GateNet(Model):
    """logit = MLP(sigmoid(W x) * x), x the vectors and dense values of all features side by side."""

    def __init__(self, features: list[Feature], hidden_units: list[int], *, dropout_rates: float = 0.0) -> None:
        super().__init__()
        self.fields = Fields.of(features)
        self.gate = nn.Linear(self.fields.width, self.fields.width)
        self.network = MLP(self.fields.width, hidden_units, dropout_rates)
        self.logit = nn.Linear(self.network.out_dim, 1)

    def lookups(self) -> tuple[Lookup, ...]:
        return self.fields.lookups

    def dense_features(self) -> tuple[DenseFeature, ...]:
        return self.fields.dense

    def forward(self, embedded: Embedded) -> Output:
        """Logits [B, 1]."""
        x = self.fields.concat(embedded)
        return Output(logits=self.logit(self.network(self.gate(x).sigmoid() * x)))
