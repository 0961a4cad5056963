"""The NetworkPolicies of a run: whom its pods talk to, and who may talk to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlsplit

from rechub_dist.config import RunConfig
from rechub_dist.data.places import places
from rechub_dist.launching.kubernetes.pods import Manifest, metadata, selector
from rechub_dist.launching.kubernetes.run_file import metrics_ports
from rechub_dist.launching.kubernetes.settings import Settings
from rechub_dist.launching.kubernetes.view import RAY_DASHBOARD, TENSORBOARD_PORT

# Policies see the port of the pod behind a Service: OpenShift's name servers listen on 5353.
_DNS: Final = [{"protocol": kind, "port": port} for port in (53, 5353) for kind in ("UDP", "TCP")]
_HTTP: Final = (443, 80)
# Any pod of any namespace, and nothing from outside the cluster.
CLUSTER: Final[list[Manifest]] = [{"namespaceSelector": {}}]
# It asks the head of a RayJob how the job is doing.
_KUBERAY: Final[list[Manifest]] = [
    {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
]


def policies(kind: str, settings: Settings, config: RunConfig) -> list[Manifest]:
    """The NetworkPolicies of a job of this kind (a key of `kinds.KINDS`).

    The pods of a run talk to each other on any port: gloo and NCCL choose theirs. They reach name servers and, on the
    ports of `storage_ports`, anything. Others reach only what is for others, from within the cluster: metrics,
    TensorBoard, and Ray's dashboard for KubeRay's operator.
    """
    run = {"matchLabels": selector(settings)}
    own = [{"podSelector": run}]
    spec = {
        "podSelector": run,
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": own}],
        "egress": [
            {"to": own},
            {"ports": _DNS},
            {"ports": [{"protocol": "TCP", "port": port} for port in storage_ports(settings, config)]},
        ],
    }
    found = [policy(settings, "network", settings.name, spec)]
    metrics = metrics_ports(config, settings.nproc_per_node)
    if metrics:
        ports = {"protocol": "TCP", "port": metrics[0], "endPort": metrics[-1]}
        found.append(opening(settings, "trainer", "metrics", CLUSTER, ports))
    if settings.tensorboard:
        ports = {"protocol": "TCP", "port": TENSORBOARD_PORT}
        found.append(opening(settings, "tensorboard", "tensorboard", CLUSTER, ports))
    if kind == "rayjob":
        ports = {"protocol": "TCP", "port": RAY_DASHBOARD}
        found.append(opening(settings, "head", "dashboard", _KUBERAY, ports))
    return found


def storage_ports(settings: Settings, config: RunConfig) -> list[int]:
    """The TCP ports on which pods reach storage: HTTP's, those that the run file names, and `--egress-port`."""
    return list(dict.fromkeys((*_HTTP, *_named_ports(config), *settings.egress_ports)))


def _named_ports(config: RunConfig) -> Iterator[int]:
    stores = (config.data.storage.endpoint, config.checkpoint_storage.endpoint)
    for address in (*stores, *(place.address for place in places(config))):
        if address is not None and "://" in address:
            try:
                port = urlsplit(address).port
            except ValueError:  # no number: a bucket's name, say
                continue
            if port is not None:
                yield port


def opening(settings: Settings, component: str, name: str, source: list[Manifest], ports: dict[str, Any]) -> Manifest:
    """A policy that lets others in to the pods of one component. Policies add up."""
    spec = {
        "podSelector": {"matchLabels": selector(settings, component)},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": source, "ports": [ports]}],
    }
    return policy(settings, component, f"{settings.name}-{name}", spec)


def policy(settings: Settings, component: str, name: str, spec: Manifest) -> Manifest:
    """A NetworkPolicy."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(settings, component, name),
        "spec": spec,
    }
