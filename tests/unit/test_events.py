"""`rechub-dist data sequences`: anyone's own events as a prepared folder, and what is refused."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from rechub_dist.cli.main import app
from rechub_dist.data.prepare.events import Columns, Counts, EventPlan, k_core, prepare_events
from rechub_dist.errors import UserError

COLUMNS = Columns("user", "item", "time")
# user, item, time: not in order, and u3's first two events have one time
EVENTS = [
    ("u1", "a", 1), ("u1", "c", 4), ("u1", "b", 3), ("u1", "d", 7), ("u1", "a", 9),
    ("u3", "d", 2), ("u3", "c", 2), ("u3", "b", 5), ("u3", "a", 8),
    ("u2", "b", 6), ("u2", "c", 9),
]  # fmt: skip


def write(path: Path, events: list[tuple[Any, ...]], names: tuple[str, ...] = COLUMNS) -> Path:  # type: ignore[assignment]
    table = {name: list(values) for name, values in zip(names, zip(*events, strict=True), strict=True)}
    if path.suffix == ".parquet":
        pq.write_table(pa.table(table), path)
        return path
    mark = {".csv": ",", ".tsv": "\t"}[path.suffix]
    lines = [mark.join(map(str, line)) for line in (names, *events)]
    path.write_text("\n".join(lines) + "\n")
    return path


def original(out: Path) -> dict[str, list[tuple[Any, list[Any], Any]]]:
    """The rows of the splits in the file's own words."""
    words = {name: pq.read_table(out / f"{name}.parquet").to_pydict() for name in ("users", "items")}
    assert all(found["id"] == list(range(len(found["id"]))) for found in words.values())
    users, items = words["users"]["original"], words["items"]["original"]
    return {
        split: [
            (users[row["user_id"]], [items[i] for i in row["history"]], items[row["item"]])
            for row in pq.read_table(out / split).to_pylist()
        ]
        for split in ("train", "train_prefixes", "valid", "test")
    }


def plan(*, way: str = "leave-one-out", least: int = 1, max_length: int = 50, **bounds: str) -> EventPlan:
    return EventPlan(way, min_user_events=least, min_item_events=least, max_length=max_length, **bounds)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_leave_one_out(tmp_path: Path, suffix: str) -> None:
    counts = prepare_events(write(tmp_path / f"e{suffix}", EVENTS), tmp_path / "out", COLUMNS, plan())
    assert original(tmp_path / "out") == {
        "train": [("u1", ["a", "b"], "c"), ("u2", ["b"], "c"), ("u3", ["d"], "c")],
        "train_prefixes": [("u1", ["a"], "b"), ("u1", ["a", "b"], "c"), ("u2", ["b"], "c"), ("u3", ["d"], "c")],
        "valid": [("u1", ["a", "b", "c"], "d"), ("u3", ["d", "c"], "b")],
        "test": [("u1", ["a", "b", "c", "d"], "a"), ("u3", ["d", "c", "b"], "a")],
    }
    assert counts == Counts(read=11, kept=11, users=3, items=4, unlearned=0)


def test_without_times_the_file_is_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "e.csv", EVENTS)
    prepare_events(path, tmp_path / "out", Columns("user", "item"), plan())
    assert original(tmp_path / "out")["test"][0] == ("u1", ["a", "c", "b", "d"], "a")


def test_temporal_and_its_short_histories(tmp_path: Path) -> None:
    path = write(tmp_path / "e.parquet", EVENTS)
    chosen = plan(way="temporal", max_length=2, valid_from="5", test_from="8")
    counts = prepare_events(path, tmp_path / "out", COLUMNS, chosen)
    assert original(tmp_path / "out") == {
        "train": [("u1", ["a", "b"], "c"), ("u3", ["d"], "c")],
        "train_prefixes": [("u1", ["a"], "b"), ("u1", ["a", "b"], "c"), ("u3", ["d"], "c")],
        "valid": [("u1", ["b", "c"], "d"), ("u3", ["d", "c"], "b")],  # u2's first event has nothing before it
        "test": [("u1", ["c", "d"], "a"), ("u2", ["b"], "c"), ("u3", ["c", "b"], "a")],
    }
    assert counts.unlearned == 0


