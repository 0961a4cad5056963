"""Configuration of the training objectives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rechub_dist.config.code import check_name
from rechub_dist.config.section import Section


class PointwiseConfig(Section):
    """Cross-entropy for classification labels, squared error for regression labels; a weighted sum over labels."""

    name: Literal["pointwise"] = "pointwise"
    task_weights: dict[str, float] = Field(default_factory=dict, description="weight of each label's loss; default 1")
    aux_weight: float = Field(1.0, ge=0, description="weight of the model's auxiliary losses, such as DIEN's")
    loss: str | None = Field(
        None,
        description="your own loss for both: package.module:name of a function of logits [B] and labels [B] that "
        "returns one loss per row, [B], or of a class whose instances are such functions",
    )
    loss_arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of that class's constructor, or of the function after logits and labels",
    )

    @field_validator("loss")
    @classmethod
    def _is_named(cls, given: str | None) -> str | None:
        return None if given is None else check_name(given, ())

    @model_validator(mode="after")
    def _arguments_of_a_loss(self) -> Self:
        if self.loss_arguments and self.loss is None:
            raise ValueError("loss_arguments are for your own loss: name it in loss")
        return self


class EntireSpaceConfig(Section):
    """ESMM's loss over all impressions: cross-entropy of the click, and of click and conversion together."""

    name: Literal["entire_space"] = "entire_space"
    task_weights: dict[str, float] = Field(default_factory=dict, description="weight of each label's loss; default 1")


class SamplingConfig(Section):
    """How negatives are sampled from the items."""

    name: Literal["uniform", "popularity", "file"] = "uniform"
    power: float = Field(
        0.75, ge=0, description="popularity: sampling probability is the item's count in train to this power"
    )
    path: Path | None = Field(None, description="file: a .npy array with one weight per item")

    @model_validator(mode="after")
    def _path_for_file(self) -> Self:
        if (self.name == "file") != (self.path is not None):
            raise ValueError("path is for sampling from a file: set both name: file and path")
        return self


class RetrievalConfig(Section):
    """Training of recall models on positives and negatives."""

    name: Literal["retrieval"] = "retrieval"
    loss: Literal["bce", "gbce", "softmax", "bpr", "bpr_max", "top1_max", "hinge"] | None = Field(
        None, description="default: the loss of the model's paper"
    )
    negatives: Literal["sampled", "in_batch", "in_batch_and_sampled", "full"] | None = Field(
        None,
        description="sampled: items sampled for each position; in_batch: the other positives of the global batch; "
        "in_batch_and_sampled: both, the sampled ones shared by the batch; full: all items; default: the model's",
    )
    num_negatives: int = Field(1, gt=0, description="sampled negatives per position, or per row if they are shared")
    share_negatives: bool = Field(False, description="use all sampled negatives of the global batch for every position")
    sampling: SamplingConfig = SamplingConfig()
    log_q: bool | None = Field(
        None,
        description="logQ correction of the softmax for how likely an item is among the candidates; default: on for "
        "softmax with in-batch negatives, and for shared negatives that are not sampled uniformly",
    )
    margin: float | None = Field(None, gt=0, description="margin of the hinge loss; default: the model's")
    gbce_t: float = Field(0.75, ge=0, le=1, description="calibration parameter t of gbce; 0 is bce")
    regularization: float = Field(1.0, ge=0, description="regularisation weight of bpr_max")
    task_weights: dict[str, float] = Field(
        default_factory=dict, description="weight of each auxiliary label's loss; default 1"
    )


ObjectiveConfig = Annotated[PointwiseConfig | EntireSpaceConfig | RetrievalConfig, Field(discriminator="name")]
