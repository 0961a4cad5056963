"""The manifest of a server of bundles: what its pods run, see, and let in."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from typer.main import get_command

from rechub_dist.cli.main import app
from rechub_tests.manifests import by_kind, core_errors, pod_errors, pod_templates, run_render

SERVER = (
    "ctr=/data/bundles/ctr", "/data/bundles/recall", "--kind", "serve", "--image", "registry.example/rechub-dist:serve",
    "--workers", "3", "--cpu", "4", "--data-claim", "data", "--env-secret", "serving",
)  # fmt: skip
TOKEN = ("--token-env", "SERVING_TOKEN")


def rendered(*arguments: str) -> list[dict[str, Any]]:
    done = run_render(*arguments)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def test_the_api_takes_it() -> None:
    objects = rendered(*SERVER, *TOKEN)
    assert [item["kind"] for item in objects] == [
        "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "NetworkPolicy",
    ]  # fmt: skip
    assert [error for item in objects for error in core_errors(item)] == []
    assert [error for item in objects for template in pod_templates(item) for error in pod_errors(template)] == []
    assert {item["metadata"]["labels"]["app.kubernetes.io/instance"] for item in objects} == {"ctr"}


def test_the_server_reads_its_arguments() -> None:
    objects = rendered(*SERVER, *TOKEN, "--watch", "2.5", "--grace-seconds", "40")
    spec = by_kind(objects, "Deployment")["spec"]
    template = spec["template"]["spec"]
    (container,) = template["containers"]
    assert (spec["replicas"], container["command"], container["args"][0]) == (3, ["rechub-dist"], "serve")
    said = get_command(app).commands["serve"].make_context("serve", container["args"][1:]).params
    assert said["bundles"] == ["ctr=/data/bundles/ctr", "/data/bundles/recall"]
    # all addresses, since the kubelet's probes and the Service come from outside; a process counts the node's cores
    assert (said["address"], said["token_env"], said["no_token"]) == ("0.0.0.0", "SERVING_TOKEN", False)
    assert (said["threads"], said["watch"], said["grace"]) == (4, 2.5, 40)
    assert container["envFrom"] == [{"secretRef": {"name": "serving"}}]
    (port,) = container["ports"]
    assert port["containerPort"] == said["port"]
    assert by_kind(objects, "Service")["spec"]["ports"][0]["targetPort"] == port["name"]
    assert {container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "readiness")} == {"/ready"}
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    # the pod leaves the Service first, then the server finishes what it has begun
    assert template["terminationGracePeriodSeconds"] > 40 + int(container["lifecycle"]["preStop"]["exec"]["command"][1])


def test_its_pods_write_nothing_and_ask_nobody() -> None:
    objects = rendered(*SERVER, *TOKEN)
    (container,) = by_kind(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    mounted = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounted == {"/data": True, "/tmp": False, "/home/rechub": False}
    closed, opened = (item["spec"] for item in objects if item["kind"] == "NetworkPolicy")
    assert closed["policyTypes"] == ["Ingress", "Egress"]
    assert not {"ingress", "egress"} & closed.keys()
    assert opened["ingress"][0]["ports"] == [{"protocol": "TCP", "port": 8000}]
    assert not [item for item in rendered(*SERVER, *TOKEN, "--no-network-policy") if item["kind"] == "NetworkPolicy"]


def test_bundles_may_be_in_the_image() -> None:
    done = run_render("/bundles/Deep_FM", "--kind", "serve", "--image", "x", "--no-token")
    assert done.returncode == 0, done.stderr
    assert "the image must contain it" in done.stderr
    deployment = by_kind(list(yaml.safe_load_all(done.stdout)), "Deployment")
    assert deployment["metadata"]["name"] == "deep-fm"
    assert "--no-token" in deployment["spec"]["template"]["spec"]["containers"][0]["args"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((*SERVER[:2], "--kind", "serve", "--image", "x", "--no-token"), "/data is the data claim; give --data-claim"),
        (("bundles/ctr", *SERVER[2:], *TOKEN), "write the folder as the pods see it"),
        (SERVER, "name the variable of --env-secret"),
        ((*SERVER, *TOKEN, "--no-token"), "name the variable of --env-secret"),
        ((*SERVER[:-2], *TOKEN), "give --env-secret NAME"),
        ((*SERVER, *TOKEN, "--set", "a.b=c"), "--set: a server has none"),
        ((*SERVER, *TOKEN, "--max-restarts", "1"), "--max-restarts: a server has none"),
        (("run.yaml", "--kind", "job", "--image", "x", "--watch", "3"), "--watch: needs --kind serve"),
        (("run.yaml", "more.yaml", "--kind", "job", "--image", "x"), "more.yaml: a job has one run file"),
    ],
)
def test_what_cannot_be(arguments: tuple[str, ...], error: str) -> None:
    done = run_render(*arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert error in done.stderr
    assert done.stderr.count("\n") == 1
