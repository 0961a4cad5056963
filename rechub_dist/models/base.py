"""The base classes of models: plain modules that declare their lookups."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, LookupFeature, SequenceFeature
from rechub_dist.layers.arguments import MAX_LAYERS

TASK_TYPES = ("classification", "regression", "multiclass")


class Model(nn.Module):
    """Base of all models.

    Attributes:
        table_width: the constructor's parameter that sets the width of its tables (`embedding_dim`, `hidden_size`);
            None where the widths come with the features.
        paper: the paper that defines the model.
        objectives: names of the objectives that can train it; the first is the default.
        num_tasks: logits per row, and so labels of a run.
        task_types: the labels' types in order; None: any types.
        label_outputs: logits of each label in order, one a class for a label of several; empty: one each.
    """

    table_width: ClassVar[str | None] = None
    paper: ClassVar[str] = ""
    objectives: ClassVar[tuple[str, ...]] = ("pointwise",)
    num_tasks: int = 1
    task_types: tuple[str, ...] | None = None
    label_outputs: tuple[int, ...] = ()

    def lookups(self) -> tuple[Lookup, ...]:
        """The tables that the model reads."""
        raise NotImplementedError

    def dense_features(self) -> tuple[DenseFeature, ...]:
        """The dense features that the model reads, in the order in which it expects them."""
        return ()

    def aligned_features(self) -> tuple[tuple[str, ...], ...]:
        """Groups of sequence features aligned position by position; the reader checks that their lengths agree."""
        return ()

    def shared_parameters(self) -> tuple[nn.Parameter, ...]:
        """Of a model of several tasks, the dense parameters that all of them share, from input to output.

        The last one of more than one dimension is the weight of the last shared layer. None, unless a model says so.
        """
        return ()

    def forward(self, embedded: Embedded) -> Output:
        """The model's output for B rows, 0 included."""
        raise NotImplementedError


class RecallModel(Model):
    """A model that scores by the inner product of user and item vectors.

    `forward` is for training: each unmasked user vector in [B, Q, D] has its target item at the same position of
    another [B, Q, D]. Models that learn at every position of a history have Q = L and its mask, the others Q = 1.

    `user` and `item` are for serving, evaluation and export; a user's score for an item is the maximum over the user's
    vectors. They may be scaled differently than in training, but rank items identically.

    Attributes:
        loss: the loss of the model's paper, the objective's default.
        negatives: the objective's default source of negatives: "sampled", "in_batch",
            "in_batch_and_sampled" or "full".
        every_position: whether it learns at every position of the history, not only at the row's item.
        margin: default margin of the hinge loss.
        temperature: what the scores of `user` and `item` have been divided by.
    """

    objectives = ("retrieval",)
    num_tasks = 0
    loss: ClassVar[str]
    negatives: ClassVar[str]
    every_position: ClassVar[bool] = False
    margin: float = 0.2
    temperature: float = 1.0

    def user(self, embedded: Embedded) -> tuple[Tensor, Tensor]:
        """The user's vectors [B, Q, D] and which of them are valid, bool [B, Q]."""
        raise NotImplementedError

    def item(self, embedded: Embedded) -> Tensor:
        """The item's vector, [B, D]."""
        raise NotImplementedError

    def score(self, user: Tensor, items: Tensor) -> Tensor:
        """The training scores of users [M, D], those of `forward`, for the same items [C, D]: [M, C].

        Like `score_own`, it has no parameters. A model that scores in training otherwise than by inner products
        overrides both.
        """
        return user @ items.T

    def score_own(self, user: Tensor, items: Tensor) -> Tensor:
        """The training scores of users [M, D] for items of their own, [M, K, D]: [M, K]; or one each, [M, D]: [M]."""
        return (user * items).sum(dim=1) if items.dim() == 2 else torch.einsum("md,mkd->mk", user, items)

    def item_lookups(self) -> tuple[Lookup, ...]:
        """The part of `lookups()` that `item` reads; first the item's id, a SparseFeature with one id per row."""
        raise NotImplementedError

    def item_dense_features(self) -> tuple[DenseFeature, ...]:
        """The part of `dense_features()` that `item` reads."""
        return ()

    def history(self) -> LookupFeature | None:
        """The sequence of items that the user has seen; None if there is none, or it is ambiguous.

        It is the user-side sequence that reads the table of the item's id; the longest if the model reads one column
        at several lengths.
        """
        items = self.item_lookups()
        found = [
            lookup.feature
            for lookup in self.lookups()
            if isinstance(lookup.feature, SequenceFeature)
            and lookup not in items
            and lookup.table.name == items[0].table.name
        ]
        if len({feature.source for feature in found}) != 1:
            return None
        return max(found, key=lambda feature: feature.max_length)


def check_tasks(num_tasks: int, task_types: list[str]) -> None:
    """Check that there is at least one task, and a known type for each."""
    if max(num_tasks, len(task_types)) > MAX_LAYERS:
        raise ValueError(f"{max(num_tasks, len(task_types))} tasks: a model has at most {MAX_LAYERS}")
    if num_tasks < 1 or len(task_types) != num_tasks:
        raise ValueError(
            f"num_tasks is {num_tasks} and task_types {list(task_types)}: give one type for each of at least one task"
        )
    for kind in task_types:
        if kind not in TASK_TYPES:
            raise ValueError(f"task type {kind!r} is unknown: use one of {', '.join(TASK_TYPES)}")
