"""Configuration of evaluation; it may change when a run is resumed."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from rechub_dist.config.section import MAX_BATCH, MAX_FLOAT, MAX_ROWS, Section

DEFAULT: Final = "default"  # stands for the metrics that are reported by default


class MetricConfig(BaseModel):
    """A metric's name and parameters; `as` is the name it is reported under, by default its own."""

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
    """What is measured. `top_k`, `exclude_seen` and `sampled_items` are for recall models, which rank the catalogue."""

    metrics: tuple[str | MetricConfig, ...] = Field(
        (DEFAULT,),
        min_length=1,
        description="metric names, or names with parameters: {name: precision, threshold: 0.9} (docs/metrics.md); "
        "`default` stands for the default metrics",
    )
    top_k: tuple[Annotated[int, Field(gt=0, le=MAX_BATCH)], ...] = Field(
        (5, 10, 20), min_length=1, max_length=1000, description="cut-offs k of the ranking metrics"
    )
    exclude_seen: bool = Field(
        True, description="exclude the items of the history that the model reads from the ranking"
    )
    sampled_items: int | None = Field(
        None,
        gt=0,
        le=MAX_ROWS,
        description="also rank among so many sampled items, as older papers do; reported as sampled_...",
    )
    combined: dict[str, Annotated[float, Field(ge=-MAX_FLOAT, le=MAX_FLOAT)]] | None = Field(
        None,
        min_length=1,
        description="report a weighted sum of metrics as `combined`, higher being better, by which the best checkpoint "
        "is then chosen: {click/auc: 1, like/auc: 0.5}; give losses and errors negative weights",
    )
    calibration: Literal["temperature", "isotonic"] | None = Field(
        None,
        description="calibrate predicted probabilities by a temperature or a curve fitted on the valid split with "
        "the best weights; the final test, evaluate, predict and export apply it, evaluations while training do not",
    )

    @property
    def wanted(self) -> tuple[MetricConfig, ...]:
        """`metrics`, with plain names converted to `MetricConfig`."""
        return tuple(MetricConfig(name=item) if isinstance(item, str) else item for item in self.metrics)


_ONCE_OF_OBJECTIVE = ("top_k", "exclude_seen", "sampled_items")


def from_objective(tree: dict[str, Any]) -> dict[str, Any]:
    """Move evaluation settings from `objective` to `evaluation` in a configuration tree; returns the new tree.

    Early versions had them under `objective`; their run files and checkpoints can still be read.

    Raises:
        ValueError: a setting has different values in both places.
    """
    objective, evaluation = tree.get("objective"), tree.get("evaluation", {})
    if not isinstance(objective, dict) or objective.get("name") != "retrieval" or not isinstance(evaluation, dict):
        return tree
    moved = {key: value for key, value in objective.items() if key in _ONCE_OF_OBJECTIVE}
    for key, value in moved.items():
        if evaluation.get(key, value) != value:
            raise ValueError(
                f"objective.{key} is {value!r}, evaluation.{key} {evaluation[key]!r}; keep only evaluation.{key}"
            )
    rest = {key: value for key, value in objective.items() if key not in moved}
    return {**tree, "objective": rest, "evaluation": {**evaluation, **moved}}
