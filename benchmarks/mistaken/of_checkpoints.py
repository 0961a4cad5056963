"""Checkpoints that are damaged, or come from elsewhere with intent, and warm starts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mistaken.scene import BOTH, TRAIN, Scene, Section
from rechub_dist.checkpoint.manifest import MANIFEST, seal

CHECKPOINTS = Section("Checkpoints and warm starts")
mistake = CHECKPOINTS.mistake


def each_file(scene: Scene, pattern: str, work: Callable[[Path], object]) -> list[str]:
    """Do something to the files of all checkpoints, so that there is no good one; the command that resumes."""
    for step in scene.checkpoints():
        for path in step.glob(pattern):
            work(path)
    return TRAIN


def hostile(work: Callable[[Any], object]) -> Callable[[Scene], list[str]]:
    """Change what the manifests say, and seal them again; the command that resumes."""

    def one(path: Path) -> None:
        tree = json.loads(path.read_bytes())["manifest"]
        work(tree)
        path.write_bytes(seal(json.dumps(tree).encode()))

    return lambda scene: each_file(scene, MANIFEST, one)


def flip(path: Path) -> None:
    """Change a bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def piece(tree: Any) -> Any:
    """The first piece of the users' table."""
    return tree["tensors"]["tables/user/weight"]["pieces"][0]


def file(tree: Any) -> Any:
    """The record of the first file."""
    return next(iter(tree["files"].values()))


def renamed(name: str) -> Callable[[Any], None]:
    """Call the first file otherwise."""

    def work(tree: Any) -> None:
        tree["files"][name] = tree["files"].pop(next(iter(tree["files"])))

    return work


mistake("all checkpoints have a bit flipped in a file", BOTH)(lambda scene: each_file(scene, "rank-00000-*", flip))
mistake("all checkpoints have a bit flipped in the manifest")(lambda scene: each_file(scene, MANIFEST, flip))
mistake("all checkpoints have an empty manifest")(lambda scene: each_file(scene, MANIFEST, lambda p: os.truncate(p, 0)))
mistake("all checkpoints lack a file", BOTH)(lambda scene: each_file(scene, "rank-00000-*", Path.unlink))
mistake("all checkpoints have a file that is cut off")(
    lambda scene: each_file(scene, "rank-00000-*", lambda path: os.truncate(path, 100))
)


@mistake("files of checkpoints are links to elsewhere")
def _(scene: Scene) -> list[str]:
    def link(path: Path) -> None:
        path.rename(scene / path.name)
        path.symlink_to(scene / path.name)

    return each_file(scene, "rank-00000-*", link)


