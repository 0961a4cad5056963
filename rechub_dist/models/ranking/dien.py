"""DIEN: extracts interests from the behaviours, and models their evolution towards the candidate item."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature, NegativeFeature, Outputs, SequenceFeature, SparseFeature
from rechub_dist.layers.arguments import check_choice, check_outputs, check_widths
from rechub_dist.layers.attention import BilinearAttention
from rechub_dist.layers.inputs import Fields, check_cut, check_distinct, check_pairs, check_same_table, unpooled
from rechub_dist.layers.masking import last, zero_padding
from rechub_dist.layers.mlp import MLP
from rechub_dist.layers.recurrent import AIGRU, AUGRU
from rechub_dist.models.base import Model

GruType = Literal["AUGRU", "AIGRU"]
NEXT_BEHAVIOR = "next_behavior"


class DIEN(Model):
    """logit = MLP([features, e_a, h'_n, dense values]), h'_n the final interest  ("Deep Interest Evolution Network").

    e_t are the concatenated vectors of behaviour t (item, category, ...), e_a those of the candidate in the same order.

    - Interest extractor layer: h_t = GRU(e_1 .. e_t).
    - Attention: a_t = softmax over t of h_t^T W e_a.
    - Interest evolving layer: h'_t = AUGRU(h_t, a_t), whose update gate is scaled by a_t, or AIGRU: GRU(a_t h_t).

    A row without behaviours has an interest of zeros.

    The auxiliary loss ("Interest Extractor Layer") is `Output.aux["next_behavior"]`: the state h_t is trained to
    distinguish the next behaviour from a negative one, -log s(<h_t, e_{t+1}>) - log(1 - s(<h_t, ê_{t+1}>)), t < n.
    Two details differ from the paper. The inner product is the bilinear form h^T W e, so that states may have
    any width; W = I gives the paper's. And we average a row's n - 1 terms instead of summing them, so that the loss
    does not grow with the history. A row with fewer than two behaviours has 0.

    The authors' code is another model than their paper's, which we follow: its attention is an MLP of [e, h, e - h,
    e * h] under the softmax, its auxiliary loss has an MLP of [h, e] in place of the inner product and is averaged over
    all positions of the padded batch, its AUGRU keeps (1 - a) u of the state, u being the share that a GRU keeps, so
    that an input of weight 0 changes it nevertheless, and its MLP also reads the sum of the history.

    Args:
        features: the other features of user and context; may be empty.
        behavior_features: the history in time order, one sequence per attribute; all of a row's have the same length.
        interest_units: widths of the extractor's GRUs, one after the other (the paper has one). The last is also the
            width of the evolving interest.
        gru_type: "AUGRU" or "AIGRU".
        hidden_units: hidden widths of the MLP.
        target_features: the candidate, one feature per attribute: target_features[i] and behavior_features[i] read
            the same table. They are part of the MLP's input, so leave them out of `features`.
        negative_features: a negative behaviour for each position, one sequence per attribute:
            negative_features[i] and behavior_features[i] read the same table and have equal lengths. None draws each
            attribute independently and uniformly, as the feature `<behaviour feature>.negative`; the first one, which
            should be the item, from the ids that are not in the row's history. If attributes depend on each other
            (an item and its category), give columns instead.
        activation: of the MLP: "dice", "prelu", "relu", ...
        dropout_rates: of the MLP, one rate per hidden layer, or one for all.
        batch_norm: batch normalisation in the MLP.
        outputs: the number of logits in a list, [C] for a label of C classes; None for one.

    Every table's width is its own `dim`.
    """

    paper = "Zhou et al. 2019, Deep Interest Evolution Network for Click-Through Rate Prediction"

    def __init__(
        self,
        features: list[Feature],
        behavior_features: list[SequenceFeature],
        interest_units: list[int],
        gru_type: GruType,
        hidden_units: list[int],
        *,
        target_features: list[SparseFeature],
        negative_features: list[SequenceFeature] | None = None,
        activation: str = "dice",
        dropout_rates: float | list[float] = 0.0,
        batch_norm: bool = False,
        outputs: Outputs = None,
    ) -> None:
        super().__init__()
        self.label_outputs = check_outputs(outputs, 1)
        check_choice("gru_type", gru_type, get_args(GruType))
        if not interest_units:
            raise ValueError("interest_units is empty: give at least one width")
        check_widths("interest_units", interest_units)
        check_distinct([*features, *target_features, *behavior_features, *(negative_features or [])])
        check_pairs(behavior_features, target_features)
        if negative_features is not None:
            _check_negatives(behavior_features, negative_features)
        self.given_negatives = negative_features is not None
        self.fields = Fields.of([*features, *target_features])
        self.target_names = [feature.name for feature in target_features]
        self.behavior_lookups = unpooled(behavior_features)
        self.negative_lookups = unpooled(negative_features or _drawn(behavior_features))

        width = sum(lookup.dim for lookup in self.behavior_lookups)
        interest = interest_units[-1]
        inputs = [width, *interest_units[:-1]]
        self.extractor = nn.ModuleList(
            nn.GRU(before, after, batch_first=True) for before, after in zip(inputs, interest_units, strict=True)
        )
        self.next_behavior = nn.Linear(interest, width, bias=False)
        self.attention = BilinearAttention(interest, width)
        self.evolution = (AUGRU if gru_type == "AUGRU" else AIGRU)(interest, interest)
        self.mlp = MLP(
            self.fields.width + interest,
            hidden_units,
            dropout_rates,
            activation=activation,
            batch_norm=batch_norm,
            out_dim=self.label_outputs[0],
        )

    def lookups(self) -> tuple[Lookup, ...]:
        return (*self.fields.lookups, *self.behavior_lookups, *self.negative_lookups)

    def dense_features(self) -> tuple[DenseFeature, ...]:
        return self.fields.dense

    def aligned_features(self) -> tuple[tuple[str, ...], ...]:
        together = (*self.behavior_lookups, *(self.negative_lookups if self.given_negatives else ()))
        return (tuple(lookup.feature.name for lookup in together),)

    def forward(self, embedded: Embedded) -> Output:
        """Logits [B, 1], or [B, C], and the auxiliary loss `next_behavior` [B]."""
        history = embedded.sequences[self.behavior_lookups[0].name]
        behaviors = _side_by_side(embedded, self.behavior_lookups, history.mask)  # [B, L, E]
        negatives = _side_by_side(embedded, self.negative_lookups, history.mask)
        interests = behaviors
        for gru in self.extractor:
            interests, _ = gru(interests)  # [B, L, H]; padding comes after all that is real

        target = embedded.concat(self.target_names, [])  # [B, E]
        weights = self.attention(interests, target, history.mask)  # [B, L]
        interest = last(self.evolution(interests, weights), history.lengths)  # [B, H]
        logits = self.mlp(torch.cat([self.fields.concat(embedded), interest], dim=1))
        return Output(logits, aux={NEXT_BEHAVIOR: self._next_loss(interests, behaviors, negatives, history.lengths)})

    def _next_loss(self, interests: Tensor, behaviors: Tensor, negatives: Tensor, lengths: Tensor) -> Tensor:
        """The auxiliary loss of each row, [B]."""
        predicted = self.next_behavior(interests)[:, :-1]  # [B, L - 1, E]
        happened = (predicted * behaviors[:, 1:]).sum(dim=2)
        drawn = (predicted * negatives[:, 1:]).sum(dim=2)
        loss = F.softplus(-happened) + F.softplus(drawn)  # [B, L - 1]
        pairs = lengths - 1
        real = torch.arange(loss.shape[1], device=loss.device) < pairs[:, None]
        return loss.masked_fill(~real, 0.0).sum(dim=1) / pairs.clamp(min=1)


def _drawn(behaviors: list[SequenceFeature]) -> list[NegativeFeature]:
    """Only the first excludes the history, which may contain all rows of a small table, such as categories."""
    return [
        NegativeFeature(
            f"{behavior.name}.negative",
            behavior.table,
            like=behavior.name,
            exclude=(behavior.name,) if behavior is behaviors[0] else (),
        )
        for behavior in behaviors
    ]


def _side_by_side(embedded: Embedded, lookups: tuple[Lookup, ...], mask: Tensor) -> Tensor:
    """The concatenated vectors per position, zeros where padded: [B, L, E]."""
    return zero_padding(torch.cat([embedded.sequences[lookup.name].values for lookup in lookups], dim=2), mask)


def _check_negatives(behavior_features: list[SequenceFeature], negative_features: list[SequenceFeature]) -> None:
    """Check that each behaviour feature has a negative feature with the same table and truncation."""
    if len(negative_features) != len(behavior_features):
        raise ValueError(
            f"{len(behavior_features)} behavior_features and {len(negative_features)} negative_features: give one "
            f"negative feature for each behaviour feature, or leave negative_features out to have them drawn"
        )
    for behavior, negative in zip(behavior_features, negative_features, strict=True):
        if not isinstance(negative, SequenceFeature):
            raise ValueError(f"negative feature {negative.name!r} is {negative.kind}: make it a SequenceFeature")
        check_same_table("behaviour feature", behavior, "its negative feature", negative)
    check_cut([*behavior_features, *negative_features])
