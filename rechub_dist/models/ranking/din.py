"""DIN: behaviours weighted by their relevance to the candidate item, with a local activation unit."""

from __future__ import annotations

import torch

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature, Outputs, SequenceFeature, SparseFeature
from rechub_dist.layers.arguments import check_outputs
from rechub_dist.layers.attention import ActivationUnit
from rechub_dist.layers.inputs import Fields, check_distinct, check_pairs, unpooled
from rechub_dist.layers.mlp import MLP
from rechub_dist.models.base import Model


class DIN(Model):
    """logit = MLP([features, v, sum_j a(e_j, v) e_j, dense values])  (sections 4.2 and 4.3).

    e_j are the concatenated vectors of behaviour j (item, category, ...), v those of the candidate in the same order.
    The weights a(e_j, v) are not normalised, which keeps the intensity of an interest.

    Args:
        features: the other features of user and context; may be empty.
        behavior_features: the history, one sequence per attribute; all of a row's have the same length.
        attention_units: hidden widths of the activation unit.
        hidden_units: hidden widths of the MLP.
        activation: of both: "dice", "prelu", "relu", ...
        target_features: the candidate, one feature per attribute: target_features[i] and behavior_features[i] read
            the same table. They are part of the MLP's input, so leave them out of `features`.
        dropout_rates: of the MLP, one rate per hidden layer, or one for all.
        batch_norm: batch normalisation in the MLP.
        outputs: the number of logits in a list, [C] for a label of C classes; None for one.

    Every table's width is its own `dim`.
    """

    paper = "Zhou et al. 2018, Deep Interest Network for Click-Through Rate Prediction"

    def __init__(
        self,
        features: list[Feature],
        behavior_features: list[SequenceFeature],
        attention_units: list[int],
        hidden_units: list[int],
        activation: str = "dice",
        *,
        target_features: list[SparseFeature],
        dropout_rates: float | list[float] = 0.0,
        batch_norm: bool = False,
        outputs: Outputs = None,
    ) -> None:
        super().__init__()
        self.label_outputs = check_outputs(outputs, 1)
        check_distinct([*features, *target_features, *behavior_features])
        check_pairs(behavior_features, target_features)
        self.fields = Fields.of([*features, *target_features])
        self.behavior_lookups = unpooled(behavior_features)
        self.target_names = [feature.name for feature in target_features]
        width = sum(lookup.dim for lookup in self.behavior_lookups)
        self.attention = ActivationUnit(width, attention_units, activation)
        self.mlp = MLP(
            self.fields.width + width,
            hidden_units,
            dropout_rates,
            activation=activation,
            batch_norm=batch_norm,
            out_dim=self.label_outputs[0],
        )

    def lookups(self) -> tuple[Lookup, ...]:
        return (*self.fields.lookups, *self.behavior_lookups)

    def dense_features(self) -> tuple[DenseFeature, ...]:
        return self.fields.dense

    def aligned_features(self) -> tuple[tuple[str, ...], ...]:
        return (tuple(lookup.feature.name for lookup in self.behavior_lookups),)

    def forward(self, embedded: Embedded) -> Output:
        """Logits [B, 1], or [B, C]."""
        sequences = [embedded.sequences[lookup.name] for lookup in self.behavior_lookups]
        behaviors = torch.cat([sequence.values for sequence in sequences], dim=2)  # [B, L, D]
        target = embedded.concat(self.target_names, [])  # [B, D]
        interest = self.attention(behaviors, target, sequences[0].mask, sequences[0].total)  # [B, D]
        return Output(logits=self.mlp(torch.cat([self.fields.concat(embedded), interest], dim=1)))
