"""Mistakes in where a run writes, and in what lies there already."""

from __future__ import annotations

import os
from typing import Any

from mistaken.scene import BOTH, ONE, TRAIN, Scene, Section

PLACES = Section("Where a run writes")


def beside_a_file(scene: Scene, **sections: Any) -> list[str]:
    """A run whose sections name a file, or what should lie below it."""
    scene.write("file", "x")
    return scene.run(**sections)


def pipe(scene: Scene, name: str) -> None:
    """A named pipe; its folder is made."""
    (scene / name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(scene / name)


def trained_but(scene: Scene, name: str, odd: str) -> None:
    """A trained run, one of whose files is a `folder` or a `pipe` now, or `gone`."""
    scene.trained()
    (scene / name).unlink()
    if odd == "folder":
        (scene / name).mkdir()
    elif odd == "pipe":
        pipe(scene, name)


def trained(scene: Scene, *options: str) -> list[str]:
    """Train a run on that is trained already, with other options."""
    scene.trained()
    return [*TRAIN, *options]


UNKNOWN = "nowhere://checkpoints"

PLACES.table(
    ("output_dir is a file", BOTH, lambda s: s.write("out", "x")),
    ("output_dir is below a file", BOTH, lambda s: beside_a_file(s, output_dir="file/out")),
    ("output_dir is a pipe", BOTH, lambda s: pipe(s, "out")),
    ("output_dir is a link that leads to itself", ONE, lambda s: (s / "out").symlink_to("out")),
    ("output_dir has a name that is too long", BOTH, lambda s: s.run(output_dir="o" * 300)),
    ("output_dir where nobody can write", ONE, lambda s: s.run(output_dir="/proc/out")),
    ("output_dir holds another's config.yaml", BOTH, lambda s: s.write("out/config.yaml", "mine: true\n")),
    ("config.yaml in output_dir is a folder", BOTH, lambda s: (s / "out/config.yaml").mkdir(parents=True)),
    ("config.yaml in output_dir is a pipe", BOTH, lambda s: pipe(s, "out/config.yaml")),
    ("metrics.jsonl in output_dir is a folder", BOTH, lambda s: trained_but(s, "out/metrics.jsonl", "folder")),
    ("logs in output_dir is a file", BOTH, lambda s: s.write("out/logs", "x")),
    ("tensorboard in output_dir is a file", BOTH, lambda s: s.write("out/tensorboard", "x")),
    ("a pipe as metrics.jsonl in output_dir", ONE, lambda s: trained_but(s, "out/metrics.jsonl", "pipe")),
    (
        "rows in output_dir is a file, and train.trace_rows",
        BOTH,
        lambda s: s.write("out/rows", "x") and s.run(train={"trace_rows": True}),
    ),
    ("checkpoints in output_dir is a file", ONE, lambda s: s.write("out/checkpoints", "x")),
    ("checkpoint.folder is a file", BOTH, lambda s: beside_a_file(s, checkpoint={"folder": "file"})),
    ("checkpoint.folder is below a file", ONE, lambda s: beside_a_file(s, checkpoint={"folder": "file/checkpoints"})),
    ("checkpoint.folder is a pipe", ONE, lambda s: pipe(s, "pipe") or s.run(checkpoint={"folder": "pipe"})),
    ("checkpoint.folder is an address of an unknown kind", ONE, lambda s: s.run(checkpoint={"folder": UNKNOWN})),
    (".lease in output_dir is a file", BOTH, lambda s: s.write("out/.lease", "x")),
    ("a lease that is a folder", ONE, lambda s: (s / "out/.lease/00000001.json").mkdir(parents=True)),
    ("the output folder of another run", BOTH, lambda s: trained(s, "--set", "seed=1")),
    ("a run whose data has changed", ONE, lambda s: trained_but(s, "data/train/part-2.parquet", "gone")),
    (
        "a run whose tables have other sizes",
        ONE,
        lambda s: s.trained() and s.schema(user={"kind": "sparse", "rows": 50}),
    ),
)
