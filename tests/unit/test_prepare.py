"""Preparations on small files in the published formats, and (marked `data`) on the real ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest

from rechub_dist.data.prepare import preparation, preparations
from rechub_dist.data.prepare.writer import (
    SPLITS,
)
from rechub_dist.errors import UserError
from rechub_tests.prepared import ROOT, check_prepared, column, digest, rows, schema

DATA = ROOT / os.environ.get("RECHUB_DATA", "../shared/data")
SOURCES = {
    "movielens_1m_ctr": "movielens-1m",
    "movielens_1m_sequence": "movielens-1m",
    "kuairand_pure": "kuairand-pure",
    "amazon_beauty": "amazon-beauty",
    "diginetica": "diginetica",
    "criteo": "criteo-sample",
}


def test_preparations_are_found() -> None:
    assert set(preparations()) == set(SOURCES)
    assert all(found.summary and "\n" not in found.summary for found in preparations().values())
    with pytest.raises(UserError, match="did you mean 'kuairand_pure'"):
        preparation("kuairand-pure")


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_missing_source_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"missing source file {tmp_path}/\S+ \("):
        preparation(name).prepare(tmp_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# MovieLens-1M, click prediction


@pytest.fixture
def movielens(tmp_path: Path) -> Path:
    source = tmp_path / "movielens"
    source.mkdir()
    ratings = [f"{user}::{movie}::{1 + (user + movie) % 5}::1" for user in (1, 2, 5) for movie in range(10, 26)]
    (source / "ratings.dat").write_text("\n".join(ratings) + "\n")
    (source / "users.dat").write_text("5::M::56::16::70072\n1::F::1::10::48067-1234\n2::M::1::16::70072\n")
    movies = [f'{m}::Amélie, "the" {m} (film) ({1990 + m % 3})::Comedy|Drama'.encode("latin1") for m in range(10, 25)]
    movies += [b"25::1984 (1956)::Sci-Fi", b"99::Never rated (1900)::Western"]
    (source / "movies.dat").write_bytes(b"\n".join(movies) + b"\n")
    return source


def test_movielens_ctr(movielens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    preparation("movielens_1m_ctr").prepare(movielens, out)
    check_prepared(out)
    tables = {feature.name: feature.table.rows for feature in schema(out).features}  # type: ignore[union-attr]
    assert tables == {
        "user_id": 3, "item_id": 16, "age": 2, "gender": 2, "occupation": 2, "release_year": 4, "genre": 3
    }  # fmt: skip
    every = pa.concat_tables([rows(out, split) for split in SPLITS]).to_pylist()
    expected = {(u, m): (u + m) % 5 + 1 for u in (1, 2, 5) for m in range(10, 26)}
    expected = {pair: int(rating > 3) for pair, rating in expected.items() if rating != 3}
    users = (1, 2, 5)
    assert {(users[row["user_id"]], row["item_id"] + 10): row["label"] for row in every} == expected
    assert len(every) == len(expected)
    assert [rows(out, split).num_rows for split in SPLITS] == [len(every) - 2 * (len(every) // 10)] + [
        len(every) // 10
    ] * 2
    for row in every:
        assert row["genre"] == ([2] if row["item_id"] == 15 else [0, 1])
        assert row["release_year"] == (0 if row["item_id"] == 15 else (row["item_id"] + 10) % 3 + 1)
        assert (row["age"], row["gender"], row["occupation"]) == ((0, 0, 0), (0, 1, 1), (1, 1, 1))[row["user_id"]]
    before = digest(out)
    preparation("movielens_1m_ctr").prepare(movielens, out)
    assert digest(out) == before


def test_movielens_ctr_broken_source(movielens: Path, tmp_path: Path) -> None:
    with (movielens / "ratings.dat").open("a") as file:
        file.write("1::77::5::1\n")
    with pytest.raises(UserError, match=r"77, which movies\.dat does not hold"):
        preparation("movielens_1m_ctr").prepare(movielens, tmp_path / "out")
    (movielens / "users.dat").write_text("1,F\n")
    with pytest.raises(UserError, match=r"users\.dat is not in the published format") as caught:
        preparation("movielens_1m_ctr").prepare(movielens, tmp_path / "out")
    assert "\n" not in str(caught.value)


# MovieLens-1M, next item


def test_movielens_sequence(tmp_path: Path) -> None:
    lines = {1: [1, 2, 3, 4, 2], 2: [3, 1, 2], 3: [4, 3], 4: [1], 9: [2, 5, 1, 3]}
    text = "".join(f"{user} {item}\n" for user, items in lines.items() for item in items)
    (tmp_path / "ml-1m.txt").write_text(text)
    out = tmp_path / "out"
    preparation("movielens_1m_sequence").prepare(tmp_path, out)
    check_prepared(out)
    found = {
        split: {row["user_id"]: (row["history"], row["item"]) for row in rows(out, split).to_pylist()}
        for split in SPLITS
    }
    assert found["train"] == {0: ([0, 1], 2), 2: ([3], 2), 4: ([1], 4)}
    assert found["valid"] == {0: ([0, 1, 2], 3), 1: ([2], 0), 4: ([1, 4], 0)}
    assert found["test"] == {0: ([0, 1, 2, 3], 1), 1: ([2, 0], 1), 4: ([1, 4, 0], 2)}


# KuaiRand-Pure

MIDNIGHT = {day: 1650816000000 + (day - 25) * 86_400_000 for day in range(25, 31)}  # in UTC+8


@pytest.fixture
def kuairand(tmp_path: Path) -> Path:
    source = tmp_path / "kuairand"
    source.mkdir()
    impressions = [  # user, video, time
        (2, 7, MIDNIGHT[30] + 3_600_000),
        (0, 5, MIDNIGHT[25] + 1),
        (0, 5, MIDNIGHT[25] + 1),  # twice in the log
        (0, 7, MIDNIGHT[29] - 1),
        (1, 6, MIDNIGHT[29]),
        (0, 6, MIDNIGHT[25] - 5),  # the last of the user's own history
    ]
    columns: dict[str, Any] = {
        "user_id": [user for user, _, _ in impressions],
        "video_id": [video for _, video, _ in impressions],
        "time_ms": [time for _, _, time in impressions],
        "tab": [1, 1, 1, 4, 1, 1],
        "play_time_ms": [9] * 6,
    }
    for name in ("is_click", "long_view", "is_like", "is_follow", "is_comment", "is_forward"):
        columns[name] = [int(video == 7) for _, video, _ in impressions]
    pq.write_table(pa.table(columns), source / "interactions_2022-04-25_to_2022-04-30.parquet")
    histories = pa.table(
        {
            "user_id": [1, 0],
            "last_time_ms": [MIDNIGHT[25] - 100, MIDNIGHT[25] - 5],
            "watch_seq": [[7, 7], [5, 7, 6]],
            "long_watch_seq": [[7], []],
            "like_seq": pa.array([[], []], pa.list_(pa.int64())),
        }
    )
    pq.write_table(histories, source / "user_sequences.parquet")
    ranges = {f"{name}_range": ["a", "b", "a"] for name in ("follow_user_num", "fans_user_num", "friend_user_num")}
    users: dict[str, Any] = {
        "user_id": [0, 1, 2],
        "user_active_degree": ["full", "full", "UNKNOWN"],
        "is_live_streamer": [-124, 1, 1],
        "is_video_author": [0, 1, 1],
        **ranges,
        "register_days_range": ["8-14", "15-30", "8-14"],
        **{name: [3, 0, 10] for name in ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")},
        **{f"onehot_feat{i}": [0, None, 5] for i in range(18)},
    }
    pcsv.write_csv(pa.table(users), source / "user_features_pure.csv")
    videos = {
        "video_id": [5, 6, 7],
        "author_id": [900, 900, 30],
        "video_type": ["NORMAL", "AD", "NORMAL"],
        "upload_type": ["Web", "Web", "Kmovie"],
        "upload_dt": ["2022-04-09", "2022-04-10", "2022-04-09"],
        "video_duration": [2000.0, None, 500.0],
        "music_type": [9.0, None, 4.0],
        "tag": ["39,68", "", "39"],
    }
    pcsv.write_csv(pa.table(videos), source / "video_features_basic_pure.csv")
    return source


def test_kuairand(kuairand: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    preparation("kuairand_pure").prepare(kuairand, out)
    check_prepared(out)
    train, valid, test = (rows(out, split).to_pylist() for split in SPLITS)
    assert [len(train), len(valid), len(test)] == [2, 1, 1]
    first = train[0]
    assert (first["user_id"], first["video_id"], first["author_id"], first["tab"], first["hour"]) == (1, 1, 2, 1, 1)
    assert (first["tag"], first["duration"], first["music_type"], first["onehot_feat3"]) == ([1, 2], 2.0, 2, 1)
    assert (first["history"], first["history_author"]) == ([1, 3, 2], [2, 1, 2])
    assert (first["history_long_view"], first["history_like"]) == ([], [])
    assert (first["click"], first["forward"], train[1]["click"], train[1]["hour"]) == (0, 0, 1, 24)
    assert (valid[0]["video_id"], valid[0]["tag"], valid[0]["duration"]) == (2, [], None)
    assert (valid[0]["music_type"], valid[0]["onehot_feat3"], valid[0]["history"]) == (0, 0, [3, 3])
    assert (test[0]["user_id"], test[0]["history"], test[0]["history_author"]) == (3, [], [])
    assert test[0]["hour"] == 2


def test_kuairand_missing_column(kuairand: Path, tmp_path: Path) -> None:
    pcsv.write_csv(pa.table({"user_id": [0]}), kuairand / "user_features_pure.csv")
    with pytest.raises(UserError, match=r"user_features_pure\.csv has no column 'fans_user_num'"):
        preparation("kuairand_pure").prepare(kuairand, tmp_path / "out")


# the real data sets


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if not DATA.is_dir():
        pytest.skip(f"no data sets at {DATA} (RECHUB_DATA)")
    done: dict[str, Path] = {}

    def prepared(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name) / "out"
            preparation(name).prepare(DATA / SOURCES[name], done[name])
        return done[name]

    return prepared


@pytest.mark.data
@pytest.mark.parametrize("name", sorted(SOURCES.keys() - {"criteo"}))  # of which only a sample is there
def test_real_schema_is_the_committed_one(real: Any, name: str) -> None:
    out = real(name)
    check_prepared(out)
    assert (out / "dataset.yaml").read_text() == (ROOT / "configs" / "datasets" / f"{name}.yaml").read_text()


@pytest.mark.data
def test_real_movielens_ctr(real: Any) -> None:
    splits = [rows(real("movielens_1m_ctr"), split) for split in SPLITS]
    assert [table.num_rows for table in splits] == [591_210, 73_901, 73_901]
    pairs = [column(table, "user_id").astype(np.int64) * 10_000 + column(table, "item_id") for table in splits]
    assert len(np.unique(np.concatenate(pairs))) == 739_012
    for table in splits:
        assert column(table, "label").mean() == pytest.approx(0.778, abs=0.001)


@pytest.mark.data
def test_real_movielens_sequence(real: Any) -> None:
    """History and item of the test rows are the source itself; the earlier splits' are its beginnings."""
    train, valid, test = (rows(real("movielens_1m_sequence"), split) for split in SPLITS)
    assert [train.num_rows, valid.num_rows, test.num_rows] == [6040] * 3
    source = np.loadtxt(DATA / "movielens-1m" / "ml-1m.txt", dtype=np.int64)
    assert len(source) == 999_611

    def sequences(table: pa.Table) -> list[list[int]]:
        items = zip(table["history"].to_pylist(), table["item"].to_pylist(), strict=True)
        return [[*history, item] for history, item in items]

    whole = sequences(test)
    assert np.array_equal(np.concatenate([np.array(sequence) for sequence in whole]) + 1, source[:, 1])
    users = np.repeat(column(test, "user_id"), [len(sequence) for sequence in whole]) + 1
    assert np.array_equal(users, source[:, 0])
    assert sequences(valid) == [sequence[:-1] for sequence in whole]
    assert sequences(train) == [sequence[:-2] for sequence in whole]


@pytest.mark.data
def test_real_kuairand(real: Any) -> None:
    splits = [rows(real("kuairand_pure"), split) for split in SPLITS]
    assert [table.num_rows for table in splits] == [56_137, 15_304, 20_361]
    for table in splits:
        assert column(table, "click").mean() == pytest.approx(0.45, abs=0.03)
        assert pc.list_value_length(table["history"]).equals(pc.list_value_length(table["history_author"]))
        assert pc.max(pc.list_value_length(table["history"])).as_py() <= 50
