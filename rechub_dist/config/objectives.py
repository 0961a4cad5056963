"""What is minimised."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from rechub_dist.config.code import check_name, is_code
from rechub_dist.config.section import Section

RETRIEVAL_LOSSES: Final = ("bce", "gbce", "softmax", "bpr", "bpr_max", "top1_max", "hinge")
OWN: Final = "package.module:Class"


class _OwnLoss(Section):
    """A loss by its name, which may be that of a user's own."""

    losses: ClassVar[tuple[str, ...]] = ()  # the short names

    loss: str | None = None
    loss_arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="of your own loss: of the class's constructor, or what the function takes besides",
    )

    @field_validator("loss")
    @classmethod
    def _is_named(cls, given: str | None) -> str | None:
        return None if given is None else check_name(given, cls.losses)

    @model_validator(mode="after")
    def _arguments_of_a_loss(self) -> Self:
        if self.loss_arguments and not is_code(self.loss):
            raise ValueError("loss_arguments are those of your own loss: name it in loss")
        return self


class PointwiseConfig(_OwnLoss):
    """Cross-entropy for classification labels, squared error for regression, summed with weights over the labels."""

    name: Literal["pointwise"] = "pointwise"
    task_weights: dict[str, float] = Field(default_factory=dict, description="by label; 1 where none is given")
    aux_weight: float = Field(1.0, ge=0, description="of the model's own further losses, DIEN's for one")
    loss: str | None = Field(
        None,
        description="your own in place of both: package.module:name of a function of logits [B] and labels [B] that "
        "returns a loss a row, [B], or of a class whose objects are such functions",
    )


class EntireSpaceConfig(Section):
    """ESMM's loss over all impressions: that of a click, and that of a click with its conversion."""

    name: Literal["entire_space"] = "entire_space"
    task_weights: dict[str, float] = Field(default_factory=dict)


class SamplingConfig(Section):
    """How negatives are drawn from the items."""

    name: Literal["uniform", "popularity", "file"] = "uniform"
    power: float = Field(0.75, ge=0, description="popularity: items are drawn by their count in train to this power")
    path: str | None = Field(None, description="file: a .npy array of one weight an item, path or address")

    @model_validator(mode="after")
    def _path_for_file(self) -> Self:
        if (self.name == "file") != (self.path is not None):
            raise ValueError("path is for sampling from a file: give name: file and path together")
        return self


class RetrievalConfig(_OwnLoss):
    """Training of recall models on positives against negatives."""

    losses = RETRIEVAL_LOSSES

    name: Literal["retrieval"] = "retrieval"
    loss: str | None = Field(
        None,
        description=f"{', '.join(RETRIEVAL_LOSSES)}, or your own: package.module:name of a function of the positive's "
        "scores [M], the negatives' scores [M, C] and which of them count, bool [M, C], that returns a loss a "
        "position, [M], or of a class whose objects are such functions; default: what the model's paper trains it with",
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


class OwnObjectiveConfig(Section):
    """An objective of your own."""

    name: str = Field(description="package.module:Class, derived from rechub_dist.objectives.TaskObjective")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="of its constructor, besides the run's labels and the model"
    )

    @field_validator("name")
    @classmethod
    def _is_named(cls, given: str) -> str:
        return check_name(given, ())


def _tag(tree: Any) -> Any:
    name = tree.get("name") if isinstance(tree, dict) else getattr(tree, "name", None)
    return OWN if is_code(name) else name


ObjectiveConfig = Annotated[
    Annotated[PointwiseConfig, Tag("pointwise")]
    | Annotated[EntireSpaceConfig, Tag("entire_space")]
    | Annotated[RetrievalConfig, Tag("retrieval")]
    | Annotated[OwnObjectiveConfig, Tag(OWN)],
    Discriminator(
        _tag,
        custom_error_type="objective",
        custom_error_message=f"its name must be pointwise, entire_space, retrieval, or that of your own, {OWN}",
    ),
]