def test_session(tmp_path: Path) -> None:
    path = write(tmp_path / "e.parquet", [*EVENTS, ("u0", "x", 1), ("u0", "a", 2)])
    chosen = plan(way="session", valid_from="3", test_from="9")
    counts = prepare_events(path, tmp_path / "out", COLUMNS, chosen)
    found = original(tmp_path / "out")
    assert found["train"] == found["train_prefixes"] == [("u0", ["x"], "a")]
    assert found["valid"] == [("u3", ["d"], "c"), ("u3", ["d", "c"], "b"), ("u3", ["d", "c", "b"], "a")]
    assert [user for user, _, _ in found["test"]] == ["u1"] * 4 + ["u2"]
    assert counts.unlearned == 3  # b, c and d


# ids


def test_ids_of_text_files_are_numbers_only_where_all_are_written_so(tmp_path: Path) -> None:
    events = [("07", 10, 1), ("07", 9, 2), ("07", 10, 3), ("7", 9, 1), ("7", 10, 2), ("7", 9, 3), ("7", 10, 4)]
    prepare_events(write(tmp_path / "e.csv", events), tmp_path / "out", COLUMNS, plan())
    assert pq.read_table(tmp_path / "out" / "users.parquet")["original"].to_pylist() == ["07", "7"]
    assert pq.read_table(tmp_path / "out" / "items.parquet")["original"].to_pylist() == [9, 10]


