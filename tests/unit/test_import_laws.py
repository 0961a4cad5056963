"""What holds of every import: a caller's row gets the ids of the files, the future is not seen, growing keeps ids."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time as clock
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from rechub_dist.batch import Batch
from rechub_dist.config.strict_yaml import read_yaml
from rechub_dist.data.columns.fit import file_columns
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.rows import RowEncoder
from rechub_dist.data.spec import WEIGHTED, BatchSpec
from rechub_dist.errors import UserError
from rechub_dist.features import DenseFeature, SparseFeature, with_width
from rechub_dist.schema import parse_schema
from rechub_tests.import_cases import (
    KINDS,
    OF_TABLES,
    SQL,
    Row,
    add_histories,
    arrow_schema,
    random_log,
    random_plan,
    random_tables,
    run_import,
    split_of,
)
from rechub_tests.importing import NothingLeftError, imported


def given(plan: dict[str, Any], log: list[Row], tables: dict[str, list[Row]], time: str) -> dict[str, pa.Table]:
    """The tables in memory, and the plan without their types."""
    plan["log"] = {}
    frames = {"log": pa.Table.from_pylist(log, arrow_schema(KINDS | {"when": time}))}
    return frames | {
        f"tables.{name}": pa.Table.from_pylist(rows, arrow_schema(OF_TABLES[name])) for name, rows in tables.items()
    }


def spec_of(out: Path) -> BatchSpec:
    """All features of a data set."""
    schema = parse_schema(read_yaml(out / "dataset.yaml"), str(out))
    features = tuple(with_width(f, 4) for f in schema.features if not isinstance(f, DenseFeature))
    weighted = tuple(f.name for f in features if isinstance(f, SparseFeature) and f.weights)
    others = tuple(f.name for f in features if f.name not in weighted)
    return BatchSpec(
        features,
        tuple(f for f in schema.features if isinstance(f, DenseFeature)),
        collections={"others": others, WEIGHTED: weighted},
        derived=schema.derived,
    )


def tensors(batch: Batch) -> list[torch.Tensor]:
    jagged = [tensor for each in batch.jagged.values() for tensor in (each.values(), each.lengths())]
    return [batch.dense, *jagged, *batch.id_weights.values()]


@pytest.mark.parametrize("seed", range(12))
def test_a_callers_rows_get_the_ids_and_numbers_of_the_files(seed: int, tmp_path: Path) -> None:
    draw = random.Random(f"law 15 {seed}")
    time = draw.choice(["integer", "float", "timestamp"])
    log, tables = random_log(draw, 150, time), random_tables(draw)
    plan = random_plan(draw, time, len(log))
    try:
        expected = imported(plan, log, tables, SQL)
    except NothingLeftError:
        pytest.skip("nothing is left of these rows")
    run_import(plan, tmp_path / "out", frames=given(plan, log, tables, time))
    spec = spec_of(tmp_path / "out")
    encoder = RowEncoder(spec.of_values())
    made = {name for one in spec.derived for name in one.outputs}
    types = KINDS | {"when": time} | {k: v for of in OF_TABLES.values() for k, v in of.items()} | {"shout": "string"}
    for split, rows in expected.raw.items():
        manifest = Manifest.read(
            str(tmp_path / "out" / split), fit=lambda schema, where: file_columns(schema, spec, where)
        )
        stored = list(ParquetReader(manifest, spec, batch_size=64, shuffle=False).batches(0))
        raw = [{name: value for name, value in row.items() if name not in made} for row in rows]
        schema = [arrow_schema({k: types[k]}).field(0) for k in raw[0] if k in types] if raw else []
        lists = [pa.field(k, pa.array([row[k] for row in raw]).type) for k in (raw[0] if raw else ()) if k not in types]
        table = pa.Table.from_pylist(raw, pa.schema([*schema, *lists]))
        for theirs, ours in zip(encoder.batches(table, 64) if raw else (), stored, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(tensors(theirs), tensors(ours), strict=True)), split


def files_of(out: Path) -> dict[str, Any]:
    """The content of a folder: tables as Arrow's, texts as they are."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        if path.suffix == ".parquet":
            found[str(path.relative_to(out))] = pq.read_table(path, partitioning=None)
        elif path.is_file() and path.name != "_rechub_dist.json":
            found[str(path.relative_to(out))] = path.read_text()
    return found


