"""Mistakes in where a run writes, and in what lies there already."""

from __future__ import annotations

import os

from mistaken.scene import Scene, Section

PLACES = Section("Where a run writes")
mistake = PLACES.mistake
BOTH = (1, 2)
TRAIN = ["train", "run.yaml"]


@mistake("output_dir is a file", BOTH)
def _(scene: Scene) -> list[str]:
    scene.write("out", "x")
    return TRAIN


@mistake("output_dir is below a file", BOTH)
def _(scene: Scene) -> list[str]:
    scene.write("file", "x")
    return scene.run(output_dir="file/out")


@mistake("output_dir is a pipe", BOTH)
def _(scene: Scene) -> list[str]:
    os.mkfifo(scene / "out")
    return TRAIN


@mistake("output_dir is a link that leads to itself")
def _(scene: Scene) -> list[str]:
    (scene / "out").symlink_to("out")
    return TRAIN


@mistake("output_dir has a name that is too long", BOTH)
def _(scene: Scene) -> list[str]:
    return scene.run(output_dir="o" * 300)


@mistake("output_dir where nobody can write")
def _(scene: Scene) -> list[str]:
    return scene.run(output_dir="/proc/out")


@mistake("output_dir holds another's config.yaml", BOTH)
def _(scene: Scene) -> list[str]:
    scene.write("out/config.yaml", "mine: true\n")
    return TRAIN


@mistake("config.yaml in output_dir is a folder", BOTH)
def _(scene: Scene) -> list[str]:
    (scene / "out/config.yaml").mkdir(parents=True)
    return TRAIN


@mistake("config.yaml in output_dir is a pipe", BOTH)
def _(scene: Scene) -> list[str]:
    (scene / "out").mkdir()
    os.mkfifo(scene / "out/config.yaml")
    return TRAIN


@mistake("metrics.jsonl in output_dir is a folder", BOTH)
def _(scene: Scene) -> list[str]:
    scene.trained()
    (scene / "out/metrics.jsonl").unlink()
    (scene / "out/metrics.jsonl").mkdir()
    return TRAIN


@mistake("logs in output_dir is a file", BOTH)
def _(scene: Scene) -> list[str]:
    scene.write("out/logs", "x")
    return TRAIN


@mistake("tensorboard in output_dir is a file", BOTH)
def _(scene: Scene) -> list[str]:
    scene.write("out/tensorboard", "x")
    return TRAIN


@mistake("a pipe as metrics.jsonl in output_dir")
def _(scene: Scene) -> list[str]:
    scene.trained()
    (scene / "out/metrics.jsonl").unlink()
    os.mkfifo(scene / "out/metrics.jsonl")
    return TRAIN


@mistake("rows in output_dir is a file, and train.trace_rows", BOTH)
def _(scene: Scene) -> list[str]:
    scene.write("out/rows", "x")
    return scene.run(train={"trace_rows": True})


@mistake("checkpoints in output_dir is a file")
def _(scene: Scene) -> list[str]:
    scene.write("out/checkpoints", "x")
    return TRAIN


@mistake("checkpoint.folder is a file", BOTH)
def _(scene: Scene) -> list[str]:
    scene.write("file", "x")
    return scene.run(checkpoint={"folder": "file"})


@mistake("checkpoint.folder is below a file")
def _(scene: Scene) -> list[str]:
    scene.write("file", "x")
    return scene.run(checkpoint={"folder": "file/checkpoints"})


@mistake("checkpoint.folder is a pipe")
def _(scene: Scene) -> list[str]:
    os.mkfifo(scene / "pipe")
    return scene.run(checkpoint={"folder": "pipe"})


@mistake("checkpoint.folder is an address of an unknown kind")
def _(scene: Scene) -> list[str]:
    return scene.run(checkpoint={"folder": "nowhere://checkpoints"})


@mistake(".lease in output_dir is a file", BOTH)
def _(scene: Scene) -> list[str]:
    scene.write("out/.lease", "x")
    return TRAIN


@mistake("a lease that is a folder")
def _(scene: Scene) -> list[str]:
    (scene / "out/.lease/00000001.json").mkdir(parents=True)
    return TRAIN


@mistake("the output folder of another run", BOTH)
def _(scene: Scene) -> list[str]:
    scene.trained()
    return [*TRAIN, "--set", "seed=1"]


@mistake("a run whose data has changed")
def _(scene: Scene) -> list[str]:
    scene.trained()
    scene.last().unlink()
    return TRAIN


@mistake("a run whose tables have other sizes")
def _(scene: Scene) -> list[str]:
    scene.trained()
    return scene.schema(user={"kind": "sparse", "rows": 50})
