"""What is no Parquet is told what it is, at once, and what to do about it."""

from __future__ import annotations

import gzip
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest
from pyarrow import feather, orc

from rechub_dist.data.parquet.lookalikes import what_else
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.pages import read_parquet
from rechub_dist.errors import UserError
from rechub_dist.skips import BadFileError

TABLE = pa.table({"user": list(range(50)), "click": [0.5] * 50})
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE, sink)
    return bytes(sink.getvalue().to_pybytes())


def csv(path: Path, delimiter: str = ",") -> None:
    pcsv.write_csv(TABLE, path, pcsv.WriteOptions(delimiter=delimiter))


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.csv", "a,b\n1,2\n")


WRITERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (Path.touch, r"is empty \(0 bytes\); write it again, or remove it"),
    "csv": (csv, r"is CSV text, not Parquet; convert it: python -c .*r\.read_csv\('x\.parquet'\)"),
    "tsv": (lambda path: csv(path, "\t"), r"is TSV text, not Parquet; .*ParseOptions\(delimiter='\\t'\)"),
    "semicolons": (lambda path: csv(path, ";"), r"is CSV with semicolons text, not Parquet"),
    "json": (lambda path: path.write_text('{"user": 1}\n{"user": 2}\n'), r"is JSON, not .*r\.read_json\('x"),
    "json array": (lambda path: path.write_text('[{"user": 1}]'), r"is JSON, not Parquet; .*pandas\.read_json"),
    "gzip of csv": (
        lambda path: path.write_bytes(gzip.compress(b"a,b\n1,2\n" * 90)),
        r"is CSV text compressed by gzip",
    ),
    "gzip of parquet": (
        lambda path: path.write_bytes(gzip.compress(parquet())),
        r"is Parquet compressed by gzip, not Parquet; unpack it first \(gunzip\)",
    ),
    "zip": (zipped, "is a ZIP archive, not Parquet; unpack it first"),
    "feather": (lambda path: feather.write_feather(TABLE, path), "is an Arrow .Feather. file.*feather.*read_table"),
    "orc": (lambda path: orc.write_table(TABLE, path), "is an ORC file, not Parquet; .*pyarrow.orc"),
    "numpy": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"), "is a NumPy array"),
    "html": (
        lambda path: path.write_text("\n<!DOCTYPE html><html><body>404"),
        "is an HTML page.*download the file again",
    ),
    "xml": (lambda path: path.write_text('<?xml version="1.0"?><Error>'), "is XML, as a store answers"),
    "git lfs": (lambda path: path.write_text(LFS), "is the pointer of Git LFS to a file.*: git lfs pull"),
    "zeros": (lambda path: path.write_bytes(b"\x00" * 5000), "is zero bytes where it begins"),
    "text": (lambda path: path.write_text("see below\n"), "is text, not Parquet; name the Parquet file"),
    "utf-16": (lambda path: path.write_text("a,b\n1,2\n", "utf-16"), "is text in UTF-16"),
    "encrypted": (lambda path: path.write_bytes(parquet()[:-4] + b"PARE"), "is Parquet with an encrypted footer"),
    "cut off": (lambda path: path.write_bytes(parquet()[:-10]), "is truncated or corrupt .*write the file again"),
}


@pytest.mark.parametrize(("write", "message"), WRITERS.values(), ids=WRITERS)
def test_what_it_is_and_what_to_do(tmp_path: Path, write: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "x.parquet"
    write(path)
    for read in (Manifest.read, read_parquet):
        with pytest.raises(BadFileError, match=f"^{path}: it {message}") as error:
            read(str(path))
        assert "\n" not in str(error.value)
        assert len(str(error.value)) - len(str(path)) < 300


def test_the_command_converts(tmp_path: Path) -> None:
    csv(tmp_path / "x.csv", "\t")
    content = (tmp_path / "x.csv").read_bytes()
    found = what_else(content[:512], content[-4:], str(tmp_path / "x.csv"))
    assert found is not None
    code = found.split('python -c "')[1].removesuffix('"')
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert pq.read_table(tmp_path / "converted.parquet").equals(TABLE)


def test_a_folder_of_other_files_is_told_what_it_holds(tmp_path: Path) -> None:
    csv(tmp_path / "a.csv")
    csv(tmp_path / "b.csv")
    (tmp_path / "_c.parquet").touch()
    with pytest.raises(UserError, match=r"no \*.parquet file in this folder; there are 2 file\(s\) \*.csv.*duckdb -c"):
        Manifest.read(str(tmp_path))


def test_bytes_of_any_kind_raise_nothing() -> None:
    rng = np.random.default_rng(0)
    for size in range(1, 300):
        head = rng.bytes(size)
        what_else(head, head[-4:], "x")
        what_else("ünlike".encode()[: size % 8 or 1], b"", "x")


def test_what_nobody_can_read_quickly_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "loop.parquet").symlink_to(tmp_path / "loop.parquet")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.parquet"))
        for name in ("pipe", "folder", "loop", "socket"):
            with pytest.raises(UserError) as error:
                Manifest.read(str(tmp_path / f"{name}.parquet"))
            assert "\n" not in str(error.value)
            assert "attempts within" not in str(error.value)
