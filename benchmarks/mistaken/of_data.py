"""Mistakes in data sets: their files, columns, schemas and vocabularies."""

from __future__ import annotations

import gzip
import os
import shutil
import socket

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from mistaken.scene import Scene, Section, write_data

DATA = Section("The data")
mistake = DATA.mistake
BOTH = (1, 2)
TRAIN = ["train", "run.yaml"]


@mistake("data.root that is not there", BOTH)
def _(scene: Scene) -> list[str]:
    return scene.run(data={"root": "nowhere"})


@mistake("data.root that is a file")
def _(scene: Scene) -> list[str]:
    return scene.run(data={"root": "run.yaml"})


@mistake("no dataset.yaml")
def _(scene: Scene) -> list[str]:
    (scene / "data/dataset.yaml").unlink()
    return TRAIN


@mistake("a pipe as dataset.yaml")
def _(scene: Scene) -> list[str]:
    (scene / "data/dataset.yaml").unlink()
    os.mkfifo(scene / "data/dataset.yaml")
    return TRAIN


@mistake("bytes as dataset.yaml")
def _(scene: Scene) -> list[str]:
    scene.write("data/dataset.yaml", b"\xff\xfe\x00")
    return TRAIN


@mistake("a list as dataset.yaml")
def _(scene: Scene) -> list[str]:
    scene.write("data/dataset.yaml", "- user\n")
    return TRAIN


@mistake("a schema without features")
def _(scene: Scene) -> list[str]:
    scene.write("data/dataset.yaml", {"name": "small", "labels": {"click": {}}})
    return TRAIN


@mistake("a feature without rows")
def _(scene: Scene) -> list[str]:
    return scene.schema(user={"kind": "sparse"})


@mistake("a feature of an unknown kind")
def _(scene: Scene) -> list[str]:
    return scene.schema(user={"kind": "spars", "rows": 40})


@mistake("an unknown key of a feature")
def _(scene: Scene) -> list[str]:
    return scene.schema(user={"kind": "sparse", "row": 40})


@mistake("a table that is not declared")
def _(scene: Scene) -> list[str]:
    return scene.schema(history={"kind": "sequence", "table": "items", "max_length": 4})


@mistake("a dense feature where ids are needed")
def _(scene: Scene) -> list[str]:
    return scene.run(model={"features": ["age"]})


@mistake("data.dataset that is not there")
def _(scene: Scene) -> list[str]:
    return scene.run(data={"dataset": "gone.yaml"})


@mistake("no train split")
def _(scene: Scene) -> list[str]:
    shutil.rmtree(scene / "data/train")
    return TRAIN


@mistake("an empty train folder")
def _(scene: Scene) -> list[str]:
    for path in (scene / "data/train").iterdir():
        path.unlink()
    return TRAIN


@mistake("a train folder of CSV files", BOTH)
def _(scene: Scene) -> list[str]:
    for path in sorted((scene / "data/train").iterdir()):
        pcsv.write_csv(pq.read_table(path, columns=["user", "age"]), path.with_suffix(".csv"))
        path.unlink()
    return TRAIN


@mistake("a CSV file as data.train")
def _(scene: Scene) -> list[str]:
    pcsv.write_csv(pq.read_table(scene.last(), columns=["user", "age"]), scene / "train.csv")
    return scene.run(data={"train": "../train.csv"})


@mistake("a CSV file called .parquet", BOTH)
def _(scene: Scene) -> list[str]:
    pcsv.write_csv(pq.read_table(scene.last(), columns=["user", "age"]), scene.last())
    return TRAIN


@mistake("JSON called .parquet")
def _(scene: Scene) -> list[str]:
    scene.last().write_text('{"user": 1, "click": 0}\n')
    return TRAIN


@mistake("a Parquet file in gzip")
def _(scene: Scene) -> list[str]:
    scene.last().write_bytes(gzip.compress(scene.last().read_bytes()))
    return TRAIN


@mistake("an HTML page called .parquet")
def _(scene: Scene) -> list[str]:
    scene.last().write_text("<!DOCTYPE html><html><body>403 Forbidden</body></html>")
    return TRAIN


@mistake("a pointer of Git LFS")
def _(scene: Scene) -> list[str]:
    scene.last().write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    return TRAIN


@mistake("an empty file called .parquet", BOTH)
def _(scene: Scene) -> list[str]:
    scene.last().write_bytes(b"")
    return TRAIN


