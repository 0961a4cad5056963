"""Guessed plans: of tables of many shapes they can be read, imported and trained on."""

from __future__ import annotations

import datetime
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rechub_dist.config.strict_yaml import parse_yaml
from rechub_dist.data.importing.guess import guess_plan
from rechub_dist.data.importing.plan import Plan, plan_of, plan_text, read_plan
from rechub_dist.data.importing.run import Imported, import_data
from rechub_dist.errors import UserError
from rechub_tests.import_cases import Row, split_of, write_csv
from rechub_tests.runs import run_file, train

ROWS = 300


def ratings(draw: random.Random) -> list[Row]:
    return [
        {"userId": draw.randrange(30), "movieId": draw.randrange(50), "rating": draw.choice([0.5, 3.0, 4.5, 5.0]),
         "timestamp": 1_600_000_000 + i * 1000}
        for i in range(ROWS)
    ]  # fmt: skip


def clicks(draw: random.Random) -> list[Row]:
    return [
        {"uid": f"u{draw.randrange(30)}", "Item ID": f"it's {draw.randrange(50)}", "clicked": draw.randrange(2),
         "time": str(datetime.datetime(2024, 1, 1) + datetime.timedelta(hours=i)),
         "tags": draw.choice(["a|b", "b", "a|c|b"]), "interests": draw.choice(["x:0.5,y:2", "y:1"]),
         "price": draw.choice(["", 1.5, 200.25]), "history": draw.choice(["p", "q"]), "clicked_high": 3}
        for i in range(ROWS)
    ]  # fmt: skip


def census(draw: random.Random) -> list[Row]:
    return [
        {"Unnamed: 0": i, "Age": draw.randrange(18, 90), "work-class": draw.choice(["Private", "?", "State, gov"]),
         "gain": draw.choice([0, 0, 99999]), "income": draw.choice([">50K", "<=50K", "<=50K"]), "empty": ""}
        for i in range(ROWS)
    ]  # fmt: skip


def odd_names(draw: random.Random) -> list[Row]:
    return [
        {"user": draw.choice(["a", ""]), "item": draw.randrange(9), "ts": draw.choice([1.7e9 + i, ""]), "label": i % 2,
         "new\nline": draw.choice("xy"), "a: b #c": draw.choice("xy"), "select": draw.randrange(5), "ID": i,
         "no": draw.choice(["yes", "no"]), "x" * 200: draw.choice("pq"), "🙂": draw.choice("pq"), "'": "pq"[i % 2]}
        for i in range(ROWS)
    ]  # fmt: skip


SHAPES = [ratings, clicks, census, odd_names]


def guessed(path: Path, folder: Path, **options: Any) -> tuple[str, Plan, Imported]:
    text = guess_plan([str(path)], options.pop("tables", {}), memory=128 << 20, threads=2, **options)
    (folder / "plan.yaml").write_text(text, encoding="utf-8")
    plan = read_plan(folder / "plan.yaml")
    return text, plan, import_data(plan, folder / "out", memory=128 << 20, threads=2)


def write(rows: list[Row], path: Path) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({k: pa.array([None if r[k] == "" else r[k] for r in rows]) for k in rows[0]}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({k: v if v != "" else None for k, v in row.items()}) + "\n" for row in rows))
    else:
        write_csv(rows, path, delimiter=";" if path.suffix == ".txt" else ",")