@pytest.mark.parametrize(
    "kind",
    [pa.int8(), pa.uint64(), pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_ids_of_parquet_keep_their_type(tmp_path: Path, kind: Any) -> None:
    values: list[Any] = [10, 9, 10, 9, 11]
    value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not pa.types.is_integer(value_type):
        values = [str(value) for value in values]
    items = pa.array(values, value_type)
    items = items.dictionary_encode() if pa.types.is_dictionary(kind) else items
    pq.write_table(pa.table({"user": [1] * 5, "item": items}), tmp_path / "e.parquet")
    prepare_events(tmp_path / "e.parquet", tmp_path / "out", Columns("user", "item"), plan())
    words = pq.read_table(tmp_path / "out" / "items.parquet")["original"]
    assert words.type == value_type
    assert words.to_pylist() == sorted(set(values))
    assert original(tmp_path / "out")["test"] == [(1, values[:4], values[4])]


def test_text_called_null_is_a_name(tmp_path: Path) -> None:
    events = [("null", "NA", 1), ("null", "nan", 2), ("null", "N/A", 3), ("null", "NA", 4)]
    prepare_events(write(tmp_path / "e.csv", events), tmp_path / "out", COLUMNS, plan())
    assert original(tmp_path / "out")["test"] == [("null", ["NA", "nan", "N/A"], "NA")]


# times


@pytest.mark.parametrize(
    ("make", "valid_from", "test_from"),
    [
        (lambda day: date(2024, 1, day), "2024-01-05", "2024-01-08"),
        (lambda day: datetime(2024, 1, day), "2024-01-05", "2024-01-08T00:00:00"),
        (lambda day: datetime(2024, 1, day, tzinfo=UTC), "2024-01-05", "2024-01-08T01:00:00+01:00"),
        (lambda day: datetime(2024, 1, day, tzinfo=UTC), "2024-01-05 00:00:00Z", "2024-01-08"),
        (lambda day: datetime(2024, 1, day, tzinfo=UTC), "2024-01-05T00:00:00+0000", "2024-01-08 01:00:00+01:00"),
        (lambda day: day + 0.5, "5", "8.5"),
        (np.int16, "5", "8"),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_types_of_times(tmp_path: Path, suffix: str, make: Any, valid_from: str, test_from: str) -> None:
    path = write(tmp_path / f"e{suffix}", [(user, item, make(time)) for user, item, time in EVENTS])
    chosen = plan(way="temporal", valid_from=valid_from, test_from=test_from)
    prepare_events(path, tmp_path / "out", COLUMNS, chosen)
    found = original(tmp_path / "out")
    assert found["train"] == [("u1", ["a", "b"], "c"), ("u3", ["d"], "c")]
    assert found["valid"] == [("u1", ["a", "b", "c"], "d"), ("u3", ["d", "c"], "b")]
    assert [item for _, _, item in found["test"]] == ["a", "c", "a"]


# the core


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=40),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_k_core_is_what_dropping_one_by_one_leaves(events: list[tuple[int, int]], user: int, item: int) -> None:
    users, items = (np.array([event[place] for event in events], np.int64) for place in (0, 1))
    left = set(range(len(events)))
    while True:
        few = next(
            (
                place
                for place in left
                if sum(events[other][0] == events[place][0] for other in left) < user
                or sum(events[other][1] == events[place][1] for other in left) < item
            ),
            None,
        )
        if few is None:
            break
        left.remove(few)
    assert set(np.flatnonzero(k_core(users, items, user, item)).tolist()) == left


def test_filtered_ids_are_dense_again(tmp_path: Path) -> None:
    """Item a goes for its one event, and then user u0, who has too few without it."""
    core = [(user, item, time) for user in ("u1", "u2") for time, item in enumerate("bcbcb")]
    path = write(tmp_path / "e.csv", [("u0", "a", 0), *[("u0", "b", 1)] * 3, *core])
    counts = prepare_events(path, tmp_path / "out", COLUMNS, plan(least=4))
    assert counts == Counts(read=14, kept=10, users=2, items=2, unlearned=0)
    assert pq.read_table(tmp_path / "out" / "items.parquet").to_pydict() == {"id": [0, 1], "original": ["b", "c"]}
    assert original(tmp_path / "out")["test"] == [(user, list("bcbc"), "b") for user in ("u1", "u2")]


# refusals


BOUNDS = {"valid_from": "5", "test_from": "8"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"way": "leave_one_out"}, "split is 'leave_one_out': did you mean 'leave-one-out'"),
        ({"min_user_events": 0}, "min_user_events is 0, must be at least 1"),
        ({"max_length": 0}, "max_length is 0"),
        ({"way": "temporal", "valid_from": "5"}, "split temporal needs valid_from and test_from"),
        (BOUNDS, "have no effect with split leave-one-out"),
    ],
)
def test_bad_plans(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EventPlan(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"way": "temporal", "valid_from": "8", "test_from": "8"}, "valid_from 8 must be earlier than test_from 8"),
        (
            {"way": "session", "valid_from": "5", "test_from": "x"},
            r"'x' is not a time of .*column 'time', which is int64",
        ),
        ({"way": "temporal", "valid_from": "-1", "test_from": "8"}, "the train split has no row: .* before -1"),
        ({"way": "temporal", "valid_from": "9", "test_from": "90"}, "the test split has no row"),
        ({"least": 6}, "none of the 11 events is left"),
        ({"least": 3}, "the train split has no row: no user has enough events"),
    ],
)
def test_nothing_left(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    events = EVENTS if options != {"least": 3} else [("u", item, 0) for item in "aaa"]
    with pytest.raises(UserError, match=message):
        prepare_events(write(tmp_path / "e.parquet", events), tmp_path / "out", COLUMNS, plan(**options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("e.csv", "user,itme,time\n1,2,3\n", "has no column 'item': did you mean 'itme'"),
        ("e.csv", "user,item,time,user\n1,2,3,4\n", "several columns 'user'"),
        ("e.csv", "user,item,time\n1,2,3\n1,,4\n1,2,5\n1,,6\n", r"column 'item' has 2 missing .* row 1 \(from 0\)"),
        ("e.csv", "user,item,time\n1,2,\n1,2,3\n", r"column 'time' has 1 missing .* row 0"),
        ("e.csv", "user,item,time\n1,2,nan\n1,2,3\n", r"column 'time' has 1 missing .* row 0"),
        ("e.csv", "user,item,time\n1,2,soon\n", "column 'time' is string: times must be numbers"),
        ("e.csv", "user,item,time\n1,2\n", "cannot be read: "),
        ("e.csv", "user,item,time\n", "has no events"),
        ("e.csv", "", "cannot be read: "),
        ("e.tsv", "user,item,time\n1,2,3\n", "has no column 'user'"),
        ("e.txt", "user,item,time\n1,2,3\n", "must end in .csv, .tsv or .parquet"),
        ("e.parquet", "user,item,time\n1,2,3\n", "it is CSV text, not Parquet; convert it"),
    ],
)
def test_bad_files(tmp_path: Path, file: str, text: str, message: str) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        prepare_events(tmp_path / file, tmp_path / "out", COLUMNS, plan())
    assert "\n" not in str(caught.value)
    assert file in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("nan", "valid_from nan must be"), ("2024-01-05", "is not a time")])
