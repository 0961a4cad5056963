"""Preparations on small files in the published formats, and (marked `data`) on the real ones."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from rechub_dist.config import read_yaml
from rechub_dist.data.prepare import preparation, preparations
from rechub_dist.data.prepare.synthetic import _World, synthesize
from rechub_dist.data.prepare.writer import (
    ROW_GROUP,
    SPLITS,
    ShardWriter,
    prepared_folder,
    schema_text,
    write_schema,
    write_split,
)
from rechub_dist.errors import UserError
from rechub_dist.features import DenseFeature, FeatureSchema, Label, SequenceFeature, SparseFeature, Table
from rechub_dist.schema import parse_schema

ROOT = Path(__file__).parents[2]
DATA = ROOT / os.environ.get("RECHUB_DATA", "../shared/data")
SOURCES = {
    "movielens_1m_ctr": "movielens-1m",
    "movielens_1m_sequence": "movielens-1m",
    "kuairand_pure": "kuairand-pure",
    "amazon_beauty": "amazon-beauty",
    "diginetica": "diginetica",
    "criteo": "criteo-sample",
}


def rows(folder: Path, split: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in sorted((folder / split).iterdir())])


def schema(folder: Path) -> FeatureSchema:
    return parse_schema(read_yaml(folder / "dataset.yaml"))


def column(table: pa.Table, name: str) -> np.ndarray[Any, Any]:
    return table[name].to_numpy()


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_prepared(folder: Path) -> None:
    """Every feature has a column of its kind in every split, without gaps, and ids lie within their tables."""
    declared = schema(folder)
    names = {item.source for item in (*declared.features, *declared.labels)}
    for split in SPLITS:
        for file in (folder / split).iterdir():
            metadata = pq.ParquetFile(file).metadata
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            assert all(group.num_rows == ROW_GROUP for group in groups[:-1])
            assert groups[0].column(0).compression == "ZSTD"
        table = rows(folder, split)
        assert set(table.column_names) == names
        for feature in declared.features:
            values = table[feature.source].combine_chunks()
            if isinstance(feature, DenseFeature):
                assert pa.types.is_floating(values.type)
                assert feature.missing == "fill" or values.null_count == 0
                continue
            assert values.null_count == 0
            if isinstance(feature, SequenceFeature):
                assert pa.types.is_list(values.type)
            if pa.types.is_list(values.type):
                values = values.flatten()
                assert values.null_count == 0
            assert pa.types.is_integer(values.type)
            if len(values):
                low, high = pc.min_max(values).as_py().values()
                assert low >= 0
                assert high < feature.table.rows, feature.name
        for label in declared.labels:
            assert set(pc.unique(table[label.source]).to_pylist()) <= {0, 1}


# the writer


def break_down(out: Path) -> None:
    with prepared_folder(out, "small") as folder:
        small(folder)
        raise RuntimeError


def small(folder: Path) -> None:
    write_split(folder, "train", pa.table({"x": [1]}))
    write_schema(folder, "small", FeatureSchema((DenseFeature("x"),)))


def test_schema_text_is_what_the_parser_reads() -> None:
    movie, own = Table("movie", 10), Table("genre", 5, dim=8)
    declared = FeatureSchema(
        (
            SparseFeature("user", Table("user", 3), missing="unknown", unknown_id=2),
            SparseFeature("movie", movie, column="movie_id"),
            SequenceFeature("history", movie, max_length=4, keep="first"),
            SparseFeature("genre", own, pooling="mean", hash=True),
            DenseFeature("price", dim=2, transform="log", missing="fill", fill=-1.0),
        ),
        (Label("click"), Label("watch", column="seconds", type="regression")),
        weight="w",
    )
    text = schema_text("small", declared)
    assert text.splitlines()[:6] == [
        "name: small",
        "tables:",
        "  movie: {rows: 10}",
        "  genre: {rows: 5, dim: 8}",
        "features:",
        "  user: {kind: sparse, rows: 3, missing: unknown, unknown_id: 2}",
    ]
    assert "  click: {type: classification}" in text.splitlines()


def test_schema_text_round_trip(tmp_path: Path) -> None:
    movie = Table("movie", 10, init_std=0.5)
    declared = FeatureSchema(
        (
            SparseFeature("user", Table("user", 3)),
            SparseFeature("item", movie),
            SequenceFeature("history", movie, max_length=4, missing="drop"),
            DenseFeature("price", missing="fill", fill=2.5),
        ),
        (Label("y", type="regression"),),
        weight="w",
    )
    write_schema(tmp_path, "small", declared)
    assert schema(tmp_path) == declared


def test_shards_and_row_groups(tmp_path: Path) -> None:
    total = ROW_GROUP + 50_000
    with ShardWriter(tmp_path, "train", pa.schema([("x", pa.int32())]), shard_rows=ROW_GROUP + 10_000) as writer:
        writer.write(pa.table({"x": pa.array(range(10_000), pa.int64())}))
        writer.write(pa.table({"x": pa.array(range(10_000, total), pa.int64())}))
    sizes = [pq.ParquetFile(file).metadata.num_rows for file in sorted((tmp_path / "train").iterdir())]
    assert sizes == [ROW_GROUP + 10_000, 40_000]
    assert column(rows(tmp_path, "train"), "x").tolist() == list(range(total))


def test_split_without_rows_has_its_columns(tmp_path: Path) -> None:
    write_split(tmp_path, "test", pa.table({"x": pa.array([], pa.int32())}))
    assert rows(tmp_path, "test").schema == pa.schema([("x", pa.int32())])


def test_failure_leaves_nothing_and_keeps_the_earlier(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError):
        break_down(out)
    assert list(out.parent.iterdir()) == []
    with prepared_folder(out, "small") as folder:
        small(folder)
    before = digest(out)
    with pytest.raises(RuntimeError):
        break_down(out)
    assert digest(out) == before
    with prepared_folder(out, "small") as folder:
        small(folder)
        write_split(folder, "valid", pa.table({"x": [1]}))
    assert (out / "valid").is_dir()
    assert list(out.parent.iterdir()) == [out]


def test_killed_preparation_is_cleared_by_the_next(tmp_path: Path) -> None:
    debris = tmp_path / ".out.preparing" / "train"
    debris.mkdir(parents=True)
    (debris / "part-00099.parquet").touch()
    with prepared_folder(tmp_path / "out", "small") as folder:
        small(folder)
    assert sorted(digest(tmp_path / "out")) == ["dataset.yaml", "train/part-00000.parquet"]


@pytest.mark.parametrize("files", [["notes.txt"], ["dataset.yaml", "notes.txt"], ["train"], ["dataset.yaml", "train"]])
def test_foreign_folder_is_refused(tmp_path: Path, files: list[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in files:
        (out / name).write_text("name: smaller\n")
    with pytest.raises(UserError, match="no earlier preparation"), prepared_folder(out, "small"):
        pass
    assert sorted(path.name for path in out.iterdir()) == sorted(files)


def test_file_as_folder_is_refused_and_empty_folder_is_fine(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"), prepared_folder(tmp_path / "file", "small"):
        pass
    (tmp_path / "out").mkdir()
    with prepared_folder(tmp_path / "out", "small") as folder:
        small(folder)
    assert (tmp_path / "out" / "dataset.yaml").is_file()


# the registry


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


# synthetic


def test_synthetic_schema_is_the_committed_one(tmp_path: Path) -> None:
    synthesize(tmp_path / "out", 10)
    committed = ROOT / "configs" / "datasets" / "synthetic.yaml"
    assert (tmp_path / "out" / "dataset.yaml").read_text() == committed.read_text()


def test_synthetic_truth_agrees_with_the_rows(tmp_path: Path) -> None:
    out = tmp_path / "out"
    size = 90_000
    synthesize(out, size, dense=3, sparse=5, vocabulary=50, sequence=True, labels=2, seed=3, files=3)
    check_prepared(out)
    assert [rows(out, split).num_rows for split in SPLITS] == [72_000, 9_000, 9_000]
    assert len(list((out / "train").iterdir())) == 3
    truth = json.loads((out / "truth.json").read_text())
    world = _World(dense=3, sparse=5, vocabulary=50, sequence=True, skew=1.05, seed=3, labels=2)
    for number, split in enumerate(SPLITS):
        table = rows(out, split)
        random = np.random.default_rng([3, number, 0])
        sample = world.sample(random, min(ROW_GROUP, table.num_rows))
        for name, probability in world.probabilities(sample):
            label = column(table, name)
            assert truth[split][name]["rows"] == table.num_rows
            assert truth[split][name]["positive_rate"] == pytest.approx(label.mean())
            assert label.mean() == pytest.approx(0.25, abs=0.03)
            if table.num_rows > ROW_GROUP:
                continue
            rate = label.mean()
            entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
            assert truth[split][name]["auc"] == pytest.approx(roc_auc_score(label, probability), abs=1e-5)
            assert truth[split][name]["log_loss"] == pytest.approx(log_loss(label, probability), rel=1e-9)
            assert truth[split][name]["normalized_entropy"] == pytest.approx(log_loss(label, probability) / entropy)
            assert 0.78 < truth[split][name]["auc"] < 0.88


def test_synthetic_depends_on_the_seed_and_not_on_the_files(tmp_path: Path) -> None:
    def make(name: str, **options: Any) -> Path:
        synthesize(tmp_path / name, 2000, dense=2, sparse=3, vocabulary=20, **options)
        return tmp_path / name

    one, again, other, files = make("a"), make("b"), make("c", seed=1), make("d", files=7)
    assert digest(one) == digest(again)
    assert len(list((files / "train").iterdir())) == 7
    for split in SPLITS:
        assert rows(one, split).equals(rows(files, split))
        assert not rows(one, split).equals(rows(other, split))
    assert (one / "truth.json").read_text() == (files / "truth.json").read_text()


def test_synthetic_ids_follow_a_power_law(tmp_path: Path) -> None:
    synthesize(tmp_path / "skewed", 50_000, dense=0, sparse=1, vocabulary=1000)
    synthesize(tmp_path / "uniform", 50_000, dense=0, sparse=1, vocabulary=1000, skew=0)
    skewed, uniform = (
        np.sort(np.bincount(column(rows(tmp_path / name, "train"), "sparse_0"), minlength=1000))[::-1]
        for name in ("skewed", "uniform")
    )
    assert skewed[0] > 0.1 * skewed.sum()
    assert skewed[0] == pytest.approx(4 * skewed[4], rel=0.5)
    assert uniform[0] < 2 * uniform.mean()
    assert (uniform > 0).all()


def test_synthetic_with_a_vocabulary_beyond_memory(tmp_path: Path) -> None:
    synthesize(tmp_path / "out", 100, dense=0, sparse=2, vocabulary=2**31 - 1, sequence=True)
    check_prepared(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 3}, "rows is 3, must be at least 10"),
        ({"vocabulary": 2**31}, "vocabulary is 2147483648"),
        ({"skew": -1.0}, "skew is -1.0"),
        ({"dense": 0, "sparse": 0}, "nothing to learn"),
    ],
)
def test_synthetic_bad_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        synthesize(tmp_path / "out", **{"rows": 100, **options})
    assert not (tmp_path / "out").exists()


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
