"""Which table lies where; and what is refused because the kernels get it wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rechub_dist.config import EmbeddingConfig, TableOptimizerConfig, TableRule
from rechub_dist.embedded import Jagged, Lookup
from rechub_dist.embedding.layout import make_layout
from rechub_dist.embedding.stage import EmbeddingStage
from rechub_dist.errors import UserError
from rechub_dist.features import CrossFeature, NegativeFeature, SequenceFeature, SparseFeature, Table

USER, ITEM = Table("user", 100, dim=6), Table("item", 50, dim=8)
user, item = SparseFeature("user", USER), SparseFeature("item", ITEM)
history = SequenceFeature("history", ITEM, max_length=5)
LOOKUPS = (
    Lookup("user", user, USER, "sum"),
    Lookup("user.linear", user, USER.linear, "sum"),
    Lookup("item", item, ITEM, "mean"),
    Lookup("history", history, ITEM, None),
)


def layout(lookups: tuple[Lookup, ...] = LOOKUPS, *, device: str = "cpu", world: int = 2, **config: Any) -> Any:
    return make_layout(lookups, EmbeddingConfig(**config), device=device, world_size=world)


def test_a_table_lies_in_one_collection() -> None:
    found = layout()
    assert found.collections == {"pooled": ("user",), "d8": ("item", "history")}
    assert {name: placed.features for name, placed in found.tables.items()} == {
        "user": ("user",),
        "user.linear": ("user",),
        "item": ("item", "history"),
    }


def test_widths_are_stored_as_multiples_of_four() -> None:
    assert [Table("t", 3, dim=dim).stored_dim for dim in (1, 4, 5, 8)] == [4, 4, 8, 8]
    wide = SequenceFeature("wide", Table("wide", 9, dim=5), max_length=3)
    found = layout((*LOOKUPS, Lookup("wide", wide, wide.table, None)))
    assert found.tables["wide"].collection == found.tables["item"].collection == "d8"


def test_placement_by_rule_size_and_default() -> None:
    rules = (
        TableRule(tables="*.linear", sharding="replicated", optimizer=TableOptimizerConfig(name="adam")),
        TableRule(tables="user*", sharding="row_wise"),
    )
    found = layout(rules=rules, replicate_below=60)
    assert {name: placed.sharding for name, placed in found.tables.items()} == {
        "user": "row_wise",
        "user.linear": "replicated",  # the first rule that matches decides
        "item": "replicated",  # fewer than 60 rows
    }
    assert found.collections == {"pooled": ("user",), "replicated": ("user", "item", "history")}
    assert found.tables["user.linear"].optimizer.name == "adam"
    auto = layout(row_wise_above=100)
    assert {name: placed.sharding for name, placed in auto.tables.items()} == {
        "user": "row_wise",
        "user.linear": "row_wise",
        "item": "table_wise",
    }


def test_a_rule_sets_the_initial_weights() -> None:
    found = layout(rules=(TableRule(tables="item", init_std=0.5), TableRule(tables="user*", sharding="replicated")))
    assert {name: placed.table.init_std for name, placed in found.tables.items()} == {
        "item": 0.5,
        "user": USER.init_std,
        "user.linear": 0.0,
    }
    assert {lookup.table.init_std for lookup in found.lookups if lookup.table.name == "item"} == {0.5}


def test_the_precision_is_of_sharded_tables() -> None:
    rules = (TableRule(tables="*.linear", precision="fp32"), TableRule(tables="item", sharding="replicated"))
    found = layout(precision="fp16", rules=rules)
    precisions = {name: placed.precision for name, placed in found.tables.items()}
    assert precisions == {"user": "fp16", "user.linear": "fp32", "item": "fp32"}
    assert found.notes == ("embedding.precision: fp16 is of sharded tables; replicated ones are in fp32: item",)
    assert found.tables["user"].weight_bytes == 100 * 8 * 2
    assert layout(precision="fp16", rules=rules, world=64).tables == found.tables
    assert {placed.precision for placed in layout().tables.values()} == {"fp32"}


def test_placement_does_not_depend_on_the_world_size() -> None:
    assert layout(world=1) == layout(world=2) == layout(world=64)


def test_a_cross_brings_its_inputs() -> None:
    user, tags = SparseFeature("user", USER), SparseFeature("tags", Table("tag", 9))
    cross = CrossFeature("user_tags", (user, tags), 50, dim=4)
    found = layout((Lookup("user_tags", cross, cross.table, "sum"),))
    assert list(found.features) == ["user_tags", "user", "tags"]
    assert found.collections == {"pooled": ("user_tags",)}
    other = Lookup("tags", SparseFeature("tags", Table("tag", 9), pooling="mean"), Table("tag", 9, dim=4), "mean")
    with pytest.raises(UserError, match="'tags' is used with different settings"):
        layout((Lookup("user_tags", cross, cross.table, "sum"), other))


def test_weighted_tables_have_a_collection_of_their_own() -> None:
    tags = SparseFeature("tags", Table("tag", 9), weights="tag_weights")
    table = Table("tag", 9, dim=4)
    found = layout((Lookup("tags", tags, table, "mean"), *LOOKUPS))
    assert found.tables["tag"].collection == "weighted"
    assert found.collections["weighted"] == ("tags",)


ADAM, LAZY = TableOptimizerConfig(name="adam"), TableOptimizerConfig(name="lazy_adam")
ADAGRAD = TableOptimizerConfig(name="adagrad")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": LAZY}, "fused Adam .lazy_adam. is not available on CPU"),
        ({"optimizer": LAZY, "device": "cuda", "sharding": "replicated"}, "lazy_adam needs a sharded table"),
        ({"optimizer": ADAM, "device": "cuda"}, "adam updates every row at each step"),
        ({"kernel": "fused_uvm_caching"}, "fused_uvm_caching needs CUDA"),
        ({"sharding": "column_wise"}, "rowwise_adagrad on a column_wise table"),
        ({"sharding": "table_column_wise"}, "rowwise_adagrad on a table_column_wise table"),
        ({"sharding": "table_row_wise", "optimizer": ADAGRAD}, "not supported for a table that is read unpooled"),
        (
            {"rules": (TableRule(tables="item", sharding="replicated", precision="fp16"),)},
            "precision: fp16 is given for table 'item', which is replicated",
        ),
        ({"rules": (TableRule(tables="itme"),)}, "'itme' matches no table; the tables are user, user.linear, item"),
    ],
)
def test_refusals(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        layout(**config)


@pytest.mark.parametrize(
    ("rows", "ranks", "fits"), [(4, 4, True), (3, 4, False), (5, 4, False), (6, 3, True), (7, 4, True), (9, 6, False)]
)
def test_row_wise_needs_a_row_on_every_rank(rows: int, ranks: int, fits: bool) -> None:
    table = Table("t", rows, dim=4)
    lookup = Lookup("t", SparseFeature("t", table), table, "sum")
    assert fits == (-(-rows // ranks) * (ranks - 1) < rows)
    found = layout((lookup,), world=ranks, sharding="row_wise")
    assert found.tables["t"].sharding == ("row_wise" if fits else "table_wise")
    assert [note.partition(":")[0] for note in found.notes] == ([] if fits else ["table 't'"])


def test_what_is_allowed_on_cuda() -> None:
    found = layout(device="cuda", optimizer=LAZY, kernel="fused_uvm_caching")
    assert found.tables["user"].kernel == "fused_uvm_caching"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Lookup("user", item, ITEM, "sum"), "two different lookups are named 'user'"),
        (Lookup("x", user, Table("user", 100, dim=7), "sum"), "width 6 and with 100 rows of width 7"),
        (Lookup("x", SparseFeature("x", ITEM), Table("new", 3, dim=4), "sum"), "ids below 50"),
        (Lookup("x", SparseFeature("x", Table("x", 3)), Table("x", 3), "sum"), "no width"),
        (Lookup("x", SparseFeature("user", USER, hash=True), USER, "sum"), "'user' is used with different settings"),
    ],
)
def test_contradicting_lookups(other: Lookup, message: str) -> None:
    with pytest.raises(UserError, match=message):
        layout((*LOOKUPS, other))


ODD = [
    "type",
    "items",
    "keys",
    "values",
    "float",
    "forward",
    "training",
    "pop",
    "weight",
    "1",
    "a b",
    "x.y",
    "*",
    "a\nb",
]


@pytest.mark.parametrize("replicate_below", [0, 1000])
@pytest.mark.parametrize("pooling", ["sum", None])
def test_tables_and_features_of_any_name(replicate_below: int, pooling: Any) -> None:
    features = [SequenceFeature(name, Table(name, 10, dim=4), max_length=3) for name in ODD]
    found = layout(
        tuple(Lookup(f.name, f, f.table, pooling) for f in features), world=1, replicate_below=replicate_below
    )
    assert list(found.tables) == ODD  # as checkpoints name them
    stage = EmbeddingStage(found, (), seed=0)
    keys = [key for names in found.collections.values() for key in names]
    assert keys == ODD
    if replicate_below:
        assert stage.replicated is not None
        ids = {name: Jagged.single(torch.tensor([place % 10])) for place, name in enumerate(ODD)}
        embedded = stage.replicated.local(ids)
        for place, name in enumerate(ODD):
            own = embedded.vectors[name] if pooling else embedded.sequences[name].values[:, 0]
            assert torch.equal(own[0], stage.replicated.local.weight(name)[place % 10])


def test_a_feature_named_like_another_ones_weights() -> None:
    other = SparseFeature("user.linear", Table("user.linear", 10, dim=8))
    lookups = (Lookup("user.linear", user, USER.linear, "sum"), Lookup("user.linear", other, other.table, "sum"))
    for pair in (lookups, lookups[::-1]):
        with pytest.raises(UserError, match=r"feature 'user.linear' has the name of the first-order weights of 'user'"):
            layout(pair)


def test_negatives_need_a_second_id() -> None:
    drawn = NegativeFeature("negative", Table("single", 1, dim=4), like="user")
    with pytest.raises(UserError, match="'negative': table 'single' has one id; drawing negatives needs at least two"):
        layout((Lookup("negative", drawn, drawn.table, None),))


@pytest.mark.parametrize("name", ["", "a/b"])
def test_what_no_table_can_be_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"must be non-empty and without '/': declare the table under another name"):
        Table(name, 10)
