"""The training pod, which all kinds of job share, and the TensorBoard pod."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from rechub_dist.config import RunConfig
from rechub_dist.distributed.process import LAUNCH, PREEMPTED
from rechub_dist.launching.kubernetes.run_file import metrics_ports
from rechub_dist.launching.kubernetes.settings import Settings, Size
from rechub_dist.launching.kubernetes.view import (
    HOME,
    RAY_AGENT,
    RAY_DASHBOARD,
    RUN_FILE,
    RUNS,
    TENSORBOARD_PORT,
    USER,
    Mount,
    mounts,
)

Manifest = dict[str, Any]

_JOIN_SECONDS = 1800  # nodes may have to start and pull images
_JOB_UID = "metadata.labels['batch.kubernetes.io/controller-uid']"
_SPREAD = ("trainer", "server")  # components whose pods are many, and choose their nodes
_HARDENED: Manifest = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}


def metadata(settings: Settings, component: str, name: str) -> Manifest:
    """The `metadata` of an object: name, namespace and labels."""
    place = {} if settings.namespace is None else {"namespace": settings.namespace}
    return {"name": name, **place, "labels": labels(settings, component)}


def labels(settings: Settings, component: str) -> dict[str, str]:
    """The labels of an object."""
    return {"app.kubernetes.io/name": "rechub-dist", **selector(settings, component)}


def selector(settings: Settings, component: str | None = None) -> dict[str, str]:
    """The labels that select a run's pods: all, or those of a component. KubeRay replaces the name label."""
    part = {} if component is None else {"app.kubernetes.io/component": component}
    return {"app.kubernetes.io/instance": settings.name, **part}


def train(settings: Settings, rendezvous: str) -> list[str]:
    """The arguments of `rechub-dist` in a training pod.

    We run our agent instead of the torchrun command, which always exits with 1: the exit code must distinguish a user's
    mistake and a pod that saved on request from a failure.
    """
    return [
        "train",
        RUN_FILE,
        f"--nnodes={settings.workers}",
        f"--nproc={settings.nproc_per_node}",
        f"--rdzv={rendezvous}",
        f"--rdzv-id={settings.name}",
        f"--join={_JOIN_SECONDS}",
        f"--max-restarts={settings.max_restarts}",
        f"--grace={settings.grace_seconds}",
        *(["--take-over"] if settings.take_over else []),
    ]


def trainer(settings: Settings, config: RunConfig, name: str, arguments: list[str]) -> Manifest:
    """The training container, running the agent directly, since a shell would not forward signals."""
    found = {
        **container(settings, name, of_pod(settings), mounts(settings)),
        "command": ["rechub-dist"],
        "args": arguments,
    }
    found["env"] += [
        # Ranks stop together when one pod is stopped; the other pods have not finished.
        {"name": "RECHUB_PREEMPTED_EXIT_CODE", "value": str(PREEMPTED)},
        # Set for a Job's pods only: replacements can take over their predecessors' lease at once.
        {"name": LAUNCH, "valueFrom": {"fieldRef": {"fieldPath": _JOB_UID}}},
    ]
    found |= metrics(settings, config)
    if settings.liveness_seconds is not None:
        health = config.output_dir / "health"
        seconds = str(settings.liveness_seconds)
        found["livenessProbe"] = {
            "exec": {
                "command": ["python", "-m", "rechub_dist.launching.kubernetes.alive", str(health), "--seconds", seconds]
            },
            "periodSeconds": 60,
            "timeoutSeconds": 30,
            "failureThreshold": 1,
        }
    return found


def metrics(settings: Settings, config: RunConfig) -> Manifest:
    """The `ports` entry for the ranks' metrics ports; empty without `monitor.metrics_port`."""
    ports = metrics_ports(config, settings.nproc_per_node)
    named = [{"name": f"metrics-{rank}", "containerPort": port} for rank, port in enumerate(ports)]
    return {"ports": named} if named else {}


def ray_node(settings: Settings, name: str, *, head: bool) -> Manifest:
    """The container of a Ray node; KubeRay adds the command. KubeRay's default probes need wget in the image."""
    resources = _resources(settings.head) if head else of_pod(settings)
    found = container(settings, name, resources, mounts(settings))
    health = ["/api/gcs_healthz", RAY_DASHBOARD] if head else ["/api/local_raylet_healthz", RAY_AGENT]
    probe = {"httpGet": {"path": health[0], "port": health[1]}, "periodSeconds": 10, "timeoutSeconds": 5}
    found["readinessProbe"] = {**probe, "failureThreshold": 6}
    found["livenessProbe"] = {**probe, "initialDelaySeconds": 60, "failureThreshold": 12}
    found["env"].append({"name": "RAY_USAGE_STATS_ENABLED", "value": "0"})
    return found


