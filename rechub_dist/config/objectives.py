"""Configuration of the training objectives."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from rechub_dist.config.code import check_name, is_code
from rechub_dist.config.section import MAX_BATCH, MAX_FLOAT, Section
from rechub_dist.errors import nearest, shown

LABEL_LOSSES: Final = ("cross_entropy", "focal", "squared_error", "huber", "softmax")
RETRIEVAL_LOSSES: Final = ("bce", "gbce", "softmax", "bpr", "bpr_max", "top1_max", "hinge")
TaskWeight = Annotated[float, Field(ge=0, le=MAX_FLOAT)]
OWN: Final = "package.module:Class"


class _OwnLoss(Section):
    """A loss by its name, which may be that of a user's own."""

    losses: ClassVar[tuple[str, ...]] = ()  # the short names
    with_arguments: ClassVar[bool] = False  # whether arguments may stand beside these

    loss: str | None = None
    loss_arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of the loss; of your own: of the class's constructor, or of the function after its "
        "tensors",
    )

    @field_validator("loss")
    @classmethod
    def _is_named(cls, given: str | None) -> str | None:
        return None if given is None else check_name(given, cls.losses)

    @model_validator(mode="after")
    def _arguments_of_a_loss(self) -> Self:
        if self.loss_arguments and not (is_code(self.loss) or (self.with_arguments and self.loss)):
            raise ValueError(
                "loss_arguments are those of the loss that loss names; name it there"
                if self.with_arguments
                else "loss_arguments are for your own loss: name it in loss"
            )
        return self


class LabelLossConfig(Section):
    """The loss of one label."""

    loss: str = Field(description=", ".join(LABEL_LOSSES))
    loss_arguments: dict[str, Any] = Field(default_factory=dict, description="its arguments (docs/losses.md)")

    @field_validator("loss")
    @classmethod
    def _is_known(cls, given: str) -> str:
        if given not in LABEL_LOSSES:
            raise ValueError(f"no loss of a label {shown(given)}: {nearest(given, LABEL_LOSSES)}")
        return given


class GroupLossConfig(Section):
    """A loss of classification labels that compares the rows of a group, such as a user's or a session's."""

    loss: Literal["pairwise", "listwise"] = Field(
        description="pairwise: the logistic loss of each positive against the group's negatives (BPR, RankNet); "
        "listwise: the cross-entropy of the softmax over the group"
    )
    group: str = Field(description="the column of the data that holds the group's key, integers or strings")
    share: float = Field(1.0, gt=0, le=1, description="its share of a label's loss; the rest is that of single rows")


class PointwiseConfig(_OwnLoss):
    """Cross-entropy for labels of two or more classes, squared error for regressions; a weighted sum over labels."""

    losses = LABEL_LOSSES
    with_arguments = True

    name: Literal["pointwise"] = "pointwise"
    task_weights: dict[str, TaskWeight] = Field(
        default_factory=dict, description="weight of each label's loss; default 1"
    )
    aux_weight: float = Field(
        1.0, ge=0, le=MAX_FLOAT, description="weight of the model's auxiliary losses, such as DIEN's"
    )
    loss: str | None = Field(
        None,
        description="cross_entropy or focal, for classification labels; squared_error or huber, for regression labels; "
        "softmax, for labels of several classes (docs/losses.md); or your own for all: package.module:name of a "
        "function of logits [B] (of C classes [B, C]) and labels [B] that returns one loss per row, [B], or of a class "
        "whose instances are such functions",
    )
    label_losses: dict[str, LabelLossConfig] = Field(
        default_factory=dict, description="losses of single labels, in place of `loss`: {like: {loss: focal}}"
    )
    group_loss: GroupLossConfig | None = Field(
        None, description="a loss within groups of the global batch's rows, beside or in place of that of single rows"
    )
    task_weighting: Literal["fixed", "uncertainty", "gradnorm", "pareto", "pcgrad"] = Field(
        "fixed", description="fixed: by task_weights; or found in training (docs/losses.md)"
    )
    gradnorm_alpha: float = Field(
        1.5, ge=0, le=100, description="gradnorm: how much tasks that learn more slowly are preferred; 0: not at all"
    )
    gradnorm_lr: float = Field(0.025, gt=0, le=MAX_FLOAT, description="gradnorm: learning rate of the weights")

    @property
    def weighs_gradients(self) -> bool:
        """Whether a step makes a backward pass of each label's loss."""
        return self.task_weighting in ("gradnorm", "pareto", "pcgrad")


