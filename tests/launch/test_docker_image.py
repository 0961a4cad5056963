"""What the image is made from; with an engine at hand, the image itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from rechub_dist.launching.kubernetes.kinds import RAY_VERSION
from rechub_tests.manifests import ROOT, render, trainer_pod

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()


def pins(accelerator: str) -> dict[str, str]:
    """The version of each package in an image."""
    return pinned((DOCKER / "requirements.txt").read_text() + (DOCKER / f"requirements-{accelerator}.txt").read_text())


def server_pins() -> dict[str, str]:
    """The same of the image that serves."""
    return pinned((DOCKER / "requirements-serve.txt").read_text())


def pinned(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "-r "))]
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines), "a package stands twice"
    return found


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_the_pins_are_what_the_project_asks_for(accelerator: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    torchrec = [need for need in extras["cuda"] if need.startswith("torchrec")]
    assert torchrec
    also = [need for extra in ("ray", "export", "index") for need in extras[extra]]
    wanted = [*project["project"]["dependencies"], *extras[accelerator], *torchrec, *also]
    found = pins(accelerator)
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(found[requirement.name], prereleases=True), requirement
    assert found["ray"] == RAY_VERSION


def test_the_server_has_what_it_needs_and_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    found = server_pins()
    lean = {Requirement(need).name for need in project["dependencies"]} & found.keys()
    assert {"numpy", "pyarrow", "pydantic", "duckdb", "typer"} <= lean
    named = [need for need in project["dependencies"] if Requirement(need).name in lean]
    for requirement in map(Requirement, [*named, *extras["serve"], *extras["index"]]):
        assert requirement.specifier.contains(found[requirement.name], prereleases=True), requirement
    assert not {"torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "ray", "tensorboard"} & found.keys()
    trained = pins("cpu")
    assert {name: trained[name] for name in found.keys() & trained.keys()} == {
        name: found[name] for name in found.keys() & trained.keys()
    }


@pytest.mark.parametrize("accelerator", ["cpu", "cuda", "serve", "tools"])
def test_what_is_installed_has_hashes(accelerator: str) -> None:
    text = (DOCKER / f"requirements-{accelerator}.lock").read_text()
    assert "//" not in text  # where it came from is nobody's business
    blocks = re.findall(r"^([^\s#]+)==([^\s]+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.MULTILINE)
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", " "))]
    assert len(blocks) == len(lines), "each with a hash"
    if accelerator != "tools":
        wanted = server_pins() if accelerator == "serve" else pins(accelerator)
        assert {name: version for name, version, _ in blocks} == wanted, "run docker/lock.sh"
    installs = [line for line in DOCKERFILE.splitlines() if "pip install" in line and " . " not in line]
    assert all("--require-hashes" in line for line in installs), installs


def test_the_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {source for line in copies for source in line.split()}
    assert "rechub_dist" in sources
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(Path(source).match(pattern) for pattern in kept), source


def test_signals_reach_torchrun_and_pods_name_the_same_user() -> None:
    assert 'ENTRYPOINT ["torchrun"]' in DOCKERFILE
    (user,) = set(re.findall(r"^USER (\d+):\1$", DOCKERFILE, re.MULTILINE))
    template = trainer_pod(render("job"))
    assert template["spec"]["securityContext"]["runAsUser"] == int(user)
    home = re.search(r"HOME=(\S+)", DOCKERFILE)
    assert home is not None
    assert home[1] in {mount["mountPath"] for mount in template["spec"]["containers"][0]["volumeMounts"]}


def test_the_trial_of_two_workers_has_its_rendezvous_store_at_the_first() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    for worker in ("worker-0", "worker-1"):
        assert "--rdzv-endpoint=worker-0:29400" in services[worker]["command"]
        assert services[worker]["read_only"] is True
        assert services[worker]["init"] is True
        assert services[worker]["depends_on"] == {"data": {"condition": "service_completed_successfully"}}
    assert "tensorboard" in services


@pytest.mark.slow
def test_two_containers_train_together() -> None:
    engine = os.environ.get("RECHUB_ENGINE")
    if engine is None:
        pytest.skip("RECHUB_ENGINE names no container engine: docker or podman")
    assert shutil.which(engine), engine
    done = subprocess.run(["bash", DOCKER / "build_and_try.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "both workers are done" in done.stdout
