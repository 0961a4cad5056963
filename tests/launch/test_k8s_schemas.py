"""Every manifest is what the cluster's schemas ask for, to the last field."""

from __future__ import annotations

import pytest

from rechub_tests.manifests import (
    KINDS,
    changed,
    core_errors,
    custom_errors,
    is_core,
    misspelt,
    pod_errors,
    pod_templates,
    render,
    trainer_pod,
)

VARIANTS = {
    "plain": (),
    "everything": (
        "--workers", "3", "--gpus-per-worker", "2", "--tensorboard", "--namespace", "recommenders",
        "--node-selector", "pool=gpu", "--spread", "required", "--service-account", "trainer",
        "--env-secret", "store", "--ttl-seconds", "3600", "--egress-port", "9000",
        "--set", "monitor.metrics_port=9400",
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_core_objects_and_pods_are_valid(kind: str, variant: str) -> None:
    objects = render(kind, *VARIANTS[variant])
    assert [core_errors(item) for item in objects if is_core(item)] == [[] for item in objects if is_core(item)]
    templates = [template for item in objects for template in pod_templates(item)]
    assert templates
    assert [pod_errors(template) for template in templates] == [[] for _ in templates]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "job"])
def test_custom_objects_are_valid(kind: str, variant: str) -> None:
    found = [custom_errors(item) for item in render(kind, *VARIANTS[variant]) if not is_core(item)]
    assert found
    assert not any(found), found


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "job"])
def test_a_misspelt_field_of_a_custom_object_is_caught(kind: str) -> None:
    for item in render(kind, "--workers", "2"):
        if is_core(item):
            continue
        # The names of replicas are free as far as the schema goes, and metadata is the API server's own matter.
        free = {"pytorchReplicaSpecs.Worker"}
        cases = [
            (where, wrong) for where, wrong in misspelt(item["spec"]) if "metadata" not in where and where not in free
        ]
        assert len(cases) > 4
        missed = [where for where, wrong in cases if not custom_errors({**item, "spec": wrong})]
        assert not missed, missed


@pytest.mark.parametrize("kind", KINDS)
def test_a_misspelt_field_of_a_core_object_is_caught(kind: str) -> None:
    objects = render(kind, "--tensorboard")
    template = trainer_pod(objects)
    for path in (
        ["volumes", 0, "configMapp"],
        ["terminationGracePeriod"],
        ["containers", 0, "securityContext", "user"],
    ):
        assert pod_errors({"spec": changed(template["spec"], path, {})}), path
    for item in objects:
        if is_core(item):
            assert core_errors({**item, "spek": {}}), item["kind"]