def test_bad_bound_of_decimal_times(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "e.csv", [(user, item, time + 0.5) for user, item, time in EVENTS])
    with pytest.raises(UserError, match=message):
        prepare_events(path, tmp_path / "out", COLUMNS, plan(way="temporal", valid_from=text, test_from="8"))


def test_bad_arguments(tmp_path: Path) -> None:
    path = write(tmp_path / "e.parquet", [(1.5, "a", 1)])
    with pytest.raises(UserError, match="column 'user' is double: ids must be integers or strings"):
        prepare_events(path, tmp_path / "out", COLUMNS, plan())
    with pytest.raises(UserError, match="there is no file"):
        prepare_events(tmp_path / "none.csv", tmp_path / "out", COLUMNS, plan())
    with pytest.raises(UserError, match="must be different columns"):
        prepare_events(path, tmp_path / "out", Columns("user", "user"), plan())
    with pytest.raises(UserError, match="split session needs the column of the events' times"):
        prepare_events(path, tmp_path / "out", Columns("user", "item"), plan(way="session", **BOUNDS))


# the command


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["data", "sequences", *map(str, arguments)])


def test_command(tmp_path: Path) -> None:
    path = write(tmp_path / "ratings.csv", EVENTS, ("who", "what", "when"))
    out = tmp_path / "out"
    arguments = (path, "--out", out, "--user", "who", "--item", "what", "--time", "when")
    few = ("--min-user-events", 1, "--min-item-events", 1)
    done = command(*arguments, *few, "--split", "temporal", "--valid-from", 5, "--test-from", 8, "--max-length", 2)
    assert done.exit_code == 0, done.output
    assert original(out)["test"] == [("u1", ["c", "d"], "a"), ("u2", ["b"], "c"), ("u3", ["c", "b"], "a")]
    assert "train_prefixes: 3 rows" in done.output
    assert "11 of 11 events, 3 users, 4 items, of which 0 are in no train row" in done.output
    assert command(*arguments, *few).exit_code == 0  # replaces its own folder
    assert len(original(out)["test"]) == 2
    # five events a user and item by default; of sessions two
    assert "items with fewer than 5" in str(command(*arguments).exception)
    of_sessions = command(*arguments, "--split", "session", "--valid-from", 5, "--test-from", 8)
    assert "users with fewer than 2 events and items with fewer than 5" in str(of_sessions.exception)


def test_command_tells_how_it_is_used() -> None:
    text = command("--help").output
    assert "Example: rechub-dist data sequences ratings.csv" in text
    assert "leave-one-out" in text


def test_string_views_are_strings(tmp_path: Path) -> None:
    users, items, times = zip(*EVENTS, strict=True)
    plain = pa.table({"user": [str(user) for user in users], "item": [str(item) for item in items], "time": times})
    views = pa.table({name: plain[name].cast(pa.string_view()) for name in ("user", "item")} | {"time": plain["time"]})
    for name, table in (("plain", plain), ("views", views)):
        pq.write_table(table, tmp_path / f"{name}.parquet")
        prepare_events(tmp_path / f"{name}.parquet", tmp_path / name, COLUMNS, plan())
    assert original(tmp_path / "views") == original(tmp_path / "plain")


def test_the_events_are_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "data" / "e.parquet", EVENTS)
    before = path.read_bytes()
    for out in (path, path.parent, tmp_path):
        with pytest.raises(UserError, match="the input"):
            prepare_events(path, out, COLUMNS, plan())
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.rglob("*")] == ["data", "e.parquet"]