class EntireSpaceConfig(Section):
    """ESMM's loss over all impressions: cross-entropy of the click, and of click and conversion together."""

    name: Literal["entire_space"] = "entire_space"
    task_weights: dict[str, TaskWeight] = Field(
        default_factory=dict, description="weight of each label's loss; default 1"
    )


class SamplingConfig(Section):
    """How negatives are sampled from the items."""

    name: Literal["uniform", "popularity", "file"] = "uniform"
    power: float = Field(
        0.75, ge=0, le=100, description="popularity: sampling probability is the item's count in train to this power"
    )
    path: str | None = Field(None, description="file: a .npy array with one weight per item; path or address")

    @model_validator(mode="after")
    def _path_for_file(self) -> Self:
        if (self.name == "file") != (self.path is not None):
            raise ValueError("path is for sampling from a file: set both name: file and path")
        return self


class RetrievalConfig(_OwnLoss):
    """Training of recall models on positives and negatives."""

    losses = RETRIEVAL_LOSSES

    name: Literal["retrieval"] = "retrieval"
    loss: str | None = Field(
        None,
        description=f"{', '.join(RETRIEVAL_LOSSES)}, or your own: package.module:name of a function of the positive's "
        "scores [M], the negatives' scores [M, C] and which of them count, bool [M, C], that returns one loss "
        "per position, [M], or of a class whose instances are such functions; default: the loss of the model's paper",
    )
    negatives: Literal["sampled", "in_batch", "in_batch_and_sampled", "full"] | None = Field(
        None,
        description="sampled: items sampled for each position; in_batch: the other positives of the global batch; "
        "in_batch_and_sampled: both, the sampled ones shared by the batch; full: all items; default: the model's",
    )
    num_negatives: int = Field(
        1, gt=0, le=MAX_BATCH, description="sampled negatives per position, or per row if they are shared"
    )
    share_negatives: bool = Field(False, description="use all sampled negatives of the global batch for every position")
    sampling: SamplingConfig = SamplingConfig()
    log_q: bool | None = Field(
        None,
        description="logQ correction of the softmax for how likely an item is among the candidates; default: on for "
        "softmax with in-batch negatives, or with shared ones that are not sampled uniformly",
    )
    temperature: Literal["learn"] | Annotated[float, Field(gt=0, le=MAX_FLOAT)] | None = Field(
        None,
        description="what scores are divided by, in place of the model's own temperature where it has one; learn: a "
        "parameter, trained by the dense optimizer; default: the model's, else 1",
    )
    temperature_start: float | None = Field(
        None,
        gt=0,
        le=MAX_FLOAT,
        description="first value of one that is learnt; default: the model's, else 1",
    )
    margin: float | None = Field(None, gt=0, le=MAX_FLOAT, description="margin of the hinge loss; default: the model's")
    gbce_t: float = Field(0.75, ge=0, le=1, description="calibration parameter t of gbce; 0 is bce")
    gbce_reduction: Literal["sum", "mean"] = Field(
        "sum",
        description="of gbce over a position's positive and negatives: sum, or, as its authors' code, mean",
    )
    regularization: float = Field(1.0, ge=0, le=MAX_FLOAT, description="regularisation weight of bpr_max")
    task_weights: dict[str, TaskWeight] = Field(
        default_factory=dict, description="weight of each auxiliary label's loss; default 1"
    )

    @model_validator(mode="after")
    def _start_of_what_is_learnt(self) -> Self:
        if self.temperature_start is not None and self.temperature != "learn":
            raise ValueError("temperature_start is that of temperature: learn; set temperature instead")
        return self


class OwnObjectiveConfig(Section):
    """An objective of your own."""

    name: str = Field(description="package.module:Class, derived from rechub_dist.objectives.TaskObjective")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="arguments of its constructor, besides the run's labels and the model"
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