@mistake("a file of zero bytes called .parquet")
def _(scene: Scene) -> list[str]:
    scene.last().write_bytes(bytes(5000))
    return TRAIN


@mistake("Parquet with an encrypted footer")
def _(scene: Scene) -> list[str]:
    scene.last().write_bytes(scene.last().read_bytes()[:-4] + b"PARE")
    return TRAIN


@mistake("a Parquet file that is cut off", BOTH)
def _(scene: Scene) -> list[str]:
    os.truncate(scene.last(), scene.last().stat().st_size - 100)
    return TRAIN


@mistake("a Parquet file with corrupt pages", BOTH)
def _(scene: Scene) -> list[str]:
    with scene.last().open("r+b") as file:
        file.seek(4)
        file.write(b"\xff" * 300)
    return TRAIN


@mistake("a folder called .parquet")
def _(scene: Scene) -> list[str]:
    (scene / "data/train/x.parquet").mkdir()
    return TRAIN


@mistake("a pipe called .parquet", BOTH)
def _(scene: Scene) -> list[str]:
    os.mkfifo(scene / "data/train/x.parquet")
    return TRAIN


@mistake("a pipe as data.valid")
def _(scene: Scene) -> list[str]:
    os.mkfifo(scene / "x.parquet")
    return scene.run(data={"valid": "../x.parquet"})


@mistake("a socket called .parquet")
def _(scene: Scene) -> list[str]:
    place = os.getcwd()
    os.chdir(scene / "data/train")  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("x.parquet")
    finally:
        os.chdir(place)
    return TRAIN


@mistake("a link that leads nowhere")
def _(scene: Scene) -> list[str]:
    (scene / "data/train/x.parquet").symlink_to("gone.parquet")
    return TRAIN


@mistake("a link that leads to itself")
def _(scene: Scene) -> list[str]:
    (scene / "data/train/x.parquet").symlink_to("x.parquet")
    return TRAIN


@mistake("one file under two names")
def _(scene: Scene) -> list[str]:
    (scene / "data/train/x.parquet").symlink_to("part-0.parquet")
    return TRAIN


@mistake("files without rows")
def _(scene: Scene) -> list[str]:
    for path in (scene / "data/train").iterdir():
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    return TRAIN


@mistake("a file with another column type", BOTH)
def _(scene: Scene) -> list[str]:
    return scene.column("user", ["a"] * 30)


@mistake("a file without a column", BOTH)
def _(scene: Scene) -> list[str]:
    pq.write_table(pq.read_table(scene.last()).drop_columns(["user"]), scene.last())
    return TRAIN


@mistake("a column that is there twice")
def _(scene: Scene) -> list[str]:
    for path in (scene / "data/train").iterdir():
        table = pq.read_table(path)
        pq.write_table(table.append_column("user", table["user"]), path)
    return TRAIN


@mistake("an id that is outside its table", BOTH)
def _(scene: Scene) -> list[str]:
    return scene.column("user", [40, *range(29)])


@mistake("a negative id")
def _(scene: Scene) -> list[str]:
    return scene.column("user", [-1, *range(29)])


@mistake("a missing id", BOTH)
def _(scene: Scene) -> list[str]:
    return scene.column("user", pa.array([None, *range(29)], pa.int64()))


@mistake("a missing number")
def _(scene: Scene) -> list[str]:
    return scene.column("age", pa.array([None, *[0.5] * 29], pa.float64()))


@mistake("a number that is not finite", BOTH)
def _(scene: Scene) -> list[str]:
    return scene.column("age", [float("nan"), *[0.5] * 29])


@mistake("a label that is neither 0 nor 1", BOTH)
def _(scene: Scene) -> list[str]:
    return scene.column("click", [2, *[0] * 29])


@mistake("a valid split without the label")
def _(scene: Scene) -> list[str]:
    path = scene.last("valid")
    pq.write_table(pq.read_table(path).drop_columns(["click"]), path)
    return TRAIN


@mistake("a valid split with an id outside its table", BOTH)
def _(scene: Scene) -> list[str]:
    return scene.column("item", [30] * 30, "valid")


@mistake("fewer rows than a batch, with drop_last")
def _(scene: Scene) -> list[str]:
    return scene.run(data={"batch_size": 200, "drop_last": True})