def ray_submitter(settings: Settings) -> Manifest:
    """The container that submits the job; KubeRay adds the command."""
    return container(settings, "ray-job-submitter", _resources(settings.submitter), _runs_read_only(settings))


def pod(
    settings: Settings,
    container: Manifest,
    *,
    component: str = "trainer",
    restart: str = "Never",
    volumes: tuple[Mount, ...] | None = None,
) -> Manifest:
    """A pod template: non-root, spread over nodes, with a grace period long enough for a checkpoint.

    `volumes` are those of the container; default: all of a run's.
    """
    spec: Manifest = {
        "restartPolicy": restart,
        "terminationGracePeriodSeconds": settings.pod_grace_seconds,
        # The agent must not be process 1, which the kernel shields from SIGTERM until workers run: a pod waiting for
        # its peers would take the whole grace period to end.
        "shareProcessNamespace": True,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": mount.name, **mount.volume} for mount in volumes or mounts(settings)],
    }
    if settings.service_account is not None:
        spec["serviceAccountName"] = settings.service_account
    if component in _SPREAD:
        spec["topologySpreadConstraints"] = [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "DoNotSchedule" if settings.spread == "required" else "ScheduleAnyway",
                "labelSelector": {"matchLabels": selector(settings, component)},
            }
        ]
        if settings.node_selector:
            spec["nodeSelector"] = dict(settings.node_selector)
        if settings.gpus:
            spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {"metadata": {"labels": labels(settings, component)}, "spec": spec}


def tensorboard(settings: Settings, config: RunConfig) -> list[Manifest]:
    """A Deployment of TensorBoard for the run, and its Service."""
    name = f"{settings.name}-tensorboard"
    board = {
        **container(settings, "tensorboard", _resources(settings.board), _runs_read_only(settings)),
        "command": ["tensorboard"],
        "args": [f"--logdir={config.output_dir / 'tensorboard'}", "--bind_all", f"--port={TENSORBOARD_PORT}"],
        "ports": [{"name": "http", "containerPort": TENSORBOARD_PORT}],
        "readinessProbe": {"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 10},
    }
    template = pod(settings, board, component="tensorboard", restart="Always")
    template["spec"]["terminationGracePeriodSeconds"] = 5
    chosen = selector(settings, "tensorboard")
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata(settings, "tensorboard", name),
            "spec": {
                "replicas": 1,
                "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": chosen},
                "template": template,
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata(settings, "tensorboard", name),
            "spec": {"selector": chosen, "ports": [{"name": "http", "port": TENSORBOARD_PORT, "targetPort": "http"}]},
        },
    ]


def container(settings: Settings, name: str, resources: Manifest, seen: tuple[Mount, ...]) -> Manifest:
    """A container, and what it has mounted."""
    found: Manifest = {
        "name": name,
        "image": settings.image,
        "imagePullPolicy": "IfNotPresent",
        "env": [{"name": "HOME", "value": HOME}],
        "resources": resources,
        "securityContext": _HARDENED,
        "volumeMounts": [
            {"name": m.name, "mountPath": str(m.path), **({} if m.writable else {"readOnly": True})} for m in seen
        ],
    }
    if settings.env_secret is not None:
        found["envFrom"] = [{"secretRef": {"name": settings.env_secret}}]
    return found


def _runs_read_only(settings: Settings) -> tuple[Mount, ...]:
    return tuple(replace(mount, writable=mount.writable and mount.path != RUNS) for mount in mounts(settings))


def of_pod(settings: Settings) -> Manifest:
    """The resources of the container that has the pod to itself."""
    devices = {"nvidia.com/gpu": str(settings.gpus)} if settings.gpus else {}
    return _resources(Size(settings.cpu, settings.memory), devices)


def _resources(size: Size, devices: Mapping[str, str] = MappingProxyType({})) -> Manifest:
    """Requests equal to limits: a throttled pod slows all ranks, and quotas require limits."""
    amount = {"cpu": size.cpu, "memory": size.memory, **devices}
    return {"requests": dict(amount), "limits": dict(amount)}
