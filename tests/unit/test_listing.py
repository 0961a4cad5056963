"""Hive partitions, lists of paths, and addresses of other file systems."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.config import Selection, StorageConfig
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.storage import exists, join, locate, read_text
from rechub_dist.data.run_file import load_run
from rechub_dist.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for day in range(22, 26):
        for hour in ("08", "17"):
            part = tmp_path / "data" / f"date=2022-04-{day}" / f"hour={hour}" / "part-0.parquet"
            part.parent.mkdir(parents=True)
            pq.write_table(pa.table({"a": [day, int(hour)]}), part)
    return tmp_path / "data"


def chosen(folder: Path, *where: Any, path: str = "") -> list[str]:
    manifest = Manifest.read(Selection(path=f"{folder}{path}", where=where))
    return ["/".join(file.path.split("/")[-3:-1]) for file in manifest.files]


def test_conditions_on_partitions(folder: Path) -> None:
    assert len(chosen(folder)) == 8
    late = ["date=2022-04-25/hour=08", "date=2022-04-25/hour=17"]
    assert chosen(folder, ("date", ">=", "2022-04-25")) == late
    assert chosen(folder, ("date", "=", datetime.date(2022, 4, 25))) == late  # as YAML reads a date
    assert chosen(folder, ("date", ">", "2022-04-24"), ("hour", "<", 9)) == late[:1]
    assert chosen(folder, ("date", "in", ["2022-04-25", "2022-05-01"]), ("hour", "!=", 8)) == late[1:]
    assert chosen(folder, ("hour", "==", 17), path="/date=2022-04-25") == late[1:]
    assert chosen(folder, ("date", "not in", ["2022-04-22"]), path="/*/hour=08") == [
        f"date=2022-04-{day}/hour=08" for day in (23, 24, 25)
    ]


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (("day", "=", 1), "neither a partition nor a column 'day', .*valid: a, date, hour"),
        (("dat", "=", 1), "did you mean 'date'"),
        (("date", ">", "2023-01-01"), r"none of its 8 file\(s\) meets where: .*check 'where'"),
        (("hour", ">", "noon"), "does not fit: hour is int64"),
    ],
)
def test_conditions_that_do_not_fit(folder: Path, condition: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        chosen(folder, condition)
    assert "\n" not in str(caught.value)


def test_lists(folder: Path) -> None:
    last = Selection(path=str(folder), where=(("date", "=", "2022-04-25"),))
    manifest = Manifest.read([f"{folder}/date=2022-04-23", last, f"{folder}/date=2022-04-22/hour=08/part-0.parquet"])
    days = [file.path.split("date=2022-04-")[1][:2] for file in manifest.files]
    assert days == ["23", "23", "25", "25", "22"]
    with pytest.raises(UserError, match=r"date=2022-04-25/hour=08/part-0\.parquet is in two of the paths"):
        Manifest.read([str(folder), last])


def test_sources_in_a_run_file(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        """
output_dir: out
data:
  root: s3://bucket/shop
  dataset: {features: {a: {kind: sparse, rows: 5}}, labels: {click: {}}}
  train: [a, {path: b, where: [[date, ">=", 2022-04-25], [hour, in, [8, 9]]]}]
  valid: /elsewhere/*.parquet
  storage: {region: eu-west-1, options: {scheme: http}}
model: {name: DeepFM}
"""
    )
    data = load_run(run).data
    where = (("date", ">=", "2022-04-25"), ("hour", "in", [8, 9]))
    assert data.train == ("a", Selection(path="b", where=where))
    assert data.valid == "/elsewhere/*.parquet"
    with pytest.raises(UserError, match=r"where.*got '~'"):
        load_run(run, ["data.train={path: b, where: [[date, '~', 1]]}"])


def test_join() -> None:
    assert join("data", "train") == join("data/", "train") == "data/train"
    assert join("s3://bucket/data?region=x", "train/*.parquet") == "s3://bucket/data/train/*.parquet?region=x"
    assert join("s3://bucket/data", "/train") == "/train"
    assert join("data", "gs://bucket/train") == "gs://bucket/train"


def test_hadoop_needs_its_client() -> None:
    with pytest.raises(UserError, match=r"hdfs://nn:8020/x: hdfs:// cannot be reached .*the Hadoop client"):
        Manifest.read("hdfs://nn:8020/x")


def test_any_fsspec_address(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/shop/data", recursive=True)
    memory.pipe("/shop/dataset.yaml", b"name: x\n")
    settings = StorageConfig()
    manifest = Manifest.read("memory://shop/data/**/*.parquet", settings)
    assert manifest.files[0].path == "memory://shop/data/date=2022-04-22/hour=08/part-0.parquet"
    assert manifest.rows == 16
    assert read_text("memory://shop/dataset.yaml", settings) == "name: x\n"
    assert exists("memory://shop/data", settings)
    assert not exists("memory://shop/test", settings)
    store, path = locate(manifest.files[0].path, settings)
    assert store.filesystem.open_input_file(path).size() == manifest.files[0].size


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("sftp://host/data", "paramiko.*install the package that serves sftp:// addresses"),
        ("nosuch://host/data", "nosuch:// cannot be reached .*check the address"),
        ("s3://bucket/data?colour=red", "s3:// cannot be reached .*colour"),
    ],
)
def test_addresses_that_cannot_be_served(address: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        Manifest.read(address, StorageConfig(region="us-east-1"))
    assert "\n" not in str(caught.value)


def names(path: Path | str) -> list[str]:
    return [file.name for file in Manifest.read(str(path)).files]


def refused(path: Path | str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        Manifest.read(str(path))
    assert "\n" not in str(caught.value)


def test_links_to_files_and_folders_elsewhere_are_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "day").symlink_to(folder / "date=2022-04-22")
    (tmp_path / "linked" / "a.parquet").symlink_to(folder / "date=2022-04-23" / "hour=08" / "part-0.parquet")
    expected = ["a.parquet", "day/hour=08/part-0.parquet", "day/hour=17/part-0.parquet"]
    assert names(tmp_path / "linked") == expected
    (tmp_path / "link").symlink_to("linked")
    assert names(tmp_path / "link") == expected


def test_a_link_to_a_folder_above_is_not_followed(folder: Path) -> None:
    plain = names(folder)
    (folder / "date=2022-04-22" / "again").symlink_to("..")
    (folder / "self").symlink_to(".")
    assert names(folder) == plain


def test_a_file_that_links_show_twice_is_refused(folder: Path) -> None:
    part = folder / "date=2022-04-22" / "hour=08"
    (folder / "newest").symlink_to("date=2022-04-22/hour=08")
    refused(folder, r"/newest/part-0.parquet: it is the same file as .*/hour=08/part-0.parquet, by a link; remove one")
    assert len(names(f"{folder}/date=*")) == 8
    (folder / "newest").unlink()
    (part / "copy.parquet").symlink_to("part-0.parquet")
    refused(folder, "is the same file as .*copy.parquet")


def test_links_to_nothing_are_refused(folder: Path) -> None:
    (folder / "gone").symlink_to("nowhere")  # no shard by its name
    (folder / "_old.parquet").symlink_to("nowhere")
    assert len(names(folder)) == 8
    (folder / "x.parquet").symlink_to("nowhere")
    refused(folder, r"x.parquet: it is a link that leads nowhere; remove it, or name the data by a pattern")
    refused(f"{folder}/*.parquet", "leads nowhere")
    assert len(names(f"{folder}/date=*")) == 8
    (folder / "x.parquet").unlink()
    (folder / "y.parquet").symlink_to("z.parquet")
    (folder / "z.parquet").symlink_to("y.parquet")
    refused(folder, r"y.parquet: it is a link that leads nowhere")


def test_what_is_no_file_is_refused(folder: Path) -> None:
    (folder / "x.parquet").mkdir()
    refused(folder, r"x.parquet: it is a folder without a \*.parquet file in it")
    (folder / "date=2022-04-22" / "hour=08" / "part-0.parquet").rename(folder / "x.parquet" / "part-0.parquet")
    assert "x.parquet/part-0.parquet" in names(folder)  # as some writers have it
    os.mkfifo(folder / "pipe.parquet")
    refused(folder, "pipe.parquet: it is neither a file nor a folder, but a pipe")
    refused(folder / "pipe.parquet", "neither a file nor a folder")


def test_signs_of_patterns_in_names_that_are_there(folder: Path, tmp_path: Path) -> None:
    moved = folder.rename(tmp_path / "set [v2] *?")
    assert len(names(moved)) == 8
    assert len(names(f"{moved}/date=2022-04-2[23]")) == 4
    assert len(names(f"{moved}/*/hour=08")) == 4
    assert len(names(f"file://{tmp_path}/set*")) == 8
    refused(tmp_path / "set [v3]", "no file matches")
