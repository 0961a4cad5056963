"""Which releases belong together, and what the command says where they do not, in environments with other packages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

from rechub_dist.builds import RELEASES, TORCH, requirements
from rechub_dist.errors import UserError
from rechub_tests.makefile import make

ROOT = Path(__file__).parents[2]
RELEASE = RELEASES[".".join(TORCH.split(".")[:2])]


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder of installed packages: what is needed to start the command, and none of the three."""
    out = tmp_path / "packages"
    out.mkdir()
    three = re.compile(r"(torch|torchrec|fbgemm_gpu|fbgemm_gpu_cpu|functorch|torchgen)(-.*)?", re.IGNORECASE)
    for folder in (Path(folder) for folder in sys.path if Path(folder).name == "site-packages"):
        for entry in folder.iterdir():
            if not three.fullmatch(entry.name) and entry.suffix != ".pth" and not (out / entry.name).exists():
                (out / entry.name).symlink_to(entry)
    return out


def install(packages: Path, name: str, version: str) -> None:
    """As far as metadata go: the check must come before anything is imported."""
    folder = packages / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def command(packages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with these packages alone."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{packages}"}
    line = [sys.executable, "-S", "-m", "rechub_dist", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=packages.parent, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "run.yaml"],
        ["evaluate", "out", "--data", "test"],
        ["predict", "out", "--data", "test", "--out", "predictions"],
        ["ray", "train", "run.yaml"],
        ["ray", "tune", "run.yaml", "--space", "space.yaml"],
        ["models", "DIN"],
    ],
)
def test_what_is_missing_is_one_line(packages: Path, arguments: list[str]) -> None:
    done = command(packages, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: torch is not installed: pip install torch=={TORCH}, and then pip install")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("installed", "told"),
    [
        (
            {"torch": TORCH},
            f"error: torchrec and fbgemm: not installed; for torch {TORCH}: pip install 'fbgemm-gpu-cpu==",
        ),
        ({"torch": TORCH, "fbgemm-gpu-cpu": f"{RELEASE}.0"}, f"error: torchrec: not installed; for torch {TORCH}: "),
        ({"torch": TORCH, "torchrec": f"{RELEASE}.0"}, f"error: fbgemm: not installed; for torch {TORCH}: "),
        (
            {"torch": "2.11.0+cpu", "torchrec": "1.6.1", "fbgemm-gpu-cpu": "1.8.0"},
            "error: fbgemm-gpu-cpu 1.8.0 does not match torch 2.11.0+cpu, which needs 1.6: pip install",
        ),
        (
            {"torch": "2.13.1", "torchrec": "1.9.2", "fbgemm-gpu": "1.8.0"},
            "error: torchrec 1.9.2 does not match torch 2.13.1, which needs 1.8: pip install",
        ),
        ({"torch": "2.2.0"}, "error: torch 2.2.0: no matching releases of torchrec and fbgemm are known; "),
        (
            {"torch": TORCH, "torchrec": f"{RELEASE}.0", "fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"},
            "error: fbgemm-gpu and fbgemm-gpu-cpu are both installed and overwrite each other's files: pip uninstall",
        ),
    ],
)
def test_what_does_not_match_is_refused(packages: Path, installed: dict[str, str], told: str) -> None:
    for name, version in installed.items():
        install(packages, name, version)
    done = command(packages, "train", "run.yaml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(told)


def test_what_needs_none_of_them_works(packages: Path) -> None:
    for entry in Path(torch.__file__).parents[1].glob("torch*"):
        if re.fullmatch(r"(torch|torchgen)(-.*)?", entry.name):
            (packages / entry.name).symlink_to(entry)
    done = command(packages, "--version")
    installed = re.escape(metadata.version("torch"))
    assert re.fullmatch(rf"rechub-dist \S+ \(Python [\d.]+, torch {installed}\)\n", done.stdout), done.stderr
    for arguments in (["--help"], ["examples"], ["data", "prepare"], ["ray", "train", "--help"], ["train", "--help"]):
        assert command(packages, *arguments).returncode == 0, arguments


def test_a_matching_torchrec_is_asked_for() -> None:
    """The same releases stand in the project's extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"torch=={TORCH}" in project["dependencies"]
    extras = project["optional-dependencies"]
    assert extras["cpu"] == [f"fbgemm-gpu-cpu=={RELEASE}.0"]
    assert extras["cuda"] == [f"fbgemm-gpu=={RELEASE}.0", f"torchrec=={RELEASE}.0"]


def of_the_three(extra: str, release: str) -> list[str]:
    wanted = requirements(ROOT / "pyproject.toml", release, [extra, "dev"])
    assert {"torchmetrics==1.0.3", "pytest>=8"} <= set(wanted)
    return sorted(need for need in wanted if re.match(r"torch(rec)?\b|fbgemm", need))


def test_make_takes_another_release_with_what_belongs_to_it() -> None:
    assert of_the_three("cpu", "2.13") == [f"fbgemm-gpu-cpu=={RELEASE}.0", f"torch=={TORCH}", f"torchrec=={RELEASE}.0"]
    assert of_the_three("cuda", "2.13") == [f"fbgemm-gpu=={RELEASE}.0", f"torch=={TORCH}", f"torchrec=={RELEASE}.0"]
    assert of_the_three("cpu", "2.14") == ["fbgemm-gpu-cpu==1.9.*", "torch==2.14.*", "torchrec==1.9.*"]
    assert of_the_three("cuda", "2.11") == ["fbgemm-gpu==1.6.*", "torch==2.11.*", "torchrec==1.6.*"]
    with pytest.raises(UserError, match="cpuu: no such extra, did you mean 'cpu'"):
        requirements(ROOT / "pyproject.toml", "2.13", ["cpuu"])


def make_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    return make(f"PYTHON={sys.executable}", *arguments, folder=ROOT)  # of two, the last counts


def test_make_refuses_a_release_that_it_does_not_know(tmp_path: Path) -> None:
    done = make_here("install", "TORCH=2.9", f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 2
    told, of_make = done.stderr.splitlines()
    assert told == "error: TORCH=2.9: unknown release, write one of 2.11, 2.12, 2.13, 2.14"
    assert of_make.startswith("make: ***")


def test_an_environment_is_of_one_release(tmp_path: Path) -> None:
    """Another one sets it up anew; the usual one, named or not, is the same."""
    (tmp_path / f".installed-{TORCH.rpartition('.')[0]}-cpu-dev,ray").touch()
    for named, up_to_date in (("", True), ("TORCH=2.13", True), ("TORCH=2.14", False), ("ACCELERATOR=cuda", False)):
        done = make_here("--question", "install", f"VENV={tmp_path}", *([named] if named else []))
        assert (done.returncode == 0) is up_to_date, (named, done.stderr)


def test_make_compat_is_for_each_release_or_for_one() -> None:
    def environments(*arguments: str) -> list[str]:
        found = re.findall(r"(\.venv-\S+)/bin/python -m pytest", make_here("--dry-run", "compat", *arguments).stdout)
        return list(dict.fromkeys(found))

    assert environments() == [".venv-torch-2.11", ".venv-torch-2.13", ".venv-torch-2.14"]
    assert environments("TORCH=2.12") == [".venv-torch-2.12"]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert environments(f"PYTHON={version}") == [f".venv-{version}"]
