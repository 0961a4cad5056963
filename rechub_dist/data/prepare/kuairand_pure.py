"""KuaiRand-Pure as multi-task prediction on impressions: click, long view, like, follow, comment, forward.

The impressions are those of 25 to 30 April 2022, split by time at midnight UTC+8: 25-28 April are train, the 29th is
valid, the 30th test (about 61 : 16 : 23 of the rows). Nothing is learned from later impressions, so scores are those
of a model trained up to the night before. Duplicate impressions in the log (same user, video and millisecond) are kept
once, as they might otherwise be on both sides of a split; those that are not after the end of their user's history are
dropped. Rows are in time order.

Features are known before the impression: those of the user and the video, hour and tab, and the videos that the user
watched, watched long or liked up to 24 April, with the authors of the watched ones. Nothing of the impression's outcome
(play time, stay times, watch ratio) is a feature. The user features are from the data set's only snapshot.

Vocabularies are those of the feature files, which cover all users and videos; tabs are those of the log. **Id 0 of
every table means unknown**: a missing value, or one that is not in the feature files.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv

from rechub_dist.data.parquet.pages import read_parquet
from rechub_dist.data.prepare.source import array, encode, numpy, source_file, vocabulary
from rechub_dist.data.prepare.writer import prepared_folder, write_schema, write_split
from rechub_dist.errors import UserError, one_line
from rechub_dist.features import DenseFeature, Feature, FeatureSchema, Label, SequenceFeature, SparseFeature, Table

NAME = "kuairand_pure"
SUMMARY = (
    "KuaiRand-Pure, six labels on impressions, split by day (interactions and sequences in Parquet, features in CSV)"
)
ORIGIN = "KuaiRand: https://kuairand.com"
INTERACTIONS = "interactions_2022-04-25_to_2022-04-30.parquet"
SEQUENCES = "user_sequences.parquet"
USERS = "user_features_pure.csv"
VIDEOS = "video_features_basic_pure.csv"

MAX_LENGTH = 50
HOUR_MS = 3_600_000
UTC_OFFSET = 8
MIDNIGHTS = [
    int((datetime(2022, 4, day, tzinfo=UTC) - timedelta(hours=UTC_OFFSET)).timestamp()) * 1000 for day in (29, 30)
]
USER_CATEGORIES = (
    "user_active_degree",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{i}" for i in range(18)),
)
USER_COUNTS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
VIDEO_CATEGORIES = ("video_type", "upload_type", "upload_dt", "music_type")
HISTORIES = {"history": "watch_seq", "history_long_view": "long_watch_seq", "history_like": "like_seq"}
LABELS = {
    "click": "is_click",
    "long_view": "long_view",
    "like": "is_like",
    "follow": "is_follow",
    "comment": "is_comment",
    "forward": "is_forward",
}


def prepare(source: Path, out: Path) -> None:
    """Prepare the interactions, histories and features in the folder `source` in the folder `out`."""
    paths = {name: source_file(source, name, ORIGIN) for name in (INTERACTIONS, SEQUENCES, USERS, VIDEOS)}
    log_columns = ["user_id", "video_id", "time_ms", "tab", *LABELS.values()]
    log = _columns(read_parquet(paths[INTERACTIONS]), log_columns, paths[INTERACTIONS])
    users = _columns(_read_csv(paths[USERS]), ["user_id", *USER_CATEGORIES, *USER_COUNTS], paths[USERS])
    videos = _columns(
        _read_csv(paths[VIDEOS]),
        ["video_id", "author_id", "tag", "video_duration", *VIDEO_CATEGORIES],
        paths[VIDEOS],
    )
    sequences = _columns(
        read_parquet(paths[SEQUENCES]), ["user_id", "last_time_ms", *HISTORIES.values()], paths[SEQUENCES]
    )
    log = _impressions(log, sequences)
    columns, features = _features(log, users, videos, sequences)
    for name, column in LABELS.items():
        columns[name] = array(log[column].cast(pa.int8()))
    table = pa.table(columns)
    ends = [*np.searchsorted(numpy(log["time_ms"]), MIDNIGHTS).tolist(), log.num_rows]
    with prepared_folder(out, NAME, [source]) as folder:
        start = 0
        for split, end in zip(("train", "valid", "test"), ends, strict=True):
            write_split(folder, split, table.slice(start, end - start))
            start = end
        write_schema(folder, NAME, FeatureSchema(tuple(features), tuple(Label(name) for name in LABELS)))


def _read_csv(path: Path) -> pa.Table:
    try:
        return pcsv.read_csv(path, convert_options=pcsv.ConvertOptions(column_types={"tag": pa.string()}))
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not in the published format: {one_line(error)}") from None


def _columns(table: pa.Table, names: list[str], path: Path) -> pa.Table:
    missing = sorted(set(names) - set(table.column_names))
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}")
    return table.select(names)


def _impressions(log: pa.Table, sequences: pa.Table) -> pa.Table:
    """The log in time order, without duplicates and without impressions that the user's history covers."""
    user, video, time = (numpy(log[name]) for name in ("user_id", "video_id", "time_ms"))
    order = np.lexsort((video, user, time))
    same = np.zeros(len(order), bool)
    same[1:] = np.logical_and.reduce([column[order][1:] == column[order][:-1] for column in (user, video, time)])
    log = log.take(order[~same])
    history_end = array(sequences["last_time_ms"]).take(_places(log["user_id"], sequences["user_id"]))
    return log.filter(pc.greater(array(log["time_ms"]), pc.fill_null(history_end, 0)))


