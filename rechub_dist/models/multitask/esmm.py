"""ESMM: click and conversion, both trained on all impressions."""

from __future__ import annotations

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature
from rechub_dist.layers.arguments import check_layers
from rechub_dist.layers.grouped import GroupedMLP
from rechub_dist.layers.inputs import Fields
from rechub_dist.models.base import Model


class ESMM(Model):
    """logit_0 = MLP_0(x) of pCTR = p(click), logit_1 = MLP_1(x) of pCVR = p(conversion | click)  (section 2.3).

    The networks share the embeddings in x and nothing else. The losses are on the click, pCTR, and on click and
    conversion together, pCTCVR = pCTR * pCVR, over all impressions: pCVR has no loss, and so no sample, of its own. The
    objective implements this. Several kinds of conversion after one click (`num_conversions`) are our extension.

    Args:
        features: sparse, sequence (pooled by their mean) and dense features.
        hidden_units: widths of each task's network.
        tower_units: widths of the layers that follow, up to the logit; the paper does not separate towers from
            networks, so either list may be empty.
        embedding_dim: width of all embeddings.
        num_conversions: number of kinds of conversion, each given a click.
        dropout_rates: one rate per layer, of `hidden_units` and then `tower_units`, or one for all.
        activation: of all networks.
        batch_norm: batch normalisation in all networks.
    """

    table_width = "embedding_dim"
    paper = (
        "Ma et al. 2018, Entire Space Multi-Task Model: An Effective Approach for Estimating Post-Click Conversion Rate"
    )
    objectives = ("entire_space",)

    def __init__(
        self,
        features: list[Feature],
        hidden_units: list[int],
        tower_units: list[int],
        embedding_dim: int,
        *,
        num_conversions: int = 1,
        dropout_rates: float | list[float] = 0.0,
        activation: str = "relu",
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_layers("num_conversions", num_conversions)
        self.num_tasks = 1 + num_conversions
        self.task_types = ("classification",) * self.num_tasks
        self.fields = Fields.of(features, embedding_dim)
        self.networks = GroupedMLP(
            self.num_tasks,
            self.fields.width,
            [*hidden_units, *tower_units],
            dropout_rates,
            activation=activation,
            batch_norm=batch_norm,
            out_dim=1,
        )

    def lookups(self) -> tuple[Lookup, ...]:
        return self.fields.lookups

    def dense_features(self) -> tuple[DenseFeature, ...]:
        return self.fields.dense

    def forward(self, embedded: Embedded) -> Output:
        """Logits [B, 1 + num_conversions]: the click, then each conversion given a click."""
        return Output(logits=self.networks(self.fields.concat(embedded)).squeeze(2))
