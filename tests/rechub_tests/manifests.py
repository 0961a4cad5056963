"""Rendered manifests, and what the cluster's API would say of them: unknown fields are mistakes here."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from openapi_schema_validator import OAS30Validator

ROOT = Path(__file__).parents[2]
KINDS = ("job", "jobset", "pytorchjob", "trainjob", "rayjob")
EXAMPLE = (
    "configs/runs/deepfm_synthetic.yaml", "--image", "registry.example/rechub-dist:cpu", "--name", "deepfm",
    "--output-claim", "runs", "--data-claim", "data",
    "--set", "output_dir=/runs/deepfm", "--set", "data.root=/data/synthetic",
)  # fmt: skip
K8sObject = dict[str, Any]


def run_render(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`rechub-dist k8s render` with these arguments."""
    line = [sys.executable, "-m", "rechub_dist", "k8s", "render", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)


@cache
def _rendered(arguments: tuple[str, ...]) -> str:
    done = run_render(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(kind: str, *arguments: str) -> list[K8sObject]:
    """The objects of the example run as a job of this kind."""
    return list(yaml.safe_load_all(_rendered((*EXAMPLE, "--kind", kind, *arguments))))


def by_kind(objects: list[K8sObject], kind: str) -> K8sObject:
    """The one object of a kind."""
    (found,) = [item for item in objects if item["kind"] == kind]
    return found


def pod_templates(tree: Any) -> Iterator[K8sObject]:
    """The pod templates anywhere in an object."""
    if isinstance(tree, dict):
        if "containers" in tree.get("spec", {}):
            yield tree
        for child in tree.values():
            yield from pod_templates(child)
    elif isinstance(tree, list):
        for child in tree:
            yield from pod_templates(child)


def trainer_pod(objects: list[K8sObject]) -> K8sObject:
    """The template of the pods that train."""
    component = "app.kubernetes.io/component"
    (found,) = [t for o in objects for t in pod_templates(o) if t["metadata"]["labels"][component] == "trainer"]
    return found


def core_errors(item: K8sObject) -> list[str]:
    """What is wrong with an object of Kubernetes' own."""
    try:
        kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [str(error)]
    return []


def pod_errors(template: K8sObject) -> list[str]:
    """What is wrong with a pod template, whatever object it stands in."""
    return core_errors({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template["spec"]})


def is_core(item: K8sObject) -> bool:
    return item["apiVersion"] in {"v1", "apps/v1", "batch/v1", "networking.k8s.io/v1"}


@cache
def custom_schemas() -> dict[tuple[str, str], OAS30Validator]:
    """Validators of the custom kinds whose definitions lie in the folder RECHUB_CRDS; skips where there is none."""
    folder = os.environ.get("RECHUB_CRDS")
    if folder is None:
        pytest.skip("RECHUB_CRDS names no folder of CustomResourceDefinitions")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = {}
    for file in sorted(Path(folder).glob("*.yaml")):
        for item in yaml.load_all(file.read_text(encoding="utf-8"), Loader=loader):
            if not item or item["kind"] != "CustomResourceDefinition":
                continue
            spec = item["spec"]
            for version in spec["versions"]:
                schema = _strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}  # the API server's own matter
                key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
                found[key] = OAS30Validator(schema)
    return found


def custom_errors(item: K8sObject) -> list[str]:
    """What is wrong with an object of a custom kind."""
    validator = custom_schemas()[item["apiVersion"], item["kind"]]
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(item)]


def _strict(schema: K8sObject) -> K8sObject:
    """A structural schema under which fields that the API server would drop are errors."""
    found = dict(schema)
    if found.pop("x-kubernetes-int-or-string", False):
        found.pop("type", None)
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in found:
        found["properties"] = {name: _strict(child) for name, child in found["properties"].items()}
    if isinstance(found.get("items"), dict):
        found["items"] = _strict(found["items"])
    if isinstance(found.get("additionalProperties"), dict):
        found["additionalProperties"] = _strict(found["additionalProperties"])
    elif "properties" in found and not found.get("x-kubernetes-preserve-unknown-fields"):
        found["additionalProperties"] = False
    return found


# Maps whose keys are the user's.
_FREE = {"labels", "annotations", "data", "matchLabels", "nodeSelector", "rayStartParams", "limits", "requests"}


def misspelt(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Copies of an object, in each of which the name of another field is misspelt."""
    if isinstance(tree, dict):
        for key, child in tree.items():
            yield ".".join(map(str, (*path, key))), {**{k: v for k, v in tree.items() if k != key}, f"{key}x": child}
            if key in _FREE:
                continue
            for where, changed in misspelt(child, (*path, key)):
                yield where, {**tree, key: changed}
    elif isinstance(tree, list):
        for index, child in enumerate(tree):
            for where, changed in misspelt(child, (*path, index)):
                yield where, [*tree[:index], changed, *tree[index + 1 :]]


def changed(item: K8sObject, path: list[str | int], value: Any) -> K8sObject:
    """A copy with another value at a place."""
    found = copy.deepcopy(item)
    node: Any = found
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return found
