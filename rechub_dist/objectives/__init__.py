"""Objectives: from a model's output to its loss and predictions."""

from rechub_dist.objectives.base import Objective, TaskObjective
from rechub_dist.objectives.entire_space import EntireSpaceObjective
from rechub_dist.objectives.pointwise import PointwiseObjective
from rechub_dist.objectives.ranking import Ranking
from rechub_dist.objectives.retrieval import RetrievalObjective

__all__ = [
    "EntireSpaceObjective",
    "Objective",
    "PointwiseObjective",
    "Ranking",
    "RetrievalObjective",
    "TaskObjective",
]
