from __future__ import annotations

from pathlib import Path

import pytest

from rechub_dist.config import stored_run
from rechub_dist.data.places import places
from rechub_dist.data.run_file import load_run
from rechub_dist.errors import UserError
from rechub_dist.features import (
    CrossFeature,
    DenseFeature,
    SequenceFeature,
    SparseFeature,
    Table,
    TimeGapFeature,
)
from rechub_dist.schema import parse_schema

RUN = """
output_dir: out
data: {root: data, dataset: {features: {a: {kind: sparse, rows: 5}}, labels: {click: {}}}}
model: {name: DeepFM, hidden_units: [1]}
optimizer: {lr: 1e-3}
"""


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def test_defaults_and_overrides(run_yaml: Path) -> None:
    config = load_run(run_yaml, ["train.epochs=3", "data.labels=[click]", "embedding.optimizer={name: sgd, lr: 1}"])
    assert config.optimizer.lr == 1e-3  # a number, though YAML 1.1 reads a string
    assert (config.train.epochs, config.data.labels) == (3, ("click",))
    assert (config.embedding.optimizer.name, config.embedding.optimizer.lr) == ("sgd", 1.0)
    assert config.model.parameters == {"hidden_units": [1]}


def test_former_names_of_keys_are_accepted(run_yaml: Path) -> None:
    wanted = load_run(run_yaml, ["data.max_streams=4"])
    assert load_run(run_yaml, ["data.max_lanes=4"]) == wanted
    assert stored_run(wanted.dump().replace("max_streams", "max_lanes"), "stored") == wanted
    run_yaml.write_text(RUN.replace("root: data", "root: data, max_lanes: 8"))
    assert load_run(run_yaml).data.max_streams == 8
    assert load_run(run_yaml, ["data.max_streams=4"]) == load_run(run_yaml, ["data.max_lanes=4"]) == wanted
    run_yaml.write_text(RUN.replace("root: data", "root: data, max_lanes: 8, max_streams: 4"))
    with pytest.raises(UserError, match=r"data\.max_lanes is 8, data\.max_streams 4; write data\.max_streams alone"):
        load_run(run_yaml)


def test_the_dump_loads_as_the_same_configuration(run_yaml: Path, tmp_path: Path) -> None:
    config = load_run(run_yaml, ["embedding.rules=[{tables: 'a*', sharding: row_wise}]", "objective={name: pointwise}"])
    (tmp_path / "again.yaml").write_text(config.dump())
    assert load_run(tmp_path / "again.yaml") == config


def test_what_is_given_is_dumped_by_the_names_of_its_keys(run_yaml: Path) -> None:
    values = ["warm_start={from: runs/a, tables: ['1e3']}", "data.train={path: t, where: [[day, '=', '1E5']]}"]
    config = load_run(run_yaml, values)
    assert stored_run(config.dump_given(), "run.yaml") == stored_run(config.dump(), "run.yaml") == config
    assert "batch_size" not in config.dump_given()


def test_anchored_for_processes_that_work_elsewhere(run_yaml: Path) -> None:
    config = load_run(
        run_yaml,
        [
            "objective={name: retrieval, sampling: {name: file, path: w.npy}}", "checkpoint.folder=c",
            "warm_start={from: other, embeddings: [{table: a, file: a.npy}]}",
        ],
    ).anchored(Path("/base"))  # fmt: skip
    assert {place.address for place in places(config)} == {
        "/base/out", "/base/data", "/base/data/train", "/base/data/valid", "/base/data/test", "/base/data/items",
        "/base/w.npy", "/base/other", "/base/a.npy", "/base/c",
    }  # fmt: skip


def test_partitions_are_one_pass(run_yaml: Path) -> None:
    with pytest.raises(
        UserError, match=r"run\.yaml: data\.order: sequential-partitions makes one pass; leave train\.epochs"
    ):
        load_run(run_yaml, ["data.order=sequential-partitions", "train.epochs=2"])


