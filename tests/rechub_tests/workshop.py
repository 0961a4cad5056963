"""A folder with what the pages of the documentation speak of: tables, data sets, run files, runs and bundles."""

from __future__ import annotations

import contextlib
import gzip
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rechub_dist.assembly.first_run import run_on
from rechub_dist.data.importing.frames import prepare
from rechub_dist.data.prepare import preparation
from rechub_dist.data.prepare.synthetic import synthesize
from rechub_dist.embedded import Jagged
from rechub_dist.inference.bundle.deltas import read_state
from rechub_dist.inference.export import export_bundle, export_delta
from rechub_dist.inference.run import load
from rechub_tests.blocks import ROOT, blocks
from rechub_tests.raw import write_raw
from rechub_tests.runs import train
from rechub_tests.shop import DSSM, import_shop, trained

USERS, MOVIES = 120, 80


def make_workshop(folder: Path) -> None:
    """Fill a new folder."""
    folder.mkdir(parents=True)
    for name in ("benchmarks", "configs", "docs", "examples", "launch", "pyproject.toml", "tests"):
        (folder / name).symlink_to(ROOT / name)
    programs(folder)
    with contextlib.chdir(folder):
        _tables()
        _data_sets()
        _runs()
        _bundles()


def programs(folder: Path) -> None:
    """`rechub-dist` and `python`, of this environment, in `bin` and `.venv/bin`."""
    (folder / ".venv").mkdir()
    for bin_ in (folder / "bin", folder / ".venv" / "bin"):
        bin_.mkdir()
        for name, module in (("rechub-dist", "-m rechub_dist"), ("python", "")):
            (bin_ / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
            (bin_ / name).chmod(0o755)


def _tables() -> None:
    """Ratings and movies as docs/start.md makes them up, MovieLens' own files, and a log in Criteo's format."""
    script = re.search(r"<<'PYTHON'\n(.*?)PYTHON\n", blocks("docs/start.md")[0].text, re.DOTALL)
    assert script is not None
    subprocess.run([sys.executable, "-c", script[1]], check=True)
    draw = random.Random(0)
    source = Path("ml-1m")
    source.mkdir()
    likes = [[1, 2] if m % 2 else [4, 5] for m in range(MOVIES)]
    rows = [
        f"{u}::{m}::{draw.choice(likes[m] if draw.random() < 0.8 else [1, 5])}::{9 * 10**8 + u}"
        for u in range(USERS)
        for m in range(u % 7, MOVIES, 7)
    ]
    (source / "ratings.dat").write_text("\n".join(rows) + "\n")
    people = [f"{u}::{'FM'[u % 2]}::{draw.choice([18, 25, 56])}::{u % 20}::1000{u % 10}" for u in range(USERS)]
    (source / "users.dat").write_text("\n".join(people) + "\n")
    films = [f"{m}::Film {m} ({1960 + m % 40})::{draw.choice(['Drama|War', 'Comedy'])}" for m in range(MOVIES)]
    (source / "movies.dat").write_text("\n".join(films) + "\n")
    clicks = (
        [
            str(draw.randint(0, 1)),
            *(str(draw.randint(0, 9)) for _ in range(13)),
            *(f"{draw.randrange(40):08x}" for _ in range(26)),
        ]
        for _ in range(600)
    )
    Path("day_0.gz").write_bytes(gzip.compress("".join("\t".join(row) + "\n" for row in clicks).encode()))


def _data_sets() -> None:
    preparation("movielens_1m_ctr").prepare(Path("ml-1m"), Path("data/movielens_1m_ctr"))
    write_raw(Path("data/mine"), {"train": 900, "valid": 120, "test": 120})
    synthesize(Path("data/synthetic"), 12_000, dense=4, sparse=8, vocabulary=1000)
    import_shop(Path("data/shop"))
    shutil.copytree("data/mine", "data/raw")
    Path("data/raw/dataset.yaml").unlink()
    Path("data/test").symlink_to("movielens_1m_ctr/test")
    Path("data/now").symlink_to("shop/now")


def _runs() -> None:
    """The README's run file, as `run.yaml` and `RUN.yaml`, and runs of it under the names that pages give them."""
    [run] = [block.text for block in blocks("README.md") if block.language == "yaml"]
    for whole, part in (("epochs: 20", "epochs: 4"), ("batch_size: 2048", "batch_size: 64")):
        assert run.count(whole) == 1
        run = run.replace(whole, part)
    Path("run.yaml").write_text(run)
    Path("RUN.yaml").write_text(run.replace("runs/deepfm", "runs/launched"))
    train(Path("run.yaml"))
    for name in ("a", "b", "dcnv2"):
        shutil.copytree("runs/deepfm", f"runs/{name}")
    trained(Path("runs/dssm-run"), Path("data/shop"), DSSM)
    Path("runs/dssm").symlink_to("dssm-run/out")


def _bundles() -> None:
    for name in ("deepfm", "dssm"):
        export_bundle(f"runs/{name}", Path("bundles") / name)
    shutil.copytree("bundles/dssm", "bundles/sasrec")
    days: list[Path] = []
    for day in (Path("deltas/monday"), Path("deltas/tuesday")):
        export_delta("runs/deepfm", day, read_state(Path("bundles/deepfm"), days))
        days.append(day)


def _torch_rechub() -> None:
    """Weights of torch-rechub with the run file for them."""
    golden = ROOT / "tests" / "golden" / "torch_rechub"
    shutil.copy(golden / "deepfm" / "weights.pth", "model.pth")
    shutil.copy(golden / "dataset.yaml", "dataset.yaml")
    run = (golden / "deepfm" / "run.yaml").read_text()
    Path("run.yaml").write_text(run.replace("../dataset.yaml", "dataset.yaml"))


def _taste() -> None:
    """A run over the rows that docs/export.md scores."""
    rng = np.random.default_rng(0)
    log = pa.table(
        {
            "user_id": [f"u{i}" for i in rng.integers(0, 30, 600)],
            "age": rng.integers(18, 80, 600),
            "genres": [["Drama|Crime", "Comedy", "War|Drama"][i] for i in rng.integers(0, 3, 600)],
            "like": rng.integers(0, 2, 600),
        }
    )
    shutil.rmtree("runs/deepfm")
    shutil.rmtree("bundles/deepfm")
    prepare("data/taste", log=log, labels=("like",))
    Path("taste.yaml").write_text(run_on("data/taste", "DeepFM", "runs/deepfm"))
    train(Path("taste.yaml"), ["train.epochs=1"])


def _type(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "rechub_dist", *arguments], check=True)


# what a page alone supposes: changes the folder that one is in
STAGES: dict[str, Callable[[], None]] = {
    "docs/convert.md": _torch_rechub,
    "docs/export.md": _taste,
    "docs/optimization.md": lambda: shutil.rmtree("runs/deepfm"),
    "docs/serving.md": lambda: _type("publish", "runs/deepfm", "--to", "published/deepfm"),
}


def scope(page: str) -> dict[str, Any]:
    """The variables that a page's Python takes as given."""
    if page != "docs/checkpoints.md":
        return {}
    model = load("runs/deepfm").parts.train_module.model
    return {
        "model": model,
        "ids": {one.feature.name: Jagged.single(torch.tensor([0, 1])) for one in model.lookups()},
        "dense": {},
    }