def _places(values: Any, keys: Any) -> pa.Array:
    """The index of each value among the unsorted `keys`; null for values that are not there."""
    return pc.index_in(array(values), value_set=array(keys))


def _features(
    log: pa.Table, users: pa.Table, videos: pa.Table, sequences: pa.Table
) -> tuple[dict[str, pa.Array], list[Feature]]:
    """The columns of the impressions' features, and the features."""
    by_user = _places(log["user_id"], users["user_id"])
    by_video = _places(log["video_id"], videos["video_id"])
    by_sequence = _places(log["user_id"], sequences["user_id"])
    columns: dict[str, pa.Array] = {}
    features: list[Feature] = []
    tables: dict[str, Table] = {}

    def sparse(name: str, values: Any, of: Any, at: pa.Array | None) -> None:
        """Add a category with the vocabulary of the column `of`, at the indices `at` of the impressions."""
        words = vocabulary(of)
        ids = encode(values, words, unknown=0, shift=1)
        columns[name] = ids if at is None else pc.fill_null(ids.take(at), 0)
        tables[name] = Table(name, len(words) + 1)
        features.append(SparseFeature(name, tables[name]))

    def dense(name: str, values: Any, at: pa.Array) -> None:
        """Add a quantity, whose logarithm is taken; missing ones count as 0."""
        columns[name] = array(values).cast(pa.float32()).take(at)
        features.append(DenseFeature(name, transform="log", missing="fill"))

    sparse("user_id", log["user_id"], users["user_id"], None)
    sparse("video_id", log["video_id"], videos["video_id"], None)
    sparse("author_id", videos["author_id"], videos["author_id"], by_video)
    sparse("tab", log["tab"], log["tab"], None)
    hours = pc.cast(pc.divide(array(log["time_ms"]), HOUR_MS), pa.int64())
    hours = pa.array((numpy(hours) + UTC_OFFSET) % 24)
    sparse("hour", hours, pa.array(range(24)), None)

    tags = pc.split_pattern(array(videos["tag"]), ",")
    words = vocabulary(pc.unique(tags.flatten()).filter(pc.not_equal(pc.unique(tags.flatten()), "")))
    known = pc.if_else(pc.equal(array(videos["tag"]), ""), pa.scalar([], tags.type), tags)
    columns["tag"] = _no_null_lists(encode(known, words, unknown=0, shift=1).take(by_video))
    features.append(SparseFeature("tag", Table("tag", len(words) + 1), pooling="mean"))
    for name in VIDEO_CATEGORIES:
        sparse(name, videos[name], videos[name], by_video)
    dense("duration", pc.divide(videos["video_duration"].cast(pa.float64()), 1000.0), by_video)

    for name in USER_CATEGORIES:
        sparse(name, users[name], users[name], by_user)
    for name in USER_COUNTS:
        dense(name, users[name], by_user)

    video_words, authors = vocabulary(videos["video_id"]), vocabulary(videos["author_id"])
    for name, column in HISTORIES.items():
        ids = encode(sequences[column], video_words, unknown=0, shift=1)
        columns[name] = _no_null_lists(ids.take(by_sequence))
        features.append(SequenceFeature(name, tables["video_id"], max_length=MAX_LENGTH))
    author_of = np.zeros(len(video_words) + 1, np.int32)
    author_of[numpy(encode(videos["video_id"], video_words, shift=1))] = numpy(
        encode(videos["author_id"], authors, shift=1)
    )
    history = columns["history"]
    columns["history_author"] = pa.ListArray.from_arrays(history.offsets, pa.array(author_of[numpy(history.values)]))
    features.append(SequenceFeature("history_author", tables["author_id"], max_length=MAX_LENGTH))
    return columns, features


def _no_null_lists(lists: pa.ListArray) -> pa.ListArray:
    """The lists, with empty ones for nulls."""
    lengths = numpy(pc.fill_null(pc.list_value_length(lists), 0))
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), lists.flatten())
