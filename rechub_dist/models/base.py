"""What every model is: a plain module that says what it looks up."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Lookup, LookupFeature, Output
from rechub_dist.features import DenseFeature, SequenceFeature
from rechub_dist.layers.arguments import MAX_LAYERS

TASK_TYPES = ("classification", "regression")


class Model(nn.Module):
    """Base of all models.

    Attributes:
        table_width: the constructor's parameter that sets the width of its tables (`embedding_dim`, `hidden_size`);
            None where the widths come with the features.
        paper: where the mathematics comes from.
        objectives: names of the objectives that can train it; the first is the default.
        num_tasks: logits a row, and so labels of a run.
        task_types: the labels' types in order; None leaves them to the labels.
    """

    table_width: ClassVar[str | None] = None
    paper: ClassVar[str] = ""
    objectives: ClassVar[tuple[str, ...]] = ("pointwise",)
    num_tasks: int = 1
    task_types: tuple[str, ...] | None = None

    def lookups(self) -> tuple[Lookup, ...]:
        """The tables that the model reads."""
        raise NotImplementedError

    def dense_features(self) -> tuple[DenseFeature, ...]:
        """The dense features that the model reads, in the order in which it wants them."""
        return ()

    def aligned_features(self) -> tuple[tuple[str, ...], ...]:
        """Groups of sequence features that belong together position by position; the reader checks their lengths."""
        return ()

    def forward(self, embedded: Embedded) -> Output:
        """The model's output for B rows, 0 included."""
        raise NotImplementedError


class RecallModel(Model):
    """A model that scores by the inner product of user and item vectors.

    `forward` is for training: each real one of the user's vectors [B, Q, D] has its item in the same place of
    [B, Q, D]. Models that learn at every position of a history have Q = L and its mask, the others Q = 1 and all real.

    `user` and `item` are what serving, evaluation and export use; a user's score for an item is the largest over the
    user's vectors. They may be scaled otherwise than in training, but they rank items as the model does.

    Attributes:
        loss: the loss that the paper trains the model with, which is the objective's default.
        negatives: where the objective's negatives come from by default: "sampled", "in_batch",
            "in_batch_and_sampled" or "full".
        every_position: learns at every position of its history, not at the row's item alone.
        margin: of the hinge loss.
    """

    objectives = ("retrieval",)
    num_tasks = 0
    loss: ClassVar[str]
    negatives: ClassVar[str]
    every_position: ClassVar[bool] = False
    margin: float = 0.2

    def user(self, embedded: Embedded) -> tuple[Tensor, Tensor]:
        """The user's vectors [B, Q, D] and which of them are live, bool [B, Q]."""
        raise NotImplementedError

    def item(self, embedded: Embedded) -> Tensor:
        """The item's vector, [B, D]."""
        raise NotImplementedError

    def item_lookups(self) -> tuple[Lookup, ...]:
        """The part of `lookups()` that `item` reads; the first is the item's id, a SparseFeature with one id a row."""
        raise NotImplementedError

    def item_dense_features(self) -> tuple[DenseFeature, ...]:
        """The part of `dense_features()` that `item` reads."""
        return ()

    def history(self) -> LookupFeature | None:
        """The sequence of the items that the user has seen; None where there is none, or no telling which it is.

        It is the sequence on the user's side that reads the table of the item's id: the longest, where the model reads
        one column at several lengths.
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
    """One known type a task, and at least one task."""
    if max(num_tasks, len(task_types)) > MAX_LAYERS:
        raise ValueError(f"{max(num_tasks, len(task_types))} tasks: a model has at most {MAX_LAYERS}")
    if num_tasks < 1 or len(task_types) != num_tasks:
        raise ValueError(
            f"num_tasks is {num_tasks} and task_types {list(task_types)}: give one type for each of at least one task"
        )
    for kind in task_types:
        if kind not in TASK_TYPES:
            raise ValueError(f"task type {kind!r} is unknown: use one of {', '.join(TASK_TYPES)}")
