"""Ids as they come: strings, dictionaries, wide integers, lists of them; hashed, or looked up in vocabularies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rechub_dist.assembly.identity import identity
from rechub_dist.assembly.parts import build
from rechub_dist.config import RunConfig
from rechub_dist.data.collate import assemble
from rechub_dist.data.columns.fit import check_schema
from rechub_dist.data.columns.hashing import hash_ids
from rechub_dist.data.columns.strings import distinct, hash_strings, spread
from rechub_dist.data.columns.values import read_ids
from rechub_dist.data.columns.vocabulary import Vocabulary, read_vocabulary
from rechub_dist.data.columns.window import open_window
from rechub_dist.data.negatives import Draw
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.spec import BatchSpec
from rechub_dist.errors import UserError
from rechub_dist.features import SequenceFeature, SparseFeature, Table
from rechub_dist.schema import parse_schema

ITEM = Table("item", 50)
text = st.text(max_size=6)
int64s = st.integers(-(2**63), 2**63 - 1)


def one(feature: Any, array: pa.Array) -> list[list[int]]:
    """A feature's ids row by row, through the whole way from Arrow to the batch."""
    spec = BatchSpec(features=(feature,), collections={"c": (feature.name,)})
    window = open_window(pa.table({feature.source: array}), spec, None, "a.parquet")
    jagged = assemble(spec, [(window, 0, len(array))], len(array), Draw(0, 0, 0)).feature(feature.name)
    return [part.tolist() for part in torch.split(jagged.values(), jagged.lengths().tolist())]


def write_vocabulary(folder: Path, values: Any, ids: Any, kind: pa.DataType | None = None) -> str:
    path = folder / "vocabulary.parquet"
    pq.write_table(pa.table({"value": pa.array(values, kind), "id": ids}), path)
    read_vocabulary.cache_clear()
    return str(path)


# --- the hash of strings


def test_the_hash_is_the_published_one() -> None:
    """XXH3_64bits: vectors of its reference implementation."""
    words = hash_strings(pa.array(["", "The quick brown fox jumps over the lazy dog"]))
    assert words.view(np.uint64).tolist() == [0x2D06800538D394C2, 0xCE7D19A5418FB365]


def test_no_two_of_a_million_strings_hash_alike() -> None:
    """Of 64 bits one expects 3e-8 such pairs; short strings of equal length are what poor hashes mistake."""
    strings = pa.array([f"{i * 2654435761 % 2**32:08x}" for i in range(1_000_000)])
    assert len(np.unique(hash_strings(strings))) == 1_000_000


def test_ids_of_strings_stay_what_they_are() -> None:
    """Rows of trained tables belong to strings: these numbers must never change."""
    feature = SparseFeature("item", Table("item", 1_000_000), hash=True)
    assert one(feature, pa.array(["a", "", "né", "68fd1e64"])) == [[68014], [20016], [74842], [239764]]


def wrapped(values: list[Any], kind: pa.DataType) -> list[pa.Array]:
    """The same values plain, dictionary-encoded, and in rows of two in lists of several types."""
    plain = pa.array(values, kind)
    encoded = plain.dictionary_encode()
    offsets = [0, 2, 2, len(values)]
    return [
        plain,
        encoded,
        pa.ListArray.from_arrays(offsets, plain),
        pa.ListArray.from_arrays(offsets, encoded),
        pa.LargeListArray.from_arrays(offsets, encoded),
        pa.FixedSizeListArray.from_arrays(encoded, len(values)),
    ]


STRINGS = ["b", "a", "b", "", "é"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("form", range(6))
def test_strings_are_hashed_in_every_form(kind: pa.DataType, form: int) -> None:
    expected = hash_ids(hash_strings(pa.array(STRINGS)), "item", 50).tolist()
    found = one(SparseFeature("item", ITEM, hash=True), wrapped(STRINGS, kind)[form])
    assert [i for row in found for i in row] == expected
    assert found[0] == expected[: len(found[0])]
    assert expected[0] == expected[2]


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.uint32(), pa.int64(), pa.uint64()])
@pytest.mark.parametrize("form", range(6))
def test_integers_in_every_form(kind: pa.DataType, form: int) -> None:
    array = wrapped([7, 49, 7, 0], kind)[form]
    found = one(SparseFeature("item", ITEM), array)
    assert [i for row in found for i in row] == [7, 49, 7, 0]
    hashed = one(SparseFeature("item", ITEM, hash=True), array)
    assert [i for row in hashed for i in row] == hash_ids(np.array([7, 49, 7, 0]), "item", 50).tolist()


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.none() | text, min_size=1),
    start=st.integers(0, 5),
    codes=st.sampled_from([pa.int8(), pa.uint8(), pa.int32()]),
)
def test_slices_and_nulls(values: list[str | None], start: int, codes: pa.DataType) -> None:
    """Nulls, slices, and dictionaries of which a slice uses a part."""
    plain = pa.array(values, pa.string())
    words = {v: int(w) for v, w in zip(values, hash_strings(pa.array([v or "" for v in values])), strict=True) if v}
    words[""] = int(hash_strings(pa.array([""]))[0])
    for array in (plain, plain.dictionary_encode().cast(pa.dictionary(codes, pa.string()))):
        part = array.slice(start)
        strings, places = distinct(part)
        assert strings.null_count == 0
        found = spread(hash_strings(strings), places, null=-7)
        assert found.tolist() == [-7 if v is None else words[v] for v in values[start:]]