def a_big_log(rows: int) -> pa.Table:
    draw = np.random.default_rng(0)
    when = draw.integers(1_600_000_000, 1_700_000_000, rows)
    return pa.table(
        {
            "user": draw.integers(0, rows // 50, rows),
            "item": [f"item {i}" for i in draw.zipf(1.3, rows) % 5000],
            "when": pa.array((when // 3600 * 3600) * 10**6).cast(pa.timestamp("us")),
            "price": draw.lognormal(3, 2, rows),
            "huge": 1e9 + draw.normal(size=rows),
            "click": draw.integers(0, 2, rows),
        }
    )


A_BIG_PLAN: dict[str, Any] = {
    "user": "user",
    "item": "item",
    "time": "when",
    "split": {"by": "time", "rows_from": "2021-01-01"},
    "labels": {"click": "click"},
    "k_core": {"user": 20},
    "histories": {"seen": {"column": "item", "max_length": 20, "also": {"times": "when"}}},
    "negatives": {"per_row": 1, "where": "click = 1"},
    "now": True,
    "features": {
        "user": {"kind": "sparse"},
        "item": {"kind": "sparse"},
        "seen": {"kind": "sequence"},
        "price": {"kind": "dense", "transform": "log"},
        "huge": {"kind": "dense"},
        "price_bin": {"kind": "sparse", "column": "price", "quantiles": 20},
        "gap": {"kind": "time_gap", "times": "times", "now": "when", "boundaries": [3600, 86400], "max_length": 20},
    },
}


@pytest.mark.slow
def test_threads_and_memory_change_nothing(tmp_path: Path) -> None:
    pq.write_table(a_big_log(120_000), tmp_path / "log.parquet")
    plan = A_BIG_PLAN | {"log": {"path": str(tmp_path / "log.parquet")}}
    outs = []
    for number, options in enumerate(
        ({"threads": 1}, {"threads": 4, "memory": 1 << 30}, {"threads": 2, "memory": 64 << 20})
    ):
        run_import(plan, tmp_path / str(number), **options)
        outs.append(files_of(tmp_path / str(number)))
        assert not (tmp_path / str(number) / ".scratch").exists()
    assert outs[0].keys() == outs[1].keys() == outs[2].keys()
    assert len(outs[0]) > 8
    for name, content in outs[0].items():
        assert content == outs[1][name], name
        assert content == outs[2][name], name


def test_the_order_of_the_rows_does_not_change_means(tmp_path: Path) -> None:
    log = a_big_log(5000)
    plan = {
        "log": {}, "split": {"valid": 0.0, "test": 0.0},
        "features": {"huge": {"kind": "dense"}, "price": {"kind": "dense", "transform": "log"}},
    }  # fmt: skip
    run_import(plan, tmp_path / "a", frames={"log": log})
    run_import(plan, tmp_path / "b", frames={"log": log.take(np.random.default_rng(1).permutation(5000))})
    assert (tmp_path / "a" / "dataset.yaml").read_text() == (tmp_path / "b" / "dataset.yaml").read_text()
    feature = yaml.safe_load((tmp_path / "a" / "dataset.yaml").read_text())["features"]["huge"]
    values = log["huge"].to_numpy()
    assert feature["mean"] == pytest.approx(values.mean(), rel=1e-11)
    assert feature["std"] == pytest.approx(values.std(), rel=1e-6)


def altered(draw: random.Random, log: list[Row], after: Any, *, too: bool = False) -> list[Row]:
    """The log with everything changed that is later than a time, or at it `too`; further rows come, some go."""
    found = []
    for row in log:
        if row["when"] < after or (row["when"] == after and not too):
            found.append(row)
            continue
        other = {name: draw.choice(log)[name] for name in row} | {"when": row["when"], "tag": "of the future"}
        other |= {"rating": draw.choice([1.0, 5.0]), "wide": 1e9, "number": 999}
        found += [other] * draw.randrange(3)
    return found


def a_plan_of_everything(draw: random.Random, time: str) -> dict[str, Any]:
    plan = random_plan(draw, time, 200)
    for key in ("k_core", "keep", "now", "histories", "embeddings", "weight"):
        plan.pop(key, None)
    plan |= {"order": "stored", "min_count": 1}
    if draw.random() < 0.3:
        plan["filter"] = "rating >= 4"
    for name in ("items", "their_tags", "good_items", "gap", "seen"):
        plan["features"].pop(name, None)
    plan["derive"].pop("seen", None)
    add_histories(draw, plan, time)
    plan.pop("now")
    return plan


@pytest.mark.parametrize("seed", range(6))
def test_valid_and_test_rows_change_nothing_of_train(seed: int, tmp_path: Path) -> None:
    draw = random.Random(f"future {seed}")
    log, tables = random_log(draw, 200, "integer"), random_tables(draw)
    plan = a_plan_of_everything(draw, "integer")
    plan["split"] = {"by": "time", "valid_from": "1700079200", "test_from": "1700110000"}
    outs = []
    for number, rows in enumerate((log, altered(draw, log, 1700079200, too=True))):
        run_import(plan, tmp_path / str(number), frames=given(plan, rows, tables, "integer"))
        outs.append(files_of(tmp_path / str(number)))
    for name, content in outs[0].items():
        if not name.startswith(("valid", "test", "import.json", "items")):
            assert outs[1][name] == content, name
    assert outs[0]["test/part-00000.parquet"] != outs[1]["test/part-00000.parquet"]


@pytest.mark.parametrize("seed", range(6))
def test_what_comes_later_changes_no_features_of_a_row(seed: int, tmp_path: Path) -> None:
    draw = random.Random(f"later {seed}")
    log, tables = random_log(draw, 200, "integer"), random_tables(draw)
    plan = a_plan_of_everything(draw, "integer")
    plan["split"] = {"valid": 0.0, "test": 0.0}
    plan["features"]["rating_bin4"] = {"kind": "sparse", "column": "rating", "bins": [2.0, 3.0]}
    until = draw.choice(log)["when"]
    found = []
    for number, rows in enumerate((log, altered(draw, log, until))):
        out = tmp_path / str(number)
        run_import(plan, out, frames=given(plan, rows, tables, "integer"))
        found.append([row for row in decoded(split_of(out, "train"), out) if row["when"] <= until])
    assert found[0] == found[1]
    assert len(found[0]) > 3
    assert any(row["items"] for row in found[0])


def decoded(rows: list[Row], out: Path) -> list[Row]:
    """Stored rows with values for ids."""
    found = [dict(row) for row in rows]
    for feature in parse_schema(read_yaml(out / "dataset.yaml"), str(out)).features:
        if getattr(feature, "encoded", False):
            table = pq.read_table(feature.vocabulary)
            values = dict(zip(table["id"].to_pylist(), table["value"].to_pylist(), strict=True))
            for row in found:
                ids = row[feature.source]
                row[feature.source] = [values.get(i) for i in ids] if isinstance(ids, list) else values.get(ids)
    return found


@pytest.mark.parametrize("by", ["uniform", "frequency"])
def test_negatives_are_items_that_the_user_does_not_have(by: str, tmp_path: Path) -> None:
    draw = random.Random(4)
    log = [
        {
            "user": f"u{draw.randrange(8)}",
            "item": draw.randrange(40),
            "when": i,
            "click": draw.randrange(2),
            "page": i % 3,
        }
        for i in range(300)
    ]
    items = [{"item": i, "kind": f"k{i % 5}"} for i in range(35)]
    users = [{"user": f"u{i}", "city": f"c{i}"} for i in range(8)]
    plan: dict[str, Any] = {
        "tables": {"items": {"key": "item"}, "users": {"key": "user"}},
        "user": "user", "item": "item", "time": "when", "labels": {"click": "click"}, "order": "stored",
        "split": {"by": "time", "valid": 0.1, "test": 0.2},
        "negatives": {"per_row": 3, "where": "click = 1", "by": by, "copied": ["page"], "splits": ["train", "test"]},
        "histories": {"seen": {"column": "item", "where": "click = 1"}},
        "keep": ["user", "item", "kind", "city", "page"],
        "features": {"user": {"kind": "sparse"}, "item": {"kind": "sparse"}, "kind": {"kind": "sparse"},
                     "seen": {"kind": "sequence"}, "page": {"kind": "sparse"}},
    }  # fmt: skip
    frames = {"log": pa.Table.from_pylist(log), "tables.items": pa.Table.from_pylist(items)}
    frames["tables.users"] = pa.Table.from_pylist(users)
    found = run_import(plan, tmp_path / "a", frames=frames)
    run_import(plan, tmp_path / "b", frames=frames, threads=4)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    without = {key: value for key, value in plan.items() if key != "negatives"}
    plain = run_import(without, tmp_path / "c", frames=frames)
    theirs = {user: {row["item"] for row in log if row["user"] == user} for user in {row["user"] for row in log}}
    of_train = {row["item"] for row in split_of(tmp_path / "c", "train")}
    total = 0
    for split in ("train", "valid", "test"):
        rows, real = split_of(tmp_path / "a", split), split_of(tmp_path / "c", split)
        drawn = rows[len(real) :]
        # the vocabulary is that of the log's own rows
        assert [row for row in rows if row in real][: len(real)] == real
        positives = sum(row["click"] for row in real)
        assert len(drawn) <= 3 * positives if split != "valid" else not drawn
        assert len(drawn) > 2 * positives or split == "valid"
        total += len(drawn)
        by_row = {(row["user"], row["when"]): row for row in real}
        pairs = [(row["user"], row["when"], row["item"]) for row in drawn]
        assert len(set(pairs)) == len(pairs)
        for row in drawn:
            positive = by_row[row["user"], row["when"]]
            assert positive["click"] == 1
            assert row["click"] == 0
            assert row["item"] in of_train - theirs[row["user"]]
            assert row["kind"] == (f"k{row['item'] % 5}" if row["item"] < 35 else None)
            assert (row["city"], row["page"]) == (f"c{row['user'][1:]}", positive["page"])
            assert row["seen"] == positive["seen"]
    assert found.drawn == total
    assert {key: rows for key, rows in found.rows.items() if key == "valid"} == {"valid": plain.rows["valid"]}


def grown_log(values: list[str], start: int) -> pa.Table:
    rows = len(values)
    return pa.table({"tag": values, "when": list(range(start, start + rows)), "n": [float(i) for i in range(rows)]})


def test_growing_keeps_ids(tmp_path: Path) -> None:
    plan: dict[str, Any] = {
        "split": {"valid": 0.0, "test": 0.0}, "embeddings": {"tag": {"min_count": 2}},
        "features": {"tag": {"kind": "sparse"}, "n": {"kind": "dense"},
                     "bin": {"kind": "sparse", "column": "n", "quantiles": 2}},
    }  # fmt: skip
    days = [["a", "a", "a", "b", "b", "rare"], ["c"] * 4 + ["b", "b", "rare"], ["d", "d", "a", "a", "e", "c"]]
    before: Path | None = None
    ids: dict[str, int] = {}
    for number, values in enumerate(days):
        out = tmp_path / str(number)
        found = run_import(plan, out, frames={"log": grown_log(values, number * 10)}, grow=before)
        table = pq.read_table(out / "_vocabularies" / "tag.parquet").to_pylist()
        now = {row["value"]: row["id"] for row in table}
        assert now.items() >= ids.items()
        fresh = [value for value in now if value not in ids]
        assert fresh == [["a", "b"], ["c"], ["d"]][number]
        assert [now[value] for value in fresh] == list(range(len(ids) + 1, len(now) + 1))
        assert {row["value"]: row["count"] for row in table} == {value: values.count(value) for value in now}
        schema = yaml.safe_load((out / "dataset.yaml").read_text())
        assert schema["features"]["tag"]["rows"] == len(now) + 1 == found.vocabularies["tag"] + 1
        assert schema["derive"]["bin"]["boundaries"] == [3.0]
        assert schema["features"]["n"]["mean"] == 2.5
        expected = [now.get(value, 0) for value in values]
        assert sorted(row["tag"] for row in split_of(out, "train")) == sorted(expected)
        before, ids = out, now


def test_growing_into_another_type_is_a_mistake(tmp_path: Path) -> None:
    plan: dict[str, Any] = {"features": {"tag": {"kind": "sparse"}}, "split": {"valid": 0.0, "test": 0.0}}
    run_import(plan, tmp_path / "a", frames={"log": grown_log(["a", "b"], 0)})
    numbers = pa.table({"tag": [1, 2, 3]})
    with pytest.raises(UserError, match=r"embeddings\.tag: .* integers now, and were strings"):
        run_import(plan, tmp_path / "b", frames={"log": numbers}, grow=tmp_path / "a")
    assert not (tmp_path / "b").exists()
    with pytest.raises(UserError, match="no folder that data import has written"):
        run_import(plan, tmp_path / "b", frames={"log": numbers}, grow=tmp_path / "nowhere")


SCRIPT = """
import sys
from pathlib import Path
from rechub_dist.data.importing.plan import read_plan
from rechub_dist.data.importing.run import import_data
def say(what, done, total):
    print(what, flush=True)
import_data(read_plan(Path(sys.argv[1])), Path(sys.argv[2]), memory=64 << 20, progress=say)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_import_leaves_nothing_to_see(tmp_path: Path, how: int) -> None:
    pq.write_table(a_big_log(120_000), tmp_path / "log.parquet")
    plan = A_BIG_PLAN | {"log": {"path": str(tmp_path / "log.parquet")}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    out = tmp_path / "out"
    for stage in ("histories", "count values", "write train"):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "plan.yaml"), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() == stage:
                    clock.sleep(0.05)
                    process.send_signal(how)
                    break
        assert process.returncode
        assert not out.exists()
    small = plan | {"filter": "click = 1", "now": False, "negatives": None}
    run_import({key: value for key, value in small.items() if value is not None}, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet", "out", "plan.yaml"]


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from rechub_dist.cli.entry import run_app
from rechub_dist.cli.main import app
sys.argv = ["rechub-dist", "data", "import", "--plan", sys.argv[1], "--out", sys.argv[2], "--memory", "64MB"]
sys.exit(run_app(app))
"""


@pytest.mark.parametrize("limit", [1 << 16, 1 << 20, 3 << 20])
def test_a_full_disk_is_one_line(tmp_path: Path, limit: int) -> None:
    pq.write_table(a_big_log(200_000), tmp_path / "log.parquet")
    plan = A_BIG_PLAN | {"log": {"path": str(tmp_path / "log.parquet")}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "plan.yaml"), str(tmp_path / "out"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet", "plan.yaml"]
