"""The door for values that people write: what has one meaning comes through, all else is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from rechub_dist.config.strict_yaml import MAX_DEPTH, dump_yaml, parse_value, parse_yaml, read_yaml
from rechub_dist.errors import LONGEST, UserError, nearest, shown


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2022-04-25", "2022-04-25"),  # partitions have such names
        ("2022-02-30", "2022-02-30"),
        ("[day, =, 3]", ["day", "=", 3]),
        ("1e-3", 1e-3),
        ("1_000", 1000),
        ("0x1F", 31),
        ("18446744073709551615", 2**64 - 1),
        ("!!int '3'", 3),
        ("'010'", "010"),
        ("{<<: [{a: 1, b: 1}, {b: 2, c: 2}], c: 3}", {"a": 1, "b": 1, "c": 3}),
        ("{x: &x {a: 1}, y: {b: 2, <<: *x}}", {"x": {"a": 1}, "y": {"a": 1, "b": 2}}),
        ("", None),
    ],
)
def test_values_of_one_meaning(text: str, value: object) -> None:
    assert parse_value(text, "--set a") == value


def test_a_byte_order_mark_is_no_value() -> None:
    assert parse_yaml(b"\xef\xbb\xbfa: 1", "run.yaml") == {"a": 1}


NESTED = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: duplicate key 'a'"),
        ("a: {b: 1,\n  b: 2}\n", "line 2: duplicate key 'b'"),
        ("a: 1\n? [1]\n: 2\n? [1]\n: 3\n", "line 2: a list as a key"),
        ("a: 1\non: 2\n", "line 2: the key on is no text but True; quote it: 'on':"),
        ("1: 2\n", "line 1: the key 1 is no text but 1; quote it: '1':"),
        ("~: 2\n", "line 1: the key ~ is no text but None"),
        ("\n\na: 010\n", "line 3: '010' is an octal number"),
        ("a: 1:30\n", "line 1: '1:30' is a number to the base 60"),
        ("a: 1" + "0" * 400, "line 1: '1000.* is no integer of 64 bits"),
        ("a: 1" + "0" * 5000, "line 1: '1000.* is no int"),
        ("a: 0x_\n", "'0x_' is no int"),
        ("a: !!int ''\n", "'' is no int"),
        ("a: !!float ''\n", "'' is no float"),
        ("a: .nan\n", "'.nan' is not a finite number"),
        ("a: 1e400\n", "'1e400' is not a finite number"),
        ("a: !!bool maybe\n", "'maybe' is no bool"),
        ("a: !!python/name:os.system ''\n", "the tag '!!python/name:os.system' is not read here"),
        ("a: !!binary aGk=\n", "the tag '!!binary' is not read here"),
        ("a: !!set {b}\n", "the tag '!!set' is not read here"),
        ("a: !!int [1]\n", "the tag '!!int' is not read here"),
        ("a: &x [*x]\n", "line 1: nested more than 64 deep, or an alias"),
        ("a: &x {<<: *x}\n", "line 1: nested more than 64 deep, or an alias"),
        ("a: {<<: 1}\n", "<< merges mappings"),
        ("a: {<<: {b: 1}, <<: {c: 1}}\n", "duplicate key '<<'"),
        (NESTED, "more than 1,000,000 values"),
        ("a: " + "[" * 10_000, f"nested more than {MAX_DEPTH} deep"),
        ("a: 1\n---\nb: 2\n", "line 2: not valid YAML: expected a single document"),
        ('a: "\\0"\n', r"line 1: '\\x00' has a NUL"),
        ('a: "\\ud800"\n', r"line 1: '\\ud800' has"),
        ('a: "\\U00110000"\n', "not valid YAML"),
        ("a: b\nc: \x1b[31m", "line 2: not valid YAML: it may not hold the character 0x1b"),
        ("- 1\n", "not a mapping"),
        (b"\xff\xfea\0:\0", "UTF-16 or binary"),
        (b"a: 1\nb: \xff\n", "line 2: not UTF-8 text"),
        (b"\0" * 9, "UTF-16 or binary"),
        (b" " * (17 << 20), "larger than 16 MiB"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_refusals(text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse_yaml(text, "run.yaml")
    assert str(error.value).startswith("run.yaml")
    assert len(str(error.value)) <= LONGEST


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)


def test_what_is_written_is_read_again() -> None:
    tree = {
        "a": ["010", "1:30", "2022-04-25", "1e5", "on", "=", "<<", "~", "\x1b", "\u2028", ""],
        "=": {"<<": {"1": 1}},
    }
    assert parse_yaml(dump_yaml(tree, 80), "x") == tree


def test_messages_cannot_steer_a_terminal() -> None:
    message = str(UserError("bad \x1b[31mvalue\n\u202e\u2028 é"))
    assert message == r"bad \x1b[31mvalue\n\u202e\u2028 é"
    long = str(UserError("model.name: no model " + "x" * 5000 + ": did you mean 'DeepFM'?"))
    assert len(long) == LONGEST
    assert long.startswith("model.name: no model xxx")
    assert long.endswith("xxx: did you mean 'DeepFM'?")


def test_values_are_shown_short() -> None:
    assert shown("a\x1b") == r"'a\x1b'"
    assert len(shown([0] * 10**5)) == 120
    assert shown(10**5000) == "a int too large to print"


def test_the_nearest_name_is_found_in_any_case() -> None:
    names = ["DeepFM", "DCN", "DCNv2", "WideDeep"]
    assert nearest("deepfm", names) == "did you mean 'DeepFM'?"
    assert nearest("dcnV2", names) == "did you mean 'DCNv2'?"
    assert nearest("zzz", names) == "valid: DCN, DCNv2, DeepFM, WideDeep"
    assert nearest("q", [f"feature_{i:03}" for i in range(100)]).endswith("feature_011 and 88 more")