def test_nulls_among_a_dictionarys_values() -> None:
    array = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 0]), pa.array(["a", None]))
    feature = SparseFeature("item", ITEM, hash=True, missing="drop")
    a = one(feature, pa.array(["a"]))[0]
    assert one(feature, array) == [a, [], [], a]
    with pytest.raises(UserError, match=r"column 'item': 2 id\(s\) are missing"):
        one(SparseFeature("item", ITEM, hash=True), array)


@pytest.mark.parametrize("policy", ["drop", "unknown"])
def test_missing_strings(policy: Any) -> None:
    feature = SequenceFeature("h", ITEM, 3, hash=True, missing=policy, unknown_id=9)
    a = one(feature, pa.array([["a"]]))[0]
    found = one(feature, pa.array([["a", None], None, [None], ["a", "a", "a", "a"]]))
    gap = [] if policy == "drop" else [9]
    assert found == [a + gap, [], gap, a * 3]
    assert one(feature, pa.array([[None], []], pa.list_(pa.string()))) == [gap, []]


def test_chunks_with_different_dictionaries() -> None:
    """A column that Parquet hands over in several pieces."""
    pieces = [pa.array(["a", "b"]).dictionary_encode(), pa.array(["b", None]).dictionary_encode()]
    feature = SparseFeature("item", ITEM, hash=True, missing="drop")
    spec = BatchSpec(features=(feature,), collections={"c": ("item",)})
    for chunks in (pieces, [pa.ListArray.from_arrays([0, 1, 2], piece) for piece in pieces]):
        window = open_window(pa.table({"item": pa.chunked_array(chunks)}), spec, None, "a.parquet")
        batch = assemble(spec, [(window, 0, 4)], 4, Draw(0, 0, 0))
        a, b, again = batch.feature("item").values().tolist()
        assert (a, b, again) == (*one(feature, pa.array([["a", "b"]]))[0], b)
        assert batch.feature("item").lengths().tolist() == [1, 1, 1, 0]


@settings(deadline=None)
@given(values=st.lists(st.integers(0, 2**64 - 1), min_size=1))
def test_wide_unsigned_ids_are_hashed_by_their_bits(values: list[int]) -> None:
    found = one(SparseFeature("item", ITEM, hash=True), pa.array(values, pa.uint64()))
    signed = [v - 2**64 if v >= 2**63 else v for v in values]
    assert [i for row in found for i in row] == hash_ids(np.array(signed, np.int64), "item", 50).tolist()


# --- vocabularies


@settings(max_examples=50, deadline=None)
@given(known=st.lists(text, unique=True), asked=st.lists(st.none() | text))
def test_strings_are_found(known: list[str], asked: list[str | None]) -> None:
    vocabulary = Vocabulary.of(pa.array(known, pa.string()), np.arange(len(known)) * 2, "v")
    truth = {value: 2 * i for i, value in enumerate(known)}
    plain = pa.array(asked, pa.string())
    for array in (plain, plain.cast(pa.large_string()), plain.dictionary_encode()):
        assert vocabulary.find(array).tolist() == [-1 if v is None else truth.get(v, -1) for v in asked]


@settings(max_examples=50, deadline=None)
@given(
    known=st.lists(int64s | st.integers(-3, 3), unique=True),
    asked=st.lists(st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 3)),
)
def test_integers_of_other_types_are_found(known: list[int], asked: list[int | None]) -> None:
    """An unsigned column in a signed vocabulary: equal bits are not equal numbers."""
    vocabulary = Vocabulary.of(pa.array(known, pa.int64()), np.arange(len(known)), "v")
    truth = {value: i for i, value in enumerate(known)}
    found = vocabulary.find(pa.array(asked, pa.uint64())).tolist()
    assert found == [-1 if v is None else truth.get(v, -1) for v in asked]
    narrow = [v if v is None else v % 100 for v in asked]
    assert vocabulary.find(pa.array(narrow, pa.int8())).tolist() == [
        -1 if v is None else truth.get(v, -1) for v in narrow
    ]


