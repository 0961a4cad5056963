"""Mistakes in commands on runs that were trained."""

from __future__ import annotations

import json
import os

from mistaken.of_checkpoints import HOSTILE, each_file, flip, hostile
from mistaken.scene import BOTH, ONE, Scene, Section
from rechub_dist.checkpoint.manifest import MANIFEST

COMMANDS = Section("Commands on runs")
command = COMMANDS.mistake
EVALUATE = ["evaluate", "out", "--data", "data/test"]
PREDICT = ["predict", "out", "--data", "data/test", "--out", "predictions"]


@command("`evaluate` of a folder without checkpoints")
def _(scene: Scene) -> list[str]:
    (scene / "out").mkdir()
    return EVALUATE


@command("`evaluate` of a damaged run", BOTH)
def _(scene: Scene) -> list[str]:
    each_file(scene, "rank-00000-*", flip)
    return EVALUATE


@command("`evaluate` of one checkpoint")
def _(scene: Scene) -> list[str]:
    step = scene.checkpoints()[-1]
    return ["evaluate", str(step.relative_to(scene.folder)), "--data", "data/test"]


@command("`evaluate` on data that is not there")
def _(scene: Scene) -> list[str]:
    scene.trained()
    return ["evaluate", "out", "--data", "nowhere"]


@command("`evaluate` on a CSV file", BOTH)
def _(scene: Scene) -> list[str]:
    scene.trained()
    scene.write("test.csv", "user,item\n1,2\n")
    return ["evaluate", "out", "--data", "test.csv"]


@command("`evaluate` with an unknown metric")
def _(scene: Scene) -> list[str]:
    scene.trained()
    return [*EVALUATE, "--metric", "acu"]


@command("`evaluate` of a run with code of its own")
def _(scene: Scene) -> list[str]:
    hostile(HOSTILE["code of its own"])(scene)
    return EVALUATE


@command("`predict` of a column that is not there", BOTH)
def _(scene: Scene) -> list[str]:
    scene.trained()
    return [*PREDICT, "--keep", "usr"]


@command("`predict` into its input", BOTH)
def _(scene: Scene) -> list[str]:
    scene.trained()
    return ["predict", "out", "--data", "data/test", "--out", "data/test"]


@command("`predict` into a file")
def _(scene: Scene) -> list[str]:
    scene.trained()
    scene.write("predictions", "x")
    return PREDICT


@command("`predict` into a folder that holds something else")
def _(scene: Scene) -> list[str]:
    scene.trained()
    scene.write("predictions/mine.txt", "x")
    return PREDICT


@command("`predict` into a folder whose mark is a pipe")
def _(scene: Scene) -> list[str]:
    scene.trained()
    (scene / "predictions").mkdir()
    os.mkfifo(scene / "predictions/_rechub_dist.json")
    return PREDICT


@command("`predict` into a folder with a mark of another kind")
def _(scene: Scene) -> list[str]:
    scene.trained()
    scene.write("predictions/_rechub_dist.json", json.dumps({"writer": "rechub_dist", "kind": "x", "files": {}}))
    return PREDICT


@command("`predict` into a folder with a mark whose files are a number")
def _(scene: Scene) -> list[str]:
    scene.trained()
    scene.write("predictions/_rechub_dist.json", '{"writer": "rechub_dist", "kind": "predictions", "files": 7}')
    return PREDICT


@command("`checkpoint list` of a folder without any")
def _(_: Scene) -> list[str]:
    return ["checkpoint", "list", "data"]


@command("`checkpoint inspect` of a step that is not there")
def _(scene: Scene) -> list[str]:
    scene.trained()
    return ["checkpoint", "inspect", "out", "--step", "77"]


@command("`checkpoint verify` of a pipe as manifest")
def _(scene: Scene) -> list[str]:
    path = scene.checkpoints()[-1] / MANIFEST
    path.unlink()
    os.mkfifo(path)
    return ["checkpoint", "verify", str(path.parent.relative_to(scene.folder))]


@command("`checkpoint verify` of a flipped bit")
def _(scene: Scene) -> list[str]:
    each_file(scene, "rank-00000-*", flip)
    return ["checkpoint", "verify", "out"]


@command("`checkpoint verify` of a manifest that is a folder")
def _(scene: Scene) -> list[str]:
    (scene / "step-0000000004" / MANIFEST).mkdir(parents=True)
    return ["checkpoint", "verify", "step-0000000004"]


@command("`checkpoint verify` with settings that are none")
def _(scene: Scene) -> list[str]:
    scene.trained()
    return ["checkpoint", "verify", "out", "--storage", "{regoin: x}"]


@command("`checkpoint consolidate` over another file")
def _(scene: Scene) -> list[str]:
    scene.trained()
    scene.write("model.safetensors", "mine")
    return ["checkpoint", "consolidate", "out", "--out", "model.safetensors"]


@command("`checkpoint consolidate` to an address")
def _(scene: Scene) -> list[str]:
    scene.trained()
    return ["checkpoint", "consolidate", "out", "--out", "s3://bucket/model.safetensors"]


@command("`checkpoint diff` with a run that is not there")
def _(scene: Scene) -> list[str]:
    scene.trained()
    return ["checkpoint", "diff", "out", "other"]


@command("`models` of an unknown model")
def _(_: Scene) -> list[str]:
    return ["models", "DeepFn"]


@command("`examples` of an unknown name")
def _(_: Scene) -> list[str]:
    return ["examples", "deepfn"]


@command("`k8s render` of a run file that is not there")
def _(_: Scene) -> list[str]:
    return ["k8s", "render", "rum.yaml", "--kind", "job", "--workers", "2", "--image", "x"]


@command("`train --nnodes two`")
def _(_: Scene) -> list[str]:
    return ["train", "run.yaml", "--nnodes", "two"]


COMMANDS.table(
    ("an unknown command", ONE, lambda _: ["trian", "run.yaml"]),
    ("`train` without a run file", ONE, lambda _: ["train"]),
    ("`train` with an unknown option", ONE, lambda _: ["train", "run.yaml", "--nprocs", "2"]),
    ("`train --nproc two`", ONE, lambda _: ["train", "run.yaml", "--nproc", "two"]),
    ("`predict --top-k 0`", ONE, lambda _: ["predict", "out", "--data", "data/test", "--out", "p", "--top-k", "0"]),
)
