"""A small instance of every model, and batches for it.

A model's case is the function here that is named after its file: it takes nothing and returns the model. What
`test_catalogue.py` proves of the others, it then proves of that model too.
"""

from __future__ import annotations

import sys
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from rechub_dist.embedded import Embedded, Output, Sequence
from rechub_dist.features import (
    CrossFeature,
    DenseFeature,
    NegativeFeature,
    SequenceFeature,
    SparseFeature,
    Table,
    TimeGapFeature,
)
from rechub_dist.models import Model
from rechub_dist.models.multitask.esmm import ESMM
from rechub_dist.models.multitask.mmoe import MMoE
from rechub_dist.models.multitask.ple import PLE
from rechub_dist.models.multitask.sharedbottom import SharedBottom
from rechub_dist.models.ranking.afm import AFM
from rechub_dist.models.ranking.bst import BST
from rechub_dist.models.ranking.dcn import DCN
from rechub_dist.models.ranking.dcnv2 import DCNv2
from rechub_dist.models.ranking.deepfm import DeepFM
from rechub_dist.models.ranking.dien import DIEN
from rechub_dist.models.ranking.din import DIN
from rechub_dist.models.ranking.edcn import EDCN
from rechub_dist.models.ranking.fibinet import FiBiNET
from rechub_dist.models.ranking.widedeep import WideDeep
from rechub_dist.models.recall.dssm import DSSM
from rechub_dist.models.recall.facebookdssm import FacebookDSSM
from rechub_dist.models.recall.gru4rec import GRU4Rec
from rechub_dist.models.recall.mind import MIND
from rechub_dist.models.recall.narm import NARM
from rechub_dist.models.recall.sasrec import SASRec
from rechub_dist.models.recall.youtubednn import YoutubeDNN

USER, ITEM, SHOP = Table("user", 7, dim=4), Table("item", 11, dim=4), Table("shop", 5, dim=2)
user = SparseFeature("user", USER)
item = SparseFeature("item", ITEM)
shop = SparseFeature("shop", SHOP)
tags = SparseFeature("tags", Table("tag", 6, dim=4), pooling="mean")
history = SequenceFeature("history", ITEM, max_length=5)
shops = SequenceFeature("shops", SHOP, max_length=5)
kind = SparseFeature("kind", Table("kind", 6))
kinds = SequenceFeature("kinds", kind.table, max_length=5)
gaps = TimeGapFeature("gaps", times="times", now="now", boundaries=(1.0, 60.0), max_length=5)
liked = SequenceFeature("liked", ITEM, max_length=5)
age = DenseFeature("age")
profile = DenseFeature("profile", dim=3)
price = DenseFeature("price")
visit = CrossFeature("visit", (user, shop), buckets=9)
match = CrossFeature("match", (user, tags), buckets=13, dim=4)


def afm() -> Model:
    return AFM([user, age, tags, history, match, profile], [6], 4, 0.0)


def bst() -> Model:
    features, targets = [user, age, shop, tags, liked, profile], [item, kind]
    sizes = {"hidden_units": [8, 5], "feedforward_units": 7}
    return BST(features, [history, kinds], 2, 2, 4, 0.0, target_features=targets, time_gaps=gaps, **sizes)


def dcn() -> Model:
    return DCN([user, age, shop, tags, history, profile], 3, [8, 6])


def dcnv2() -> Model:
    return DCNv2([user, age, shop, tags, history, profile], 2, [8, 6], low_rank=3, num_experts=4)


def deepfm() -> Model:
    return DeepFM([user, age, tags, history, profile], [8, 6], 0.0, embedding_dim=4)


def dien() -> Model:
    features, targets = [user, age, tags, liked, profile], [item, shop]
    return DIEN(features, [history, shops], [5, 3], "AUGRU", [8, 5], target_features=targets)


def din() -> Model:
    return DIN([user, age], [history, shops], [6], [8, 5], "dice", target_features=[item, shop])


def edcn() -> Model:
    return EDCN([user, age, shop, tags, history, profile], 2, [18, 7], "FGU")


def fibinet() -> Model:
    return FiBiNET([user, age, tags, history, match, profile], "field_interaction", [8, 6], 2)


def widedeep() -> Model:
    return WideDeep([user, visit, age, history], [user, age, shop, tags, history, match, profile], [8, 6], 0.0)


def esmm() -> Model:
    return ESMM([user, age, tags, history, profile], [8, 6], [5], 4, num_conversions=2)


def mmoe() -> Model:
    return MMoE([user, age, shop, tags, history, profile], [8, 6], 3, 2, tower_units=[5])


def ple() -> Model:
    types = ["classification", "regression"]
    return PLE([user, age, shop, tags, history, profile], [8, 6], 2, 3, 1, types, tower_units=[5])


