"""How recall models are evaluated; none of it is part of what makes two runs the same."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from rechub_dist.config.section import Section


class EvaluationConfig(Section):
    """Of recall models, whose evaluation ranks the whole catalogue for each row."""

    top_k: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (5, 10, 20), min_length=1, description="places of the ranking that its metrics look at"
    )
    exclude_seen: bool = Field(
        True, description="leave the items of the history, as long as the model reads it, out of the ranking"
    )
    sampled_items: int | None = Field(
        None, gt=0, description="rank also among so many drawn items, as older papers do; reported as sampled_..."
    )


def from_objective(tree: dict[str, Any]) -> dict[str, Any]:
    """A run's tree with evaluation settings in their own section, where they stand with the objective.

    They stood there at first; run files and checkpoints of that time are read on.

    Raises:
        ValueError: a setting stands in both places, with two values.
    """
    objective, evaluation = tree.get("objective"), tree.get("evaluation", {})
    if not isinstance(objective, dict) or objective.get("name") != "retrieval" or not isinstance(evaluation, dict):
        return tree
    moved = {key: value for key, value in objective.items() if key in EvaluationConfig.model_fields}
    for key, value in moved.items():
        if evaluation.get(key, value) != value:
            raise ValueError(
                f"objective.{key} is {value!r}, evaluation.{key} {evaluation[key]!r}; write it in evaluation alone"
            )
    rest = {key: value for key, value in objective.items() if key not in moved}
    return {**tree, "objective": rest, "evaluation": {**evaluation, **moved}}
