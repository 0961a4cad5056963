"""The wheel, installed in an environment of its own and used far from any checkout.

RECHUB_WHEEL names one that is there, as `make release` does; otherwise it is built.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("rechub_dist", "launch", "configs", "pyproject.toml", "README.md", "LICENSE")
Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    if given := os.environ.get("RECHUB_WHEEL"):
        return Path(shutil.copy(given, folder))
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def run(wheel: Path) -> Run:
    """Runs a program of an environment that has the wheel, and all else from this one."""
    folder = wheel.parent / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    # Neither from the checkout nor with it on the path: what an editable install has left there counts as installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*pip, str(wheel)], check=True, cwd=folder, env=environment)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    environment |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}

    def call(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        work = wheel.parent / "work"
        work.mkdir(exist_ok=True)
        line = [str(folder / "bin" / program), *arguments]
        done = subprocess.run(line, capture_output=True, text=True, cwd=work, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return call


def test_it_holds_launch_and_configs_and_no_bytecode(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("launch", "configs"):
        files = {file.relative_to(ROOT) for file in (ROOT / folder).rglob("*") if file.is_file()}
        wanted = {f"rechub_dist/{file}" for file in files if "__pycache__" not in file.parts}
        assert len(wanted) > 20
        assert wanted <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"rechub_dist"}
    assert not [name for name in names if "__pycache__" in name]


def test_its_examples_and_commands_work(run: Run, wheel: Path) -> None:
    work = wheel.parent / "work"
    where = run("python", "-c", "import rechub_dist, sys; print(rechub_dist.__file__)").stdout
    assert where.startswith(str(wheel.parent / "venv"))
    run("rechub-dist", "data", "synthesize", "--out", "data", "--rows", "3000", "--dense", "4", "--sparse", "8")
    (work / "run.yaml").write_text(run("rechub-dist", "examples", "deepfm_synthetic").stdout)
    settings = ["--set", "data.root=data", "--set", "train.epochs=1", "--set", "data.batch_size=256"]
    run("rechub-dist", "train", "run.yaml", *settings, "--set", "output_dir=plain")
    run("rechub-dist", "ray", "train", "run.yaml", "--num-workers", "2", *settings, "--set", "output_dir=by_ray")
    scores = [
        json.loads(run("rechub-dist", "evaluate", out, "--data", "data/test", "--json").stdout)
        for out in ("plain", "by_ray")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    run("rechub-dist", "examples", "--out", "mine")
    assert (work / "mine/launch/torchrun.sh").read_text() == (ROOT / "launch/torchrun.sh").read_text()
    assert os.access(work / "mine/launch/torchrun.sh", os.X_OK)
    assert (work / "mine/launch/k8s/bases/job/manifest.yaml").exists()
    assert not list((work / "mine").rglob("*.py"))
