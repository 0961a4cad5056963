"""The first-order (wide) part of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Lookup
from rechub_dist.features import DenseFeature, Feature, IdFeature
from rechub_dist.layers.inputs import check_distinct, pooling_of


class FirstOrder(nn.Module):
    """<w, x>: one scalar weight for each id, looked up as `<feature>.linear`, and one for each dense value.

    Several ids of a row are pooled as the feature says. There is no bias, which a model's last layer has.

    Args:
        features: any mix, at least one.
    """

    def __init__(self, features: Sequence[Feature]) -> None:
        super().__init__()
        if not features:
            raise ValueError("the first-order part has no features: give at least one feature")
        check_distinct(features)
        self.lookups = tuple(
            Lookup(f"{feature.name}.linear", feature, feature.table.linear, pooling_of(feature))
            for feature in features
            if isinstance(feature, IdFeature)
        )
        self.dense = tuple(feature for feature in features if isinstance(feature, DenseFeature))
        self.names = [lookup.name for lookup in self.lookups]
        width = sum(feature.dim for feature in self.dense)
        self.linear = nn.Linear(width, 1, bias=False) if width else None

    def forward(self, embedded: Embedded) -> Tensor:
        """[B, 1]."""
        terms = []
        if self.names:
            terms.append(embedded.concat(self.names, []).sum(dim=1, keepdim=True))
        if self.linear is not None:
            terms.append(self.linear(torch.cat([embedded.dense[feature.name] for feature in self.dense], dim=1)))
        return torch.stack(terms).sum(dim=0)
