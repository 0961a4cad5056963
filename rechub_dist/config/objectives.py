"""What is minimised."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rechub_dist.config.code import check_name
from rechub_dist.config.section import Section


class PointwiseConfig(Section):
    """Cross-entropy for classification labels, squared error for regression, summed with weights over the labels."""

    name: Literal["pointwise"] = "pointwise"
    task_weights: dict[str, float] = Field(default_factory=dict, description="by label; 1 where none is given")
    aux_weight: float = Field(1.0, ge=0, description="of the model's own further losses, DIEN's for one")
    loss: str | None = Field(
        None,
        description="your own in place of both: package.module:name of a function of logits [B] and labels [B] that "
        "returns a loss a row, [B], or of a class whose objects are such functions",
    )
    loss_arguments: dict[str, Any] = Field(
        default_factory=dict, description="of that class's constructor, or of the function besides logits and labels"
    )

    @field_validator("loss")
    @classmethod
    def _is_named(cls, given: str | None) -> str | None:
        return None if given is None else check_name(given, ())

    @model_validator(mode="after")
    def _arguments_of_a_loss(self) -> Self:
        if self.loss_arguments and self.loss is None:
            raise ValueError("loss_arguments are those of your own loss: name it in loss")
        return self


class EntireSpaceConfig(Section):
    """ESMM's loss over all impressions: that of a click, and that of a click with its conversion."""

    name: Literal["entire_space"] = "entire_space"
    task_weights: dict[str, float] = Field(default_factory=dict)


class SamplingConfig(Section):
    """How negatives are drawn from the items."""

    name: Literal["uniform", "popularity", "file"] = "uniform"
    power: float = Field(0.75, ge=0, description="popularity: items are drawn by their count in train to this power")
    path: Path | None = Field(None, description="file: a .npy array of one weight an item")

    @model_validator(mode="after")
    def _path_for_file(self) -> Self:
        if (self.name == "file") != (self.path is not None):
            raise ValueError("path is for sampling from a file: give name: file and path together")
        return self


class RetrievalConfig(Section):
    """Training of recall models on positives against negatives."""

    name: Literal["retrieval"] = "retrieval"
    loss: Literal["bce", "gbce", "softmax", "bpr", "bpr_max", "top1_max", "hinge"] | None = Field(
        None, description="default: what the model's paper trains it with"
    )
    negatives: Literal["sampled", "in_batch", "in_batch_and_sampled", "full"] | None = Field(
        None,
        description="what a positive is compared with: items drawn for each position, the other positives of the "
        "global batch, both (drawn ones shared by the batch), or all items; default: the model's",
    )
    num_negatives: int = Field(1, gt=0, description="drawn negatives a position; shared ones a row")
    share_negatives: bool = Field(False, description="compare each position with all negatives of the global batch")
    sampling: SamplingConfig = SamplingConfig()
    log_q: bool | None = Field(
        None,
        description="correct a softmax for how often an item is among the candidates; default: where they are shared",
    )
    margin: float | None = Field(None, gt=0, description="of the hinge loss; default: the model's")
    gbce_t: float = Field(0.75, ge=0, le=1, description="calibration of gbce; 0 is bce")
    regularization: float = Field(1.0, ge=0, description="of bpr_max")
    task_weights: dict[str, float] = Field(default_factory=dict, description="auxiliary tasks, by label")


ObjectiveConfig = Annotated[PointwiseConfig | EntireSpaceConfig | RetrievalConfig, Field(discriminator="name")]
