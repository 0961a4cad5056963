"""FacebookDSSM: embedding-based retrieval with a triplet loss, and auxiliary tasks on the same towers."""

from __future__ import annotations

import torch
from torch import Tensor

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature
from rechub_dist.layers.arguments import check_widths
from rechub_dist.layers.grouped import GroupedMLP
from rechub_dist.layers.inputs import check_sides
from rechub_dist.layers.towers import Tower, unit
from rechub_dist.models.base import RecallModel, check_tasks


class FacebookDSSM(RecallModel):
    """score = cos(u, i), u and i the outputs of two MLPs  (section 2); logit_k = h_k([u, i]).

    The paper's loss for a user, an item that was clicked and one that was not is max(0, D(u, i+) - D(u, i-) + margin),
    D = 1 - cos. The objective implements it, with the model's `margin`.

    The auxiliary tasks (clicks, purchases, ...) are our addition: a small network per task reads the concatenated
    outputs of the towers, before they are scaled to unit length, so that the towers learn from every label. Retrieval
    uses only the towers.

    Args:
        user_features: features of the user and the context: sparse, sequence (pooled by their mean) and dense features.
        item_features: features of the item, its id first, a sparse feature with one id per row. No name may be in both
            lists; features of both may read one table.
        hidden_units: widths of each tower's layers; the last one is linear and gives the vector.
        num_tasks: number of auxiliary tasks; 0 gives the paper's model.
        task_types: "classification" or "regression" for each task, in the run's label order.
        margin: of the triplet loss.
        dropout_rates: of each tower, one rate for each layer but the last, or one for all.
        task_hidden_units: hidden widths of each task's network. None: one layer of the width of a tower's output; with
            [] a task is linear, and cannot model interactions between user and item.
        activation: of all hidden layers.
        batch_norm: batch normalisation in all hidden layers.

    Every table's width is its own `dim`.
    """

    paper = "Huang et al. 2020, Embedding-based Retrieval in Facebook Search"
    loss = "hinge"
    negatives = "in_batch"

    def __init__(
        self,
        user_features: list[Feature],
        item_features: list[Feature],
        hidden_units: list[int],
        num_tasks: int,
        task_types: list[str],
        *,
        margin: float = 0.2,
        dropout_rates: float | list[float] = 0.0,
        task_hidden_units: list[int] | None = None,
        activation: str = "relu",
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if not hidden_units:
            raise ValueError("hidden_units is empty: give at least the width of the vectors")
        check_widths("hidden_units", hidden_units)
        if not margin > 0:
            raise ValueError(f"margin is {margin}: it must be above 0")
        if num_tasks or task_types:
            check_tasks(num_tasks, task_types)
        check_sides(user_features, item_features)
        self.num_tasks, self.task_types = num_tasks, tuple(task_types)
        self.margin = margin
        *hidden, width = hidden_units
        self.user_tower, self.item_tower = (
            Tower(features, hidden, dropout_rates, width, activation=activation, batch_norm=batch_norm)
            for features in (user_features, item_features)
        )
        self.heads = None
        if num_tasks:
            self.heads = GroupedMLP(
                num_tasks,
                2 * width,
                [width] if task_hidden_units is None else task_hidden_units,
                activation=activation,
                batch_norm=batch_norm,
                out_dim=1,
            )

    def lookups(self) -> tuple[Lookup, ...]:
        return (*self.user_tower.fields.lookups, *self.item_tower.fields.lookups)

    def item_lookups(self) -> tuple[Lookup, ...]:
        return self.item_tower.fields.lookups

    def dense_features(self) -> tuple[DenseFeature, ...]:
        return (*self.user_tower.fields.dense, *self.item_tower.fields.dense)

    def item_dense_features(self) -> tuple[DenseFeature, ...]:
        return self.item_tower.fields.dense

    def forward(self, embedded: Embedded) -> Output:
        """`user` and `item`, both [B, 1, D] and of unit length, and logits [B, num_tasks], None without tasks."""
        u, i = self.user_tower(embedded), self.item_tower(embedded)
        user = unit(u)[:, None]
        logits = None if self.heads is None else self.heads(torch.cat([u, i], dim=1)).squeeze(2)
        mask = torch.ones_like(user[..., 0], dtype=torch.bool)
        return Output(logits=logits, user=user, user_mask=mask, item=unit(i)[:, None])

    def user(self, embedded: Embedded) -> tuple[Tensor, Tensor]:
        """The user's vector, [B, 1, D], of unit length."""
        user = unit(self.user_tower(embedded))[:, None]
        return user, torch.ones_like(user[..., 0], dtype=torch.bool)

    def item(self, embedded: Embedded) -> Tensor:
        """The item's vector, [B, D], of unit length."""
        return unit(self.item_tower(embedded))