def test_it_is_frozen(run_yaml: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_run(run_yaml).seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "unknown key 'train.epoch': did you mean 'epochs'?"),
        ("trian.epochs=3", "unknown key 'trian': did you mean 'train'?"),
        ("embedding.rules=[{tables: x, optimizer: {lrr: 3}}]", "'embedding.rules.0.optimizer.lrr': did you mean 'lr'?"),
        ("evaluation={topk: 3}", "did you mean 'top_k'?"),
        ("objective={name: foo}", "its name must be pointwise, entire_space, retrieval, or that of your own"),
        ("train.epochs=1.5", "train.epochs: input should be a valid integer, got 1.5"),
        ("train.epochs=0", "train.epochs: input should be greater than 0"),
        ("train.histograms=1", "train.histograms: input should be a valid boolean"),
        ("optimizer.lr=fast", "optimizer.lr: input should be a valid number, got 'fast'"),
        ("data.follow=true", "data: follow: true needs order: sequential-partitions"),
        ("data.follow_timeout_seconds=3", "data: follow_timeout_seconds needs follow: true"),
        ("data.mix=[{path: a, repeat: true}]", "data: mix: at least one source must not repeat"),
        ("data.mix=[{path: a, weigth: 2}]", "unknown key 'data.mix.0.weigth': did you mean 'weight'?"),
        ("data.mix=[]", "data.mix: "),
        ("seed", "write section.key=value"),
        ("seed.x=1", "'seed' is a value, not a section"),
        ("seed=[", "the value is not valid YAML"),
        ("seed=-1", "seed: input should be greater than or equal to 0, got -1"),
        ("seed=9223372036854775808", "seed: input should be less than 9223372036854775808"),
        ("optimizer.lr=.nan", "--set optimizer.lr=.nan: '.nan' is not a finite number"),
        ("optimizer.lr=1e39", "optimizer.lr: input should be less than or equal to 100000"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas.1: input should be less than 1"),
        ("embedding.optimizer.betas=[-0.1, 0.9]", "embedding.optimizer.betas.0: input should be greater than or equal"),
        (
            "distributed.timeout_seconds=1e300",
            "timeout_seconds: input should be less than or equal to 1000000000",
        ),
        ("distributed.threads=1000000", "distributed.threads: input should be less than or equal to 4096"),
        ("data.batch_size=10000000000", "data.batch_size: input should be less than or equal to 2147483647"),
        ("data.prefetch=1000000000000", "data.prefetch: input should be less than or equal to 65536"),
        ("embedding.dim=65537", "embedding.dim: input should be less than or equal to 65536"),
        ("objective={name: pointwise, task_weights: {click: -1}}", "task_weights.click: input should be greater than"),
        (f"{'a.' * 70}b=1", "write section.key=value"),
    ],
)
def test_refusals(run_yaml: Path, override: str, message: str) -> None:
    overrides = ["seed=1", override]
    with pytest.raises(UserError) as error:
        load_run(run_yaml, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "duplicate key 'a'"),
        ("a: [", "not valid YAML"),
        ("- 1\n", "not a mapping"),
        ("model: {name: X}\ndata: {root: x}\n", "missing key 'output_dir'"),
        ("output_dir: x\nmodel: {name: X}\ndata: {root: nowhere}\n", "nowhere holds no dataset.yaml"),
        ("output_dir: x\nmodel: {name: X}\ndata: {root: x, dataset: gone.yaml}\n", "no such file"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_run(tmp_path / "run.yaml")


def test_a_missing_file() -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_run(Path("gone.yaml"))


def test_schema() -> None:
    schema = parse_schema(
        {
            "name": "shop",
            "tables": {"item": {"rows": 9, "dim": 4}},
            "features": {
                "item_id": {"kind": "sparse", "table": "item", "hash": True},
                "item": {"kind": "sparse"},  # the table of its own name
                "history": {"kind": "sequence", "table": "item", "max_length": 5, "keep": "first"},
                "user": {"kind": "sparse", "rows": 3, "init_std": 0.5, "missing": "unknown", "unknown_id": 2},
                "price": {"kind": "dense", "transform": "log", "column": "usd"},
                "user_x_item": {"kind": "cross", "inputs": ["user", "item_id"], "buckets": 50},
                "gap": {"kind": "time_gap", "times": "then", "now": "time", "boundaries": [1, 2.5], "max_length": 5},
            },
            "labels": {"click": None, "dwell": {"type": "regression"}},
            "weight": "w",
        }
    )
    item = Table("item", 9, dim=4)
    assert schema["item_id"] == SparseFeature("item_id", item, hash=True)
    assert schema["item"] == SparseFeature("item", item)
    assert schema["history"] == SequenceFeature("history", item, max_length=5, keep="first")
    assert schema["user"] == SparseFeature("user", Table("user", 3, init_std=0.5), missing="unknown", unknown_id=2)
    assert schema["price"] == DenseFeature("price", transform="log", column="usd")
    assert schema["user_x_item"] == CrossFeature("user_x_item", (schema["user"], schema["item_id"]), 50)
    assert schema["gap"] == TimeGapFeature("gap", "then", "time", (1, 2.5), 5)
    assert [(label.name, label.type) for label in schema.labels] == [
        ("click", "classification"),
        ("dwell", "regression"),
    ]
    assert schema.weight == "w"


def test_a_run_file_extends_the_schema(run_yaml: Path) -> None:
    cross = "{kind: cross, inputs: [a, b], buckets: 9}"
    overrides = [f"data.features={{b: {{kind: sparse, rows: 7}}, a_x_b: {cross}}}"]
    config = load_run(run_yaml, overrides)
    schema = parse_schema(config.data.dataset)
    assert [feature.name for feature in schema.features] == ["a", "b", "a_x_b"]
    again = run_yaml.with_name("again.yaml")
    again.write_text(config.dump())
    assert load_run(again) == config
    config = load_run(run_yaml, ["data.features={a: {kind: sparse, rows: 70}}"])
    assert parse_schema(config.data.dataset)["a"].table.rows == 70


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"a": {"kind": "spars"}}, "did you mean 'sparse'?"),
        ({"a": {"kind": ["sparse"]}}, "dataset.features.a.kind: got ['sparse']; did you mean 'sparse'?"),
        (
            {"a": {"kind": "sparse", "table": {"b": 1}}},
            "dataset.features.a.table: write the name of a table, got {'b': 1}",
        ),
        ({"a": {"kind": "cross", "inputs": [["b"]], "buckets": 5}}, "there is no sparse feature ['b']"),
        ({"a": {"kind": "sparse", "rows": 2**40 + 1}}, "rows is 1099511627777, must be at most 1,099,511,627,776"),
        ({"a": {"kind": "sparse", "rows": 3, "dim": 65537}}, "dim is 65537, must be at most 65,536"),
        ({"a": {"kind": "sparse", "rows": 3, "init_std": 1e39}}, "init_std is 1e+39, must be a number of 32 bits"),
        ({"a": {"kind": "sequence", "rows": 3, "max_length": 2**31}}, "max_length is 2147483648, must be at most"),
        (
            {"a": {"kind": "sparse", "rows": 3}, "c": {"kind": "cross", "inputs": ["a", "b"], "buckets": 2}},
            "there is no sparse feature 'b'",
        ),
        ({"a": {"kind": "cross", "buckets": 5}}, "dataset.features.a.inputs: write a list of feature names, got None"),
        ({"a": {"kind": "cross", "inputs": ["item"], "buckets": 5}}, "there is no sparse feature 'item'"),
        (
            {"b": {"kind": "sparse", "rows": 3}, "a": {"kind": "cross", "inputs": ["b"], "buckets": 5}},
            "inputs are ['b'], must be two or more different features",
        ),
        (
            {"a": {"kind": "time_gap", "times": "t", "now": "n", "boundaries": [2, 1], "max_length": 5}},
            "boundaries are [2.0, 1.0], must be ascending",
        ),
        ({"a": {"kind": "sparse", "row": 3}}, "did you mean 'rows'?"),
        ({"a": {"kind": "sparse"}}, "give rows"),
        ({"a": {"kind": "sparse", "table": "itm"}}, "there is no table 'itm': did you mean 'item'?"),
        ({"a": {"kind": "sparse", "rows": 0}}, "rows is 0, must be at least 1"),
        ({"a": {"kind": "sparse", "rows": "many"}}, "valid integer, got 'many'"),
        ({"a": {"kind": "sequence", "rows": 3}}, "missing key 'dataset.features.a.max_length'"),
        ({"a": {"kind": "sparse", "rows": 3, "unknown_id": 3}}, "unknown_id 3 is outside its table"),
        ({"item": {"kind": "sparse", "rows": 3}}, "a table 'item' is declared too"),
        ({"a": {"kind": "dense", "rows": 3}}, "unknown key 'dataset.features.a.rows'"),
        ({"a": {"kind": "sparse", "table": "item", "rows": 3}}, "names table 'item' and gives rows too"),
        ({"a": 3}, "write a mapping"),
        ({}, "at least one feature"),
    ],
)
def test_schema_refusals(features: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_schema({"tables": {"item": {"rows": 9}}, "features": features})
    assert message in str(error.value)