@pytest.mark.parametrize("name", ["log.csv", "log.txt", "log.jsonl", "log.parquet", "log.csv.gz"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_guessed_plan_is_imported(tmp_path: Path, shape: Any, name: str) -> None:
    rows = shape(random.Random(1))
    write(rows, tmp_path / name)
    text, plan, found = guessed(tmp_path / name, tmp_path)
    assert sum(found.rows.values()) + found.unused == found.read - (
        sum(row["user"] == "" or row["ts"] == "" for row in rows) if shape is odd_names else 0
    )
    assert plan_of(parse_yaml(plan_text(plan), "again")) == plan
    assert plan_of(yaml.safe_load(text)) == plan
    assert plan.labels
    for label in plan.labels.values():
        read = {"ratings": "rating", "clicks": "clicked", "census": "income", "odd_names": "label"}[shape.__name__]
        assert read in str(label)
        assert read not in plan.features
    columns = {getattr(feature, "column", None) or key for key, feature in plan.features.items()}
    assert "Unnamed: 0" not in columns
    assert "empty" not in columns
    if shape is ratings:
        assert (plan.user, plan.item, plan.time) == ("userId", "movieId", "timestamp")
        assert plan.split.by == "time"
        assert set(plan.features) >= {"userId", "movieId", "history"}
    if shape is clicks:
        assert {"tags_list", "interests_keys", "history_"} <= set(plan.features)
        assert split_of(tmp_path / "out", "train")[0].keys() >= {"tags_list", "interests_weights", "history_"}
    if shape is odd_names:
        assert set(plan.features) >= {"new\nline", "a: b #c", "select", "x" * 200, "🙂", "'", "no"}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_guessed_plan_trains(tmp_path: Path, shape: Any) -> None:
    write(shape(random.Random(2)), tmp_path / "log.csv")
    _, plan, _ = guessed(tmp_path / "log.csv", tmp_path)
    pooled = [name for name, feature in plan.features.items() if feature.kind in ("sparse", "dense")]
    model = {"name": "DeepFM", "features": pooled, "embedding_dim": 4, "hidden_units": [8], "dropout_rates": 0.0}
    file = run_file(tmp_path, tmp_path / "out", "DeepFM", model=model)
    tree = yaml.safe_load(file.read_text())
    tree["model"], tree["data"]["labels"] = model, list(plan.labels)[:1]
    file.write_text(yaml.safe_dump(tree))
    assert train(file).step > 1


def test_without_a_header(tmp_path: Path) -> None:
    rows = ratings(random.Random(3))
    write_csv(rows, tmp_path / "ratings.dat", delimiter="\t", header=False)
    users = [{"userId": i, "name": f'n"{i}', "city": f"ü{i % 3}"} for i in range(30)]
    (tmp_path / "users.dat").write_text(
        "".join("::".join(map(str, u.values())) + "\n" for u in users), encoding="latin-1"
    )
    names = [["userId", "movieId", "rating", "timestamp"], ["userId", "name", "city"]]
    path = tmp_path / "ratings.dat"
    _, plan, found = guessed(path, tmp_path, tables={"users": str(tmp_path / "users.dat")}, names=names)
    assert (plan.log.header, list(plan.log.columns or {})) == (False, names[0])
    assert (plan.tables["users"].delimiter, plan.tables["users"].encoding) == ("::", "latin-1")
    assert found.vocabularies["city"] == 3
    with pytest.raises(UserError, match="no header"):
        guess_plan([str(path)], {"users": str(tmp_path / "users.dat")}, names=names[:1], memory=128 << 20)
    with pytest.raises(UserError, match=r"gives 2 names, and .* has 4 columns"):
        guess_plan([str(path)], {}, names=[["a", "b"]], memory=128 << 20)
    write_csv(rows, tmp_path / "ratings.csv")
    with pytest.raises(UserError, match="has a header"):
        guess_plan([str(tmp_path / "ratings.csv")], {}, names=names[:1], memory=128 << 20)


def test_a_given_label_keeps_its_columns_from_the_features(tmp_path: Path) -> None:
    rows = [{"user": i % 7, "My Rating%": i % 5, "Stars": i % 4, "kind": f"k{i % 3}"} for i in range(50)]
    write_csv(rows, tmp_path / "log.csv")
    _, plan, _ = guessed(tmp_path / "log.csv", tmp_path, labels=['"my rating%" + stars >= 4'])
    assert set(plan.features) == {"user", "kind"}
    assert plan.labels == {"label": '"my rating%" + stars >= 4'}
    with pytest.raises(UserError, match="--label: '\"My Rating%\" >': syntax error"):
        guess_plan([str(tmp_path / "log.csv")], {}, labels=['"My Rating%" >'], memory=128 << 20)


def test_dates_are_read_as_they_are_written(tmp_path: Path) -> None:
    rows = [{"user": i % 7, "item": i % 5, "date": f"{i % 28 + 1:02}/03/2024", "clicked": i % 2} for i in range(100)]
    write_csv(rows, tmp_path / "log.csv")
    _, plan, _ = guessed(tmp_path / "log.csv", tmp_path)
    assert (plan.time, plan.log.times) == ("date", "%d/%m/%Y")
    assert split_of(tmp_path / "out", "test")[0]["date"] >= datetime.date(2024, 3, 20)


@pytest.mark.parametrize("more", [(), ("left at",)])
def test_the_only_column_of_times_is_the_time(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Whatever its name is; of two it cannot be known which."""
    names = ("Seen at", *more)
    rows = [
        {"user": i % 7, "clicked": i % 2} | dict.fromkeys(names, f"2024-03-{i % 28 + 1:02} 12:00:00")
        for i in range(100)
    ]
    write_csv(rows, tmp_path / "log.csv")
    _, plan, _ = guessed(tmp_path / "log.csv", tmp_path)
    assert (plan.time, plan.split.by) == ((None, "random") if more else ("Seen at", "time"))


def test_quotes_are_expected_unless_they_cannot_be(tmp_path: Path) -> None:
    rows = [{"user": i % 7, "clicked": i % 2, "kind": f"k{i % 3}"} for i in range(100)]
    write_csv(rows, tmp_path / "log.csv")
    _, plan, _ = guessed(tmp_path / "log.csv", tmp_path)
    assert plan.log.quote == '"'
    with (tmp_path / "log.csv").open("a") as file:
        file.write('3,1,"a, b"\n')
    assert import_data(plan, tmp_path / "out", memory=128 << 20).read == 101


def test_unsigned_integers_of_64_bits(tmp_path: Path) -> None:
    table = {
        "user": pa.array([2**64 - 1 - i % 3 for i in range(40)], pa.uint64()),
        "clicked": [i % 2 for i in range(40)],
    }
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    _, plan, found = guessed(tmp_path / "log.parquet", tmp_path)
    assert found.vocabularies == {"user": 3}
    assert "user" not in (plan.log.columns or {})