@mistake("files of checkpoints are pipes")
def _(scene: Scene) -> list[str]:
    def pipe(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    return each_file(scene, "rank-00000-*", pipe)


HOSTILE: dict[str, Callable[[Any], object]] = {
    "an absolute path": renamed("/etc/passwd"),
    "a path through ..": renamed("../../secret"),
    "no checksums": lambda tree: file(tree).update(checksums=[]),
    "a checksum that is none": lambda tree: file(tree).update(checksums=["x"]),
    "a negative size": lambda tree: file(tree).update(size=-1),
    "a size of 10^30": lambda tree: file(tree).update(size=10**30),
    "a step of 10^30": lambda tree: tree.update(step=10**30),
    "a negative step": lambda tree: tree.update(step=-1),
    "a position of another step": lambda tree: tree["run"]["position"].update(step=1),
    "a best step that is no number": lambda tree: tree["run"]["position"].update(best_step="best"),
    "no position": lambda tree: tree["run"].pop("position"),
    "no configuration": lambda tree: tree["run"].pop("config"),
    "a configuration that is no YAML": lambda tree: tree["run"].update(config="{"),
    "a configuration that is a list": lambda tree: tree["run"].update(config="- a"),
    "a table without rows": lambda tree: tree["run"]["tables"]["user"].pop("rows"),
    "a piece in a file that is not listed": lambda tree: piece(tree).update(file="other"),
    "a piece beyond its file": lambda tree: piece(tree).update(offset=2**60),
    "a piece outside its tensor": lambda tree: piece(tree).update(row=2**40),
    "a piece twice": lambda tree: tree["tensors"]["tables/user/weight"].update(pieces=[piece(tree)] * 2),
    "an unknown type of elements": lambda tree: tree["tensors"]["tables/user/weight"].update(dtype="F128"),
    "a negative shape": lambda tree: tree["tensors"]["tables/user/weight"].update(shape=[-40, 4]),
    "a shape of 2^80": lambda tree: tree["tensors"]["tables/user/weight"].update(shape=[2**40, 2**40]),
    "another shape": lambda tree: tree["tensors"]["tables/user/weight"].update(shape=[4, 40]),
    "a tensor less": lambda tree: tree["tensors"].pop("tables/user/weight"),
    "a format of the future": lambda tree: tree.update(format=2),
    "code of its own": lambda tree: tree["run"].update(
        config=tree["run"]["config"].replace("name: DeepFM", "name: evil:Model")
    ),
}
for name, change in HOSTILE.items():
    mistake(f"manifests with {name}", BOTH if name in ("an absolute path", "a piece twice") else (1,))(hostile(change))


@mistake("manifests of nested brackets alone")
def _(scene: Scene) -> list[str]:
    return each_file(scene, MANIFEST, lambda path: path.write_bytes(seal(b"[" * 100_000)))


def warm(scene: Scene, **item: object) -> list[str]:
    """The command that begins with vectors of a file."""
    return scene.run(warm_start={"embeddings": [{"table": "user", **item}]})


@mistake("a warm start from a run that is not there")
def _(scene: Scene) -> list[str]:
    return scene.run(warm_start={"from": "nowhere"})


@mistake("a warm start from a folder whose config.yaml is a list")
def _(scene: Scene) -> list[str]:
    scene.write("other/config.yaml", "- a\n")
    return scene.run(warm_start={"from": "other"})


@mistake("a warm start from a folder whose config.yaml names a number as folder")
def _(scene: Scene) -> list[str]:
    scene.write("other/config.yaml", "checkpoint: {folder: 3}\n")
    return scene.run(warm_start={"from": "other"})


@mistake("a warm start from a damaged checkpoint", BOTH)
def _(scene: Scene) -> list[str]:
    each_file(scene, "rank-00000-*", flip)
    return scene.run(output_dir="other", warm_start={"from": "out"})


@mistake("a warm start with a pattern that matches nothing")
def _(scene: Scene) -> list[str]:
    scene.trained()
    return scene.run(output_dir="other", warm_start={"from": "out", "tables": ["usr"]})


@mistake("a warm start with vectors of another width", BOTH)
def _(scene: Scene) -> list[str]:
    np.save(scene / "v.npy", np.zeros((40, 5), np.float32))
    return warm(scene, file="v.npy")


@mistake("a warm start with an .npy file that is none")
def _(scene: Scene) -> list[str]:
    scene.write("v.npy", b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16)
    return warm(scene, file="v.npy")


@mistake("a warm start with a corrupt Parquet file", BOTH)
def _(scene: Scene) -> list[str]:
    table = pa.table({"id": list(range(40)), "vector": [[0.5] * 4] * 40})
    pq.write_table(table, scene / "v.parquet")
    with (scene / "v.parquet").open("r+b") as opened:
        opened.seek(4)
        opened.write(b"\xff" * 150)
    return warm(scene, file="v.parquet")


@mistake("a warm start with a CSV file")
def _(scene: Scene) -> list[str]:
    scene.write("v.parquet", "id,vector\n1,0.5\n")
    return warm(scene, file="v.parquet")


@mistake("a warm start with a pipe", BOTH)
def _(scene: Scene) -> list[str]:
    os.mkfifo(scene / "v.npy")
    return warm(scene, file="v.npy")


@mistake("a warm start with a folder as .npy file")
def _(scene: Scene) -> list[str]:
    (scene / "v.npy").mkdir()
    return warm(scene, file="v.npy")


@mistake("a warm start with a file that is not there")
def _(scene: Scene) -> list[str]:
    return warm(scene, file="v.npy")


@mistake("a warm start of a table that is not there")
def _(scene: Scene) -> list[str]:
    return scene.run(warm_start={"embeddings": [{"table": "usr", "file": "v.npy"}]})
