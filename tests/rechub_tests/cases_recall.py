"""Small recall models."""

from __future__ import annotations

from rechub_dist.features import SequenceFeature, SparseFeature, Table
from rechub_dist.models import DSSM, NARM, RecallModel, SASRec

ITEM = Table("item", 11, dim=4)
item, history = SparseFeature("item", ITEM), SequenceFeature("history", ITEM, max_length=5)
kind = SparseFeature("kind", Table("kind", 3, dim=4))


def sasrec() -> RecallModel:
    return SASRec(11, max_len=5, num_heads=1, num_layers=1, hidden_size=4, dropout_rate=0.0)


def narm() -> RecallModel:
    return NARM(11, 4, 4, 0.0, 4)


def dssm(more: bool = False) -> RecallModel:
    return DSSM([history], [item, kind] if more else [item], [4], 0.0, 4)