def test_equal_bits_are_not_equal_numbers() -> None:
    vocabulary = Vocabulary.of(pa.array([-1, 5]), np.array([0, 1]), "v")
    assert vocabulary.find(pa.array([2**64 - 1, 5], pa.uint64())).tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("missing", "outside", "expected"),
    [
        ("drop", "drop", [[2], [], [], [4]]),
        ("unknown", "unknown", [[2], [7], [7], [4]]),
        ("drop", "unknown", [[2], [], [7], [4]]),
        ("unknown", "drop", [[2], [7], [], [4]]),
    ],
)
def test_policies_of_vocabularies(missing: Any, outside: Any, expected: list[list[int]], tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path, ["b", "a"], [4, 2])
    feature = SparseFeature("x", ITEM, vocabulary=path, missing=missing, out_of_range=outside, unknown_id=7)
    array = pa.array(["a", None, "z", "b"])
    assert one(feature, array) == expected
    assert one(feature, array.dictionary_encode()) == expected
    flat = [i for row in expected for i in row]
    assert one(feature, pa.ListArray.from_arrays([0, 4], array.dictionary_encode())) == [flat]


def no_text(*values: bytes) -> pa.Array:
    """Strings as Parquet and Arrow may hold them: nobody checks that they are UTF-8."""
    found = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(found), found.buffers())


def test_strings_that_are_not_utf8_are_values_as_others(tmp_path: Path) -> None:
    array = no_text(b"a", b"caf\xe9", b"a")
    hashed = one(SparseFeature("x", ITEM, hash=True), array)
    assert hashed[0] == hashed[2] != hashed[1]
    path = write_vocabulary(tmp_path, no_text(b"caf\xe9", b"a"), [4, 2])
    feature = SparseFeature("x", ITEM, vocabulary=path)
    assert one(feature, array) == [[2], [4], [2]]
    for unknown in (no_text(b"a", b"\xff"), no_text(b"a", b"\xff").dictionary_encode()):
        with pytest.raises(UserError, match=r"column 'x': b'\\xff' is not in vocabulary"):
            one(feature, unknown)
    twice = write_vocabulary(tmp_path, no_text(b"\xff", b"\xff"), [4, 2])
    with pytest.raises(UserError, match=r"column 'value': value b'\\xff' occurs twice"):
        read_vocabulary(twice)


def test_errors_of_vocabularies(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path, ["b", "a"], [4, 2])
    feature = SparseFeature("x", ITEM, vocabulary=path)
    with pytest.raises(UserError) as caught:
        read_ids(pa.array(["a", "zz", "y"]), feature, "a.parquet")
    assert str(caught.value) == (
        f"a.parquet: column 'x': 'zz' is not in vocabulary {path}; build it from this data too, or set "
        "out_of_range: drop | unknown"
    )
    with pytest.raises(UserError, match=r"column 'x': 1 id\(s\) are missing"):
        read_ids(pa.array(["a", None, "y"]), feature, "a.parquet")

    spec = BatchSpec(features=(feature,))
    for kind in (pa.int64(), pa.list_(pa.int8()), pa.dictionary(pa.int8(), pa.int64())):
        with pytest.raises(UserError, match="needs a string as in its vocabulary"):
            check_schema(pa.schema([("x", kind)]), spec, "data")
    small = BatchSpec(features=(SparseFeature("x", Table("x", 4), vocabulary=path),))
    with pytest.raises(UserError, match=r"id 4 is outside table 'x' of 4 rows .* set the table's rows to 5"):
        check_schema(pa.schema([("x", pa.string())]), small, "data")

    write_vocabulary(tmp_path, [3, 4], [0, 1])
    with pytest.raises(UserError, match="column 'x' is string, but sparse feature 'x' needs an integer as in its voc"):
        check_schema(pa.schema([("x", pa.string())]), spec, "data")
    for values, ids, message in (
        (["a", "b", "a"], [0, 1, 2], "value 'a' occurs twice"),
        ([1, 2, 1], [0, 1, 2], "value 1 occurs twice"),
        (["a", None], [0, 1], r"1 missing value\(s\)"),
        ([0.5], [0], "column 'value' is double"),
        (["a"], ["b"], "column 'id' is string"),
    ):
        write_vocabulary(tmp_path, values, ids)
        with pytest.raises(UserError, match=message):
            read_vocabulary(path)
    pq.write_table(pa.table({"word": ["a"], "id": [0]}), path)
    with pytest.raises(UserError, match="no column 'value'"):
        read_vocabulary(path)
    with pytest.raises(UserError, match="no such file"):
        read_vocabulary(str(tmp_path / "nowhere.parquet"))