def dssm() -> Model:
    return DSSM([user, age, tags, history, profile], [item, shop, price], [8, 6], 0.0, 4, temperature=0.5)


def facebookdssm() -> Model:
    types = ["classification", "regression"]
    return FacebookDSSM([user, age, tags, history, profile], [item, shop, price], [8, 6], 2, types)


def gru4rec() -> Model:
    return GRU4Rec(11, 6, 2, 0.0, 4)


def mind() -> Model:
    return MIND(11, 3, 3, 8, 4, user_features=[user, age, shop, tags, liked, profile])


def narm() -> Model:
    return NARM(11, 6, 3, 0.0, 4)


def youtubednn() -> Model:
    return YoutubeDNN([user, age, shop, tags, history, profile], [item, kind, price], [8, 6], 4, 3)


def sasrec() -> Model:
    return SASRec(11, max_len=6, num_heads=2, num_layers=2, hidden_size=4, dropout_rate=0.0)


def sharedbottom() -> Model:
    return SharedBottom([user, shop, history, profile], [8, 6], [5], 2, ["classification", "regression"])


def build(model: type[Model], seed: int = 0) -> Model:
    """The model's case, in float64, with the same weights for the same seed."""
    case = getattr(sys.modules[__name__], model.__name__.lower(), None)
    if case is None:
        pytest.fail(
            f"{model.__name__} has no case: add a function {model.__name__.lower()}() to tests/rechub_tests/cases.py"
        )
    torch.manual_seed(seed)
    return case().double()


def make_batch(model: Model, rows: int, *, lengths: list[int] | None = None, seed: int = 0) -> Embedded:
    """Random vectors for all that the model reads, as leaves that take gradients.

    Every sequence of a row has the same length, `lengths` (0 to 5 at random), negatives that many times their count.
    """
    rng = torch.Generator().manual_seed(seed)
    length = torch.randint(0, 6, (rows,), generator=rng) if lengths is None else torch.tensor(lengths, dtype=torch.long)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=rng)

    embedded = Embedded(dense={feature.name: random(rows, feature.dim) for feature in model.dense_features()})
    for lookup in model.lookups():
        if lookup.pooling is not None:
            embedded.vectors[lookup.name] = random(rows, lookup.dim).requires_grad_()
            continue
        own = length * lookup.feature.count if isinstance(lookup.feature, NegativeFeature) else length
        longest = max([1, *own.tolist()])
        values = random(rows, longest, lookup.dim)
        values[torch.arange(longest) >= own[:, None]] = 0
        embedded.sequences[lookup.name] = Sequence(values.requires_grad_(), own)
    return embedded


def pad_with(embedded: Embedded, fill: float, more: int = 0) -> Embedded:
    """The same rows with `fill` in all padded places, and `more` of these."""
    sequences = {}
    for name, (values, lengths, _) in embedded.sequences.items():
        longer = torch.cat([values.detach(), values.new_zeros(len(values), more, values.shape[2])], dim=1)
        longer[torch.arange(longer.shape[1]) >= lengths[:, None]] = fill
        sequences[name] = Sequence(longer.requires_grad_(), lengths)
    return Embedded(embedded.vectors, sequences, embedded.dense)


def row_of(embedded: Embedded, row: int) -> Embedded:
    """One row as a batch of its own, as long as it is."""
    sequences = {}
    for name, (values, lengths, _) in embedded.sequences.items():
        longest = max(1, int(lengths[row]))
        sequences[name] = Sequence(values[row : row + 1, :longest], lengths[row : row + 1])
    return Embedded(
        {name: value[row : row + 1] for name, value in embedded.vectors.items()},
        sequences,
        {name: value[row : row + 1] for name, value in embedded.dense.items()},
    )


def real(output: Output) -> dict[str, Tensor]:
    """What counts of an output: its tensors, without the vectors at masked positions."""
    kept = {field.name: getattr(output, field.name) for field in fields(output) if field.name != "aux"}
    kept |= {f"aux.{name}": losses for name, losses in output.aux.items()}
    kept = {name: value for name, value in kept.items() if value is not None}
    if output.user is not None:
        mask = kept.pop("user_mask")
        kept["user"] = output.user[mask]
        if output.item is not None and output.item.shape[:2] == mask.shape:
            kept["item"] = output.item[mask]
    return kept


def loss_of(output: Output) -> Tensor:
    """A sum that all real values of an output enter, each with a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for value in real(output).values():
        weight = torch.linspace(0.5, 1.5, max(1, value.numel()), dtype=torch.float64)[: value.numel()]
        total = total + (value.square().flatten() * weight).sum() + (value.flatten() * weight.flip(0)).sum()
    return total


def vectors_of(embedded: Embedded) -> dict[str, Tensor]:
    """The leaves of a batch, by lookup name."""
    return embedded.vectors | {name: sequence.values for name, sequence in embedded.sequences.items()}
