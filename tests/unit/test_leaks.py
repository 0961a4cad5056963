"""The check for leaks: it finds those that were put in, and says what is clean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from rechub_dist.cli.data import data_app
from rechub_dist.data.tools.leaks import LeakReport, check_leaks

ROWS = {"train": 4000, "valid": 600, "test": 500}


def clean_tables(seed: int = 0) -> dict[str, dict[str, Any]]:
    """Splits by time, of rows that differ, with features that say something of the label, and not all."""
    rng, start, tables = np.random.default_rng(seed), 1_600_000_000, {}
    for split, rows in ROWS.items():
        x = rng.normal(size=rows)
        times = start + np.sort(rng.integers(0, 10**6, rows))
        items = rng.integers(0, 500, rows)
        history = [rng.integers(0, 500, rng.integers(0, 6)) for _ in range(rows)]
        tables[split] = {
            "user_id": rng.integers(0, 300, rows),
            "item_id": items,
            "x": x,
            "city": rng.choice(["Oslo", "Rome", "Łódź"], rows).tolist(),
            "history": [values.tolist() for values in history],
            "history_time": [
                np.sort(now - rng.integers(1, 10**5, len(h))).tolist() for now, h in zip(times, history, strict=True)
            ],
            "timestamp": times,
            "label": (x + rng.normal(size=rows) > 0.5).astype(np.int8),
        }
        start += 10**6
    return tables


def write(root: Path, tables: dict[str, dict[str, Any]]) -> str:
    for split, columns in tables.items():
        (root / split).mkdir()
        pq.write_table(pa.table(columns), root / split / "x.parquet", row_group_size=700)
    return str(root)


def found(report: LeakReport, check: str) -> list[dict[str, Any]]:
    return [finding.figures for finding in report.findings if finding.check == check]


def test_clean_data_are_said_to_be(tmp_path: Path) -> None:
    report = check_leaks(write(tmp_path, clean_tables()))
    assert report.findings == []
    assert [item.check for item in report.clean].count("time") == 2
    assert [item.text for item in report.clean if item.check == "rows"] == [
        "no row of valid is in train, by 7 columns",
        "no row of test is in train, by 7 columns",
        "no row of test is in valid, by 7 columns",
    ]
    texts = " ".join(item.text for item in report.clean)
    assert "'history_time' is never later than the row's 'timestamp'" in texts
    assert "'history' ends with the row's 'item_id' in" in texts
    assert [item.text for item in report.skipped] == [
        "against 'label', by the mean of each value, with fewer than 20 rows a value: user_id, item_id"
    ]


def test_times_that_overlap(tmp_path: Path) -> None:
    tables = clean_tables()
    later = tables["train"]["timestamp"].copy()
    later[-7:] = 1_601_000_000 + 600_000  # among those of valid
    tables["train"]["timestamp"] = later
    tables["train"]["history_time"] = [[] for _ in later]
    report = check_leaks(write(tmp_path, tables))
    valid = tables["valid"]["timestamp"]
    [figures] = found(report, "time")
    assert (figures["split"], figures["later"], figures["rows_after"]) == ("train", "valid", 7)
    assert figures["rows_before"] == (valid < later.max()).sum()
    assert "valid ends at" in next(item.text for item in report.clean if item.check == "time")


def test_equal_times_at_the_border_do_not_overlap(tmp_path: Path) -> None:
    tables = {split: {"date": [day] * 2, "x": [day, day + 10]} for split, day in (("train", 1), ("valid", 2))}
    tables["train"]["date"] = [1, 2]
    report = check_leaks(write(tmp_path, tables), time="date")
    assert found(report, "time") == []


def test_rows_in_two_splits(tmp_path: Path) -> None:
    tables = clean_tables()
    whole = {split: pa.table(columns) for split, columns in tables.items()}
    twice = whole["train"].take([5, 5, 99])
    flipped = twice.set_column(twice.schema.get_field_index("label"), "label", pa.array([9, 9, 9], pa.int8()))
    whole["test"] = pa.concat_tables([whole["test"], flipped])  # a label that differs makes no other row
    whole["train"] = pa.concat_tables([whole["train"], whole["train"].take([5])])
    for split, table in whole.items():
        (tmp_path / split).mkdir()
        pq.write_table(table, tmp_path / split / "x.parquet")
    [figures] = found(check_leaks(str(tmp_path)), "rows")
    assert (figures["split"], figures["also_in"]) == ("test", "train")
    assert (figures["equal"], figures["rows"]) == (3, 503)
    assert figures["equal_within"] == pytest.approx(2 / 4001)
    assert "label" not in figures["columns"]


@pytest.mark.parametrize("how", ["rank", "negative rank", "value", "number by value", "missing", "length", "flag"])
def test_features_that_give_the_label_away(tmp_path: Path, how: str) -> None:
    tables = clean_tables()
    rng = np.random.default_rng(1)
    for columns in tables.values():
        y = columns["label"].astype(int)
        noise = rng.integers(0, 8, len(y))
        columns["leak"] = {
            "rank": y + rng.random(len(y)),
            "negative rank": (-y - rng.random(len(y))).tolist(),
            "value": [f"v{2 * k + positive}" for k, positive in zip(noise, y, strict=True)],
            "number by value": 2 * noise + y,
            "missing": [None if positive else 1.0 for positive in y],
            "length": [[1] * (2 + positive) for positive in y],
            "flag": y == 0,
        }[how]
    report = check_leaks(write(tmp_path, tables))
    [figures] = found(report, "features")
    assert (figures["column"], figures["label"], figures["rows"]) == ("leak", "label", 4000)
    assert figures["auc"] > 0.999
    assert "mean" in figures["how"] if "value" in how else "mean" not in figures["how"] or how == "flag"


def test_the_auc_is_the_usual_one(tmp_path: Path) -> None:
    tables = clean_tables()
    for columns in tables.values():
        columns["x"] = np.round(columns["x"])  # so that there are ties
    report = check_leaks(write(tmp_path, tables))
    [text] = [item.text for item in report.clean if item.check == "features"]
    wanted = roc_auc_score(tables["train"]["label"], tables["train"]["x"])
    assert text == f"6 features, each alone against 'label': AUC up to {wanted:.4f} ('x')"


def test_ids_with_few_rows_give_nothing_away(tmp_path: Path) -> None:
    """The mean label of a value that occurs once would be the label."""
    tables = clean_tables()
    for columns in tables.values():
        columns["name"] = [f"n{i}" for i in range(len(columns["label"]))]
    report = check_leaks(write(tmp_path, tables))
    assert found(report, "features") == []
    assert any("name" in item.text for item in report.skipped)


def test_the_mean_of_a_value_is_of_other_rows(tmp_path: Path) -> None:
    """With its own label in it, it would seem to predict."""
    rng = np.random.default_rng(3)
    columns = {"k": [f"k{i}" for i in rng.integers(0, 190, 4000)], "label": rng.integers(0, 2, 4000)}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    [item] = [item for item in check_leaks(str(tmp_path)).clean if item.check == "features"]
    auc = float(item.text.partition("AUC up to ")[2].split()[0])
    assert abs(auc - 0.5) < 0.04


def test_labels_of_more_values_are_cut_at_their_median(tmp_path: Path) -> None:
    tables = clean_tables()
    for columns in tables.values():
        columns["rating"] = np.exp(columns["x"])
        del columns["label"]
    report = check_leaks(write(tmp_path, tables))
    [figures] = found(report, "features")
    assert (figures["column"], figures["label"], figures["auc"]) == ("x", "rating", 1.0)
    assert "'rating' above " in report.findings[-1].text


def test_histories_that_hold_the_future(tmp_path: Path) -> None:
    tables = clean_tables()
    for columns in tables.values():
        pairs = list(zip(columns["history"], columns["item_id"].tolist(), strict=True))
        columns["history"] = [[*history, item] for history, item in pairs]
        columns["history_time"] = [[*times, 0] for times in columns["history_time"]]
    tables["valid"]["history_time"][3] = [tables["valid"]["timestamp"][3] + 1]
    figures = found(check_leaks(write(tmp_path, tables)), "histories")
    [late] = [item for item in figures if "late" in item]
    assert (late["split"], late["late"]) == ("valid", 1)
    last = {item["split"]: (item["last"], item["rows"]) for item in figures if "last" in item}
    assert last == {split: (rows, rows) for split, rows in ROWS.items()}


def test_one_file_and_a_sample(tmp_path: Path) -> None:
    tables = clean_tables()
    write(tmp_path, tables)
    report = check_leaks(str(tmp_path / "train" / "x.parquet"))
    assert [(item.check, item.text) for item in report.skipped[:2]] == [
        ("time", "there is one split"), ("rows", "there is one split"),
    ]  # fmt: skip
    sampled = check_leaks(str(tmp_path), sample=300)
    assert any(item.text.endswith("(in the sample)") for item in sampled.clean)


def test_the_schema_says_which_columns_are_features(tmp_path: Path) -> None:
    tables = clean_tables()
    for columns in tables.values():
        columns["outcome"] = columns["label"] * 1.5  # known, but no feature
    path = write(tmp_path, tables)
    assert [item["column"] for item in found(check_leaks(path, labels=("label",)), "features")] == ["outcome"]
    (tmp_path / "dataset.yaml").write_text(
        "features: {x: {kind: dense}, item_id: {kind: sparse, rows: 500}}\nlabels: {label: {}}\n"
    )
    report = check_leaks(path)
    assert found(report, "features") == []
    assert "no row of valid is in train, by 4 columns" in [item.text for item in report.clean]


def test_what_is_printed(tmp_path: Path) -> None:
    tables = clean_tables()
    tables["test"] = tables["train"]
    write(tmp_path, tables)
    text = CliRunner().invoke(data_app, ["inspect", str(tmp_path), "--leaks"]).stdout
    assert "found (rows): 4,000 of 4,000 rows of test (100.00%) are also in train" in text
    assert "found (time): valid ends at" in text
    assert "clean (features): 6 features" in text


def test_a_constant_label(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": range(100), "label": 1})
    frame.to_parquet(tmp_path / "x.parquet")
    report = check_leaks(str(tmp_path))
    assert ("features", "'label' has one value in the sample") in [(item.check, item.text) for item in report.skipped]