def test_hash_and_vocabulary_exclude_each_other() -> None:
    with pytest.raises(UserError, match="has both hash and vocabulary"):
        parse_schema({"features": {"x": {"kind": "sparse", "rows": 3, "hash": True, "vocabulary": "v.parquet"}}})


def test_vocabularies_lie_below_the_data() -> None:
    features = {
        name: {"kind": "sparse", "rows": 3, "vocabulary": path}
        for name, path in (("a", "v/a.parquet"), ("b", "/abs/b.parquet"), ("c", "s3://bucket/c.parquet"))
    }
    features["ab"] = {"kind": "cross", "inputs": ["a", "b"], "buckets": 10}
    schema = parse_schema({"features": features}, "data")
    assert [f.vocabulary for f in schema.features[:3]] == [  # type: ignore[union-attr]
        "data/v/a.parquet", "/abs/b.parquet", "s3://bucket/c.parquet"
    ]  # fmt: skip
    assert schema["ab"].inputs[0] == schema["a"]  # type: ignore[union-attr]


def test_views_of_strings(tmp_path: Path) -> None:
    """Other writers' type, which Parquet gives back."""
    values = ["b", None, "a", "b"]
    path = write_vocabulary(tmp_path, ["b", "a"], [4, 2], pa.string_view())
    for feature in (
        SparseFeature("x", ITEM, hash=True, missing="drop"),
        SparseFeature("x", ITEM, vocabulary=path, missing="drop"),
    ):
        for kind in (pa.string(), pa.list_(pa.string())):
            plain = pa.array([[v] for v in values] if pa.types.is_list(kind) else values, kind)
            view = plain.cast(pa.list_(pa.string_view()) if pa.types.is_list(kind) else pa.string_view())
            pq.write_table(pa.table({"x": view}), tmp_path / "x.parquet")
            read = pq.read_table(tmp_path / "x.parquet")["x"].combine_chunks()
            assert read.type == view.type
            assert one(feature, read) == one(feature, plain)
            assert [len(ids) for ids in one(feature, read)] == [1, 0, 1, 1]


def test_another_vocabulary_is_another_run(tmp_path: Path) -> None:
    """The files' names may be the same: a table's rows belong to the values that had their ids."""
    (tmp_path / "data" / "train").mkdir(parents=True)
    pq.write_table(pa.table({"x": ["a", "b"], "y": [0, 1]}), tmp_path / "data" / "train" / "a.parquet")
    config = RunConfig.model_validate(
        {
            "output_dir": tmp_path / "out",
            "data": {
                "root": str(tmp_path / "data"),
                "dataset": {
                    "features": {"x": {"kind": "sparse", "rows": 9, "vocabulary": "vocabulary.parquet"}},
                    "labels": {"y": {}},
                },
            },
            "model": {
                "name": "DeepFM",
                "features": ["x"],
                "hidden_units": [4],
                "dropout_rates": 0.0,
                "embedding_dim": 4,
            },
        }
    )
    manifest = Manifest.read(str(tmp_path / "data" / "train"))
    known = []
    for ids in ([1, 2], [2, 1], [1, 2]):
        write_vocabulary(tmp_path / "data", ["a", "b"], ids)
        known.append(identity(build(config, device="cpu", world_size=1), manifest.fingerprint()))
    assert known[0] == known[2] != known[1]
    assert [key for key in known[0]["data"] if known[0]["data"][key] != known[1]["data"][key]] == ["vocabularies"]


def test_strings_from_parquet(tmp_path: Path) -> None:
    """Files, with and without the Arrow type of a dictionary in their footer, and a vocabulary; shared tables."""
    values = [f"v{i % 40}" for i in range(400)]
    path = write_vocabulary(tmp_path, [f"v{i}" for i in range(40)], list(range(40)))
    history = pa.ListArray.from_arrays(list(range(0, 401, 2)), pa.array(values))
    plain = pa.table({"x": values[:200], "h": history})
    coded = plain.set_column(0, "x", plain["x"].dictionary_encode())
    spec = BatchSpec(
        features=(SparseFeature("x", ITEM, vocabulary=path), SequenceFeature("h", ITEM, 5, vocabulary=path)),
        collections={"c": ("x", "h")},
    )
    for name, table in (("plain", plain), ("coded", coded)):
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=64)
        reader = ParquetReader(Manifest.read(str(tmp_path / f"{name}.parquet")), spec, batch_size=50, shuffle=False)
        batches = list(reader.batches(0))
        found = torch.cat([batch.feature("x").values() for batch in batches]).tolist()
        assert sorted(found) == sorted(i % 40 for i in range(200))
        for batch in batches:
            heads = batch.feature("h").values().reshape(-1, 2)
            assert ((heads[:, 1] - heads[:, 0]) == 1).all()