@mistake("an address of an unknown kind")
def _(scene: Scene) -> list[str]:
    return scene.run(data={"train": "nowhere://data"})


@mistake("a pattern that matches nothing")
def _(scene: Scene) -> list[str]:
    return scene.run(data={"train": "train/part-[7-9].parquet"})


@mistake("a selection that no row meets")
def _(scene: Scene) -> list[str]:
    return scene.run(data={"train": {"path": "train", "where": [["age", ">", 5]]}})


@mistake("a selection by a column that is not there")
def _(scene: Scene) -> list[str]:
    return scene.run(data={"train": {"path": "train", "where": [["agee", ">", 5]]}})


def vocabulary(scene: Scene, values: object, ids: object) -> list[str]:
    """A vocabulary of the users."""
    pq.write_table(pa.table({"value": values, "id": ids}), scene / "users.parquet")
    return scene.schema(user={"kind": "sparse", "rows": 40, "vocabulary": "../users.parquet"})


@mistake("a vocabulary that is not there")
def _(scene: Scene) -> list[str]:
    return scene.schema(user={"kind": "sparse", "rows": 40, "vocabulary": "../users.parquet"})


@mistake("a vocabulary that is a CSV file")
def _(scene: Scene) -> list[str]:
    scene.write("users.parquet", "value,id\n1,1\n")
    return scene.schema(user={"kind": "sparse", "rows": 40, "vocabulary": "../users.parquet"})


@mistake("a vocabulary without ids")
def _(scene: Scene) -> list[str]:
    pq.write_table(pa.table({"value": [1, 2]}), scene / "users.parquet")
    return scene.schema(user={"kind": "sparse", "rows": 40, "vocabulary": "../users.parquet"})


@mistake("a vocabulary with a value twice")
def _(scene: Scene) -> list[str]:
    return vocabulary(scene, [1, 1], [1, 2])


@mistake("a vocabulary with an id outside the table")
def _(scene: Scene) -> list[str]:
    return vocabulary(scene, [1, 2], [1, 40])


@mistake("a vocabulary with an id that is no 64-bit number")
def _(scene: Scene) -> list[str]:
    return vocabulary(scene, [1, 2], pa.array([1, 2**63 + 1], pa.uint64()))


@mistake("a vocabulary of lists")
def _(scene: Scene) -> list[str]:
    return vocabulary(scene, [[1], [2]], [1, 2])


@mistake("a vocabulary with corrupt pages", BOTH)
def _(scene: Scene) -> list[str]:
    command = vocabulary(scene, list(range(40)), list(range(40)))
    with (scene / "users.parquet").open("r+b") as file:
        file.seek(4)
        file.write(b"\xff" * 100)
    return command


@mistake("`data inspect` of a CSV file")
def _(scene: Scene) -> list[str]:
    scene.write("events.csv", "user,item\n1,2\n")
    return ["data", "inspect", "events.csv"]


@mistake("`data sequences` of a Parquet file that is cut off")
def _(scene: Scene) -> list[str]:
    scene.write("events.parquet", scene.last().read_bytes()[:-20])
    return ["data", "sequences", "events.parquet", "--out", "s", "--user", "user", "--item", "item"]


@mistake("`data sequences` of a column that is not there")
def _(scene: Scene) -> list[str]:
    scene.write("events.csv", "user,item\n1,2\n")
    return ["data", "sequences", "events.csv", "--out", "s", "--user", "usr", "--item", "item"]


@mistake("`data vocabulary` of a column that is not there")
def _(_: Scene) -> list[str]:
    return ["data", "vocabulary", "data/train", "--column", "usr", "--out", "v.parquet"]


@mistake("`data rechunk` into its own input")
def _(_: Scene) -> list[str]:
    return ["data", "rechunk", "data", "--out", "data/train/new"]


@mistake("`data rechunk` into a folder that holds something else")
def _(scene: Scene) -> list[str]:
    write_data(scene / "other")
    return ["data", "rechunk", "data", "--out", "other"]


@mistake("`data prepare` of an unknown data set")
def _(_: Scene) -> list[str]:
    return ["data", "prepare", "movielense", "--source", "data", "--out", "other"]


@mistake("`data synthesize` without rows")
def _(_: Scene) -> list[str]:
    return ["data", "synthesize", "--out", "s", "--rows", "0"]
