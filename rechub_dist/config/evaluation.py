"""How models are evaluated; none of it is part of what makes two runs the same."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from rechub_dist.config.section import Section

DEFAULT: Final = "default"  # the name that stands for the metrics that are reported unless a run file says otherwise


class MetricConfig(BaseModel):
    """A metric's name, and its parameters beside it; `as` is the name that it is reported by, by default its own."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    name: str
    as_: str | None = Field(None, alias="as")

    @property
    def is_default(self) -> bool:
        """Whether this stands for the metrics that are reported unless a run file says otherwise."""
        return self.name == DEFAULT

    @property
    def reported(self) -> str:
        """The name that it is reported by: of `package.module:Class` the class's."""
        return self.as_ or self.name.partition(":")[2] or self.name

    @property
    def parameters(self) -> dict[str, Any]:
        """The metric's parameters as written in the run file."""
        return dict(self.model_extra or {})


class EvaluationConfig(Section):
    """What is measured; all but `metrics` is for recall models, which rank the whole catalogue for each row."""

    metrics: tuple[str | MetricConfig, ...] = Field(
        (DEFAULT,),
        min_length=1,
        description="names, or a name with its parameters, {name: precision, threshold: 0.9} (docs/metrics.md); "
        "`default` stands for those that are reported otherwise",
    )
    top_k: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (5, 10, 20), min_length=1, description="places of the ranking that its metrics look at"
    )
    exclude_seen: bool = Field(
        True, description="leave the items of the history, as long as the model reads it, out of the ranking"
    )
    sampled_items: int | None = Field(
        None, gt=0, description="rank also among so many drawn items, as older papers do; reported as sampled_..."
    )

    @property
    def wanted(self) -> tuple[MetricConfig, ...]:
        """The metrics, names alone as well in the form with parameters."""
        return tuple(MetricConfig(name=item) if isinstance(item, str) else item for item in self.metrics)


_ONCE_OF_OBJECTIVE = ("top_k", "exclude_seen", "sampled_items")


def from_objective(tree: dict[str, Any]) -> dict[str, Any]:
    """A run's tree with evaluation settings in their own section, where they stand with the objective.

    They stood there at first; run files and checkpoints of that time are read on.

    Raises:
        ValueError: a setting stands in both places, with two values.
    """
    objective, evaluation = tree.get("objective"), tree.get("evaluation", {})
    if not isinstance(objective, dict) or objective.get("name") != "retrieval" or not isinstance(evaluation, dict):
        return tree
    moved = {key: value for key, value in objective.items() if key in _ONCE_OF_OBJECTIVE}
    for key, value in moved.items():
        if evaluation.get(key, value) != value:
            raise ValueError(
                f"objective.{key} is {value!r}, evaluation.{key} {evaluation[key]!r}; write it in evaluation alone"
            )
    rest = {key: value for key, value in objective.items() if key not in moved}
    return {**tree, "objective": rest, "evaluation": {**evaluation, **moved}}
