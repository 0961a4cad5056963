"""The manifest of a server of bundles: a Deployment with probes, its Service, and what keeps it up and apart."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from rechub_dist.errors import UserError
from rechub_dist.launching.kubernetes.network import CLUSTER, opening, policy
from rechub_dist.launching.kubernetes.pods import Manifest, container, metadata, of_pod, pod, selector
from rechub_dist.launching.kubernetes.settings import Settings
from rechub_dist.launching.kubernetes.view import DATA, mounts

PORT: Final = 8000
_COMPONENT: Final = "server"
_MOUNTS: Final = ("tmp", "home", "data")  # a server writes no output, and passes no tensors between processes
_LEAVING: Final = 5  # seconds in which the pod leaves the Service before its server closes the port
_OPENING: Final = 1800  # seconds that a server may take to compare large tables with their checksums


@dataclass(frozen=True)
class Bundles:
    """What is served.

    Attributes:
        named: `FOLDER` or `NAME=FOLDER`, as `rechub-dist serve` takes them: folders of the data claim, or of the image.
        token_env: variable of the Secret that has the token; None for a server that asks for none.
        watch: seconds between looks at the folders; None: never.

    Raises:
        UserError: a folder is no absolute path.
    """

    named: tuple[str, ...]
    token_env: str | None
    watch: float | None

    def __post_init__(self) -> None:
        for argument in self.named:
            if not self._folder(argument).startswith("/"):
                raise UserError(f"{argument}: write the folder as the pods see it: {DATA}/... of --data-claim")

    def in_image(self) -> list[str]:
        """The folders that are not of the data claim, so that the image must have them."""
        folders = [self._folder(argument) for argument in self.named]
        return [f for f in folders if not PurePosixPath(posixpath.normpath(f)).is_relative_to(DATA)]

    @staticmethod
    def _folder(argument: str) -> str:
        return argument.rpartition("=")[2]


def serve(settings: Settings, bundles: Bundles) -> list[Manifest]:
    """A server's Deployment, Service, PodDisruptionBudget and NetworkPolicies.

    Raises:
        UserError: a bundle lies on a claim that is not given, or the token in a Secret that is not given.
    """
    if settings.data_claim is None and len(bundles.in_image()) < len(bundles.named):
        raise UserError(f"{bundles.named[0]}: {DATA} is the data claim; give --data-claim NAME")
    if bundles.token_env is not None and settings.env_secret is None:
        raise UserError(
            f"--token-env {bundles.token_env}: comes from a Secret; give --env-secret NAME, or --no-token for a server "
            "that answers all pods of the cluster"
        )
    chosen = selector(settings, _COMPONENT)
    head = metadata(settings, _COMPONENT, settings.name)
    deployment = {
        "replicas": settings.workers,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "progressDeadlineSeconds": _OPENING + 600,
        "selector": {"matchLabels": chosen},
        "template": _template(settings, bundles),
    }
    service = {"selector": chosen, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}
    found: list[Manifest] = [
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": head, "spec": deployment},
        {"apiVersion": "v1", "kind": "Service", "metadata": head, "spec": service},
    ]
    if settings.workers > 1:
        budget = {"maxUnavailable": 1, "selector": {"matchLabels": chosen}}
        found.append({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": head, "spec": budget})
    if settings.network_policy:
        # A server asks nobody anything: volumes are mounted by the node.
        closed = {"podSelector": {"matchLabels": chosen}, "policyTypes": ["Ingress", "Egress"]}
        found.append(policy(settings, _COMPONENT, f"{settings.name}-network", closed))
        found.append(opening(settings, _COMPONENT, "http", CLUSTER, {"protocol": "TCP", "port": PORT}))
    return found


def _template(settings: Settings, bundles: Bundles) -> Manifest:
    volumes = tuple(mount for mount in mounts(settings) if mount.name in _MOUNTS)
    probe = {"periodSeconds": 10, "timeoutSeconds": 5}
    server = {
        **container(settings, "server", of_pod(settings), volumes),
        "command": ["rechub-dist"],
        "args": [
            "serve",
            *bundles.named,
            "--address=0.0.0.0",
            f"--port={PORT}",
            f"--threads={settings.threads}",
            f"--grace={settings.grace_seconds}",
            *(["--no-token"] if bundles.token_env is None else [f"--token-env={bundles.token_env}"]),
            *([] if bundles.watch is None else [f"--watch={bundles.watch:g}"]),
        ],
        "ports": [{"name": "http", "containerPort": PORT}],
        "startupProbe": _get("/ready") | {"periodSeconds": 2, "failureThreshold": _OPENING // 2},
        "readinessProbe": _get("/ready") | probe | {"failureThreshold": 2},
        "livenessProbe": _get("/health") | probe | {"failureThreshold": 6},
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(_LEAVING)]}}},
    }
    template = pod(settings, server, component=_COMPONENT, restart="Always", volumes=volumes)
    template["spec"]["terminationGracePeriodSeconds"] = _LEAVING + settings.grace_seconds + 10
    return template


def _get(path: str) -> Manifest:
    return {"httpGet": {"path": path, "port": "http"}}
