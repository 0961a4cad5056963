"""The kustomize bases are what the command prints, and the overlays fit them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rechub_tests.manifests import KINDS, ROOT, core_errors, custom_errors, is_core, pod_errors, pod_templates

K8S = ROOT / "launch" / "k8s"
OVERLAYS = sorted(path.parent for path in K8S.glob("overlays/*/*/kustomization.yaml"))
BASES = sorted(path.parent for path in K8S.glob("bases/*/kustomization.yaml"))
GPU = K8S / "components" / "gpu"


def kustomization(folder: Path) -> dict[str, Any]:
    found = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert isinstance(found, dict)
    return found


def base_objects(kind: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((K8S / "bases" / kind / "manifest.yaml").read_text()))


def test_the_bases_are_what_the_command_prints(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(["bash", K8S / "render_bases.sh", tmp_path], env=environment, check=True)
    assert sorted(path.name for path in BASES) == sorted(KINDS)
    for kind in KINDS:
        rendered, kept = tmp_path / "bases" / kind / "manifest.yaml", K8S / "bases" / kind / "manifest.yaml"
        assert rendered.read_text() == kept.read_text(), f"run launch/k8s/render_bases.sh: {kept}"


def test_every_kind_has_its_overlays() -> None:
    assert {(path.parent.name, path.name) for path in OVERLAYS} == {
        (on, kind) for on in ("cpu", "gpu") for kind in KINDS
    }


@pytest.mark.parametrize("folder", [*OVERLAYS, *BASES], ids=lambda path: str(path.relative_to(K8S)))
def test_what_a_kustomization_names_exists(folder: Path) -> None:
    tree = kustomization(folder)
    assert tree.keys() <= {"resources", "components", "images"}
    for name in [*tree["resources"], *tree.get("components", [])]:
        target = folder / name
        assert target.is_file() or (target / "kustomization.yaml").is_file(), target
    if folder in OVERLAYS:
        (base,) = tree["resources"]
        assert (folder / base).resolve() == K8S / "bases" / folder.name
        containers = [c for o in base_objects(folder.name) for t in pod_templates(o) for c in t["spec"]["containers"]]
        assert {c["image"] for c in containers} == {image["name"] for image in tree["images"]}


def test_the_gpu_patches_fit_the_bases() -> None:
    patched = set()
    for patch in kustomization(GPU)["patches"]:
        (target,) = [item for kind in KINDS for item in base_objects(kind) if item["kind"] == patch["target"]["kind"]]
        patched.add(target["kind"])
        for operation in yaml.safe_load(patch["patch"]):
            assert operation["op"] == "add"
            node: Any = target
            for part in operation["path"].split("/")[1:-1]:
                node = node[int(part)] if isinstance(node, list) else node[part]
            assert isinstance(node, dict)
    assert patched == {"Job", "JobSet", "PyTorchJob", "TrainingRuntime", "RayJob"}


def test_the_gpu_patch_of_the_ray_command_is_the_bases_with_a_gpu() -> None:
    (patch,) = [p["patch"] for p in kustomization(GPU)["patches"] if p["target"]["kind"] == "RayJob"]
    (value,) = [o["value"] for o in yaml.safe_load(patch) if o["path"] == "/spec/entrypoint"]
    (job,) = [item for item in base_objects("rayjob") if item["kind"] == "RayJob"]
    assert value.replace(" --gpus-per-worker 1", "") == job["spec"]["entrypoint"]


def built(folder: Path) -> list[dict[str, Any]]:
    """What kustomize makes of a folder."""
    for command in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(command[0]):
            done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=True)
            return list(yaml.safe_load_all(done.stdout))
    pytest.skip("needs kustomize or kubectl")


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda path: str(path.relative_to(K8S)))
def test_overlays_build(folder: Path) -> None:
    objects = built(folder)
    templates = [template for item in objects for template in pod_templates(item)]
    assert not [error for item in objects if is_core(item) for error in core_errors(item)]
    assert not [error for template in templates for error in pod_errors(template)]
    tag = {"cpu": "cpu", "gpu": "cuda"}[folder.parent.name]
    assert {c["image"] for t in templates for c in t["spec"]["containers"]} == {f"registry.example/rechub-dist:{tag}"}
    with_gpus = [
        template["metadata"]["labels"]["app.kubernetes.io/component"]
        for template in templates
        if "nvidia.com/gpu" in template["spec"]["containers"][0]["resources"]["limits"]
    ]
    assert with_gpus == (["trainer"] if tag == "cuda" else [])


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda path: str(path.relative_to(K8S)))
def test_overlays_build_valid_custom_objects(folder: Path) -> None:
    assert not [error for item in built(folder) if not is_core(item) for error in custom_errors(item)]
