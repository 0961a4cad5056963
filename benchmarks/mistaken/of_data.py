"""Mistakes in data sets: their files, columns, schemas and vocabularies."""

from __future__ import annotations

import gzip
import os
import shutil
import socket
from collections.abc import Callable

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from mistaken.scene import BOTH, ONE, TRAIN, Scene, Section, write_data

DATA = Section("The data")
SCHEMA, ODD = "data/dataset.yaml", "data/train/x.parquet"


def pipe(scene: Scene, name: str) -> None:
    """A named pipe, in place of what was there."""
    (scene / name).unlink(missing_ok=True)
    os.mkfifo(scene / name)


def each_file(scene: Scene, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change the rows of all files to train on."""
    for path in (scene / "data/train").iterdir():
        pq.write_table(change(pq.read_table(path)), path)


DATA.table(
    ("data.root that is not there", BOTH, lambda s: s.run(data={"root": "nowhere"})),
    ("data.root that is a file", ONE, lambda s: s.run(data={"root": "run.yaml"})),
    ("no dataset.yaml", ONE, lambda s: (s / SCHEMA).unlink()),
    ("a pipe as dataset.yaml", ONE, lambda s: pipe(s, SCHEMA)),
    ("bytes as dataset.yaml", ONE, lambda s: s.write(SCHEMA, b"\xff\xfe\x00")),
    ("a list as dataset.yaml", ONE, lambda s: s.write(SCHEMA, "- user\n")),
    ("a schema without features", ONE, lambda s: s.write(SCHEMA, {"name": "small", "labels": {"click": {}}})),
    ("a feature without rows", ONE, lambda s: s.schema(user={"kind": "sparse"})),
    ("a feature of an unknown kind", ONE, lambda s: s.schema(user={"kind": "spars", "rows": 40})),
    ("an unknown key of a feature", ONE, lambda s: s.schema(user={"kind": "sparse", "row": 40})),
    ("a table that is not declared", ONE, lambda s: s.schema(user={"kind": "sparse", "table": "items"})),
    ("a dense feature where ids are needed", ONE, lambda s: s.run(model={"features": ["age"]})),
    ("data.dataset that is not there", ONE, lambda s: s.run(data={"dataset": "gone.yaml"})),
    ("no train split", ONE, lambda s: shutil.rmtree(s / "data/train")),
    ("an empty train folder", ONE, lambda s: [path.unlink() for path in (s / "data/train").iterdir()] and None),
)


@DATA.mistake("a train folder of CSV files", BOTH)
def _(scene: Scene) -> list[str]:
    for path in sorted((scene / "data/train").iterdir()):
        pcsv.write_csv(pq.read_table(path, columns=["user", "age"]), path.with_suffix(".csv"))
        path.unlink()
    return TRAIN


def csv(scene: Scene, name: str) -> None:
    """Two columns of the last file as CSV, at a path."""
    pcsv.write_csv(pq.read_table(scene.last(), columns=["user", "age"]), scene / name)


def train_on(scene: Scene, name: str, make: Callable[[Scene, str], None], split: str = "train") -> list[str]:
    """Make a file beside the data, and name it as that of a split."""
    make(scene, name)
    return scene.run(data={split: f"../{name}"})


def socket_at(path: os.PathLike[str]) -> None:
    """A socket, whose server has ended."""
    place = os.getcwd()
    os.chdir(os.path.dirname(path))  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.basename(path))
    finally:
        os.chdir(place)


LAST = "data/train/part-2.parquet"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HTML = "<!DOCTYPE html><html><body>403 Forbidden</body></html>"

DATA.table(
    ("a CSV file as data.train", ONE, lambda s: train_on(s, "train.csv", csv)),
    ("a CSV file called .parquet", BOTH, lambda s: csv(s, LAST)),
    ("JSON called .parquet", ONE, lambda s: s.write(LAST, '{"user": 1, "click": 0}\n')),
    ("a Parquet file in gzip", ONE, lambda s: s.write(LAST, gzip.compress(s.last().read_bytes()))),
    ("an HTML page called .parquet", ONE, lambda s: s.write(LAST, HTML)),
    ("a pointer of Git LFS", ONE, lambda s: s.write(LAST, LFS)),
    ("an empty file called .parquet", BOTH, lambda s: s.write(LAST, b"")),
    ("a file of zero bytes called .parquet", ONE, lambda s: s.write(LAST, bytes(5000))),
    ("Parquet with an encrypted footer", ONE, lambda s: s.write(LAST, s.last().read_bytes()[:-4] + b"PARE")),
    ("a Parquet file that is cut off", BOTH, lambda s: s.write(LAST, s.last().read_bytes()[:-100])),
    ("a Parquet file with corrupt pages", BOTH, lambda s: s.spoil(LAST, 300)),
    ("a folder called .parquet", ONE, lambda s: (s / ODD).mkdir()),
    ("a pipe called .parquet", BOTH, lambda s: pipe(s, ODD)),
    ("a pipe as data.valid", ONE, lambda s: train_on(s, "x.parquet", pipe, "valid")),
    ("a socket called .parquet", ONE, lambda s: socket_at(s / ODD)),
    ("a link that leads nowhere", ONE, lambda s: (s / ODD).symlink_to("gone.parquet")),
    ("a link that leads to itself", ONE, lambda s: (s / ODD).symlink_to("x.parquet")),
    ("one file under two names", ONE, lambda s: (s / ODD).symlink_to("part-0.parquet")),
    ("files without rows", ONE, lambda s: each_file(s, lambda table: table.slice(0, 0))),
    ("a file with another column type", BOTH, lambda s: s.column("user", ["a"] * 30)),
    ("a file without a column", BOTH, lambda s: s.without("user")),
    ("a column that is there twice", ONE, lambda s: each_file(s, lambda t: t.append_column("user", t["user"]))),
    ("an id that is outside its table", BOTH, lambda s: s.column("user", [40, *range(29)])),
    ("a negative id", ONE, lambda s: s.column("user", [-1, *range(29)])),
    ("a missing id", BOTH, lambda s: s.column("user", pa.array([None, *range(29)], pa.int64()))),
    ("a missing number", ONE, lambda s: s.column("age", pa.array([None, *[0.5] * 29], pa.float64()))),
    ("a number that is not finite", BOTH, lambda s: s.column("age", [float("nan"), *[0.5] * 29])),
    ("a label that is neither 0 nor 1", BOTH, lambda s: s.column("click", [2, *[0] * 29])),
    ("a valid split without the label", ONE, lambda s: s.without("click", "valid")),
    ("a valid split with an id outside its table", BOTH, lambda s: s.column("item", [30] * 30, "valid")),
    ("fewer rows than a batch, with drop_last", ONE, lambda s: s.run(data={"batch_size": 200, "drop_last": True})),
    ("an address of an unknown kind", ONE, lambda s: s.run(data={"train": "nowhere://data"})),
    ("a pattern that matches nothing", ONE, lambda s: s.run(data={"train": "train/part-[7-9].parquet"})),
    ("a selection that no row meets", ONE, lambda s: select(s, "age")),
    ("a selection by a column that is not there", ONE, lambda s: select(s, "agee")),
)


def select(scene: Scene, column: str) -> list[str]:
    """Train on rows by a column's value."""
    return scene.run(data={"train": {"path": "train", "where": [[column, ">", 5]]}})


def with_vocabulary(scene: Scene, columns: dict[str, object] | bytes | None, spoiled: int = 0) -> list[str]:
    """A vocabulary of the users: its columns, its bytes, or none."""
    if isinstance(columns, dict):
        pq.write_table(pa.table(columns), scene / "users.parquet")
    elif columns is not None:
        scene.write("users.parquet", columns)
    if spoiled:
        scene.spoil("users.parquet", spoiled)
    return scene.schema(user={"kind": "sparse", "rows": 40, "vocabulary": "../users.parquet"})


BEYOND = pa.array([1, 2**63 + 1], pa.uint64())
WHOLE = {"value": list(range(40)), "id": list(range(40))}
EVENTS = "user,item\n1,2\n"
SEQUENCES = ["--out", "s", "--user", "user", "--item", "item"]


def command(scene: Scene, *arguments: str, **files: str | bytes) -> list[str]:
    """A command on files: their names, with _ for the dot, and contents."""
    for name, content in files.items():
        scene.write(name.replace("_", "."), content)
    return ["data", *arguments]


DATA.table(
    ("a vocabulary that is not there", ONE, lambda s: with_vocabulary(s, None)),
    ("a vocabulary that is a CSV file", ONE, lambda s: with_vocabulary(s, b"value,id\n1,1\n")),
    ("a vocabulary without ids", ONE, lambda s: with_vocabulary(s, {"value": [1, 2]})),
    ("a vocabulary with a value twice", ONE, lambda s: with_vocabulary(s, {"value": [1, 1], "id": [1, 2]})),
    ("a vocabulary with an id outside the table", ONE, lambda s: with_vocabulary(s, {"value": [1, 2], "id": [1, 40]})),
    (
        "a vocabulary with an id that is no 64-bit number",
        ONE,
        lambda s: with_vocabulary(s, {"value": [1, 2], "id": BEYOND}),
    ),
    ("a vocabulary of lists", ONE, lambda s: with_vocabulary(s, {"value": [[1], [2]], "id": [1, 2]})),
    ("a vocabulary with corrupt pages", BOTH, lambda s: with_vocabulary(s, WHOLE, spoiled=100)),
    ("`data inspect` of a CSV file", ONE, lambda s: command(s, "inspect", "events.csv", events_csv=EVENTS)),
    (
        "`data sequences` of a Parquet file that is cut off",
        ONE,
        lambda s: command(s, "sequences", "e.parquet", *SEQUENCES, e_parquet=s.last().read_bytes()[:-20]),
    ),
    (
        "`data sequences` of a column that is not there",
        ONE,
        lambda s: command(s, "sequences", "events.csv", *SEQUENCES[:3], "usr", *SEQUENCES[4:], events_csv=EVENTS),
    ),
    (
        "`data vocabulary` of a column that is not there",
        ONE,
        lambda s: command(s, "vocabulary", "data/train", "--column", "usr", "--out", "v.parquet"),
    ),
    ("`data rechunk` into its own input", ONE, lambda s: command(s, "rechunk", "data", "--out", "data/train/new")),
    (
        "`data rechunk` into a folder that holds something else",
        ONE,
        lambda s: write_data(s / "other") or command(s, "rechunk", "data", "--out", "other"),
    ),
    (
        "`data prepare` of an unknown data set",
        ONE,
        lambda s: command(s, "prepare", "movielense", "--source", "data", "--out", "other"),
    ),
    ("`data synthesize` without rows", ONE, lambda s: command(s, "synthesize", "--out", "s", "--rows", "0")),
)
