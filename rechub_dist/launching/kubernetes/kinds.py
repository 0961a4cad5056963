"""The manifests of each kind of job: what its controller needs around the pod."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import yaml

from rechub_dist.config import RunConfig
from rechub_dist.distributed.process import MISTAKE, PREEMPTED
from rechub_dist.launching.kubernetes.network import policies
from rechub_dist.launching.kubernetes.pods import (
    Manifest,
    metadata,
    metrics,
    pod,
    ray_node,
    ray_submitter,
    selector,
    tensorboard,
    train,
    trainer,
)
from rechub_dist.launching.kubernetes.settings import Settings
from rechub_dist.launching.kubernetes.view import RUN_FILE
from rechub_dist.launching.ports import RENDEZVOUS

RAY_VERSION = "2.60.0"  # as in docker/requirements.txt


def job(settings: Settings, config: RunConfig) -> list[Manifest]:
    """An indexed Kubernetes Job (1.29 or newer), and the headless Service that gives its pods DNS names."""
    name = settings.name
    template = pod(settings, trainer(settings, config, "trainer", train(settings, f"{name}-0.{name}:{RENDEZVOUS}")))
    template["spec"]["subdomain"] = name
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(settings, "trainer", name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": selector(settings, "trainer"),
            "ports": [{"name": "rendezvous", "port": RENDEZVOUS}],
        },
    }
    spec = {
        **_indexed(settings),
        # Per pod: when the first pod, which runs the rendezvous store, dies, all pods fail at once.
        "backoffLimitPerIndex": settings.backoff_limit,
        "maxFailedIndexes": 0,
        **_time_to_live(settings),
        "template": template,
    }
    return [
        service,
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata(settings, "trainer", name), "spec": spec},
    ]


def jobset(settings: Settings, config: RunConfig) -> list[Manifest]:
    """A JobSet: if a pod fails, all pods are restarted."""
    name = settings.name
    endpoint = f"{name}-workers-0-0.{name}:{RENDEZVOUS}"
    template = pod(settings, trainer(settings, config, "trainer", train(settings, endpoint)))
    spec = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": name},
        "failurePolicy": {"maxRestarts": settings.backoff_limit},
        **_time_to_live(settings),
        "replicatedJobs": [
            {
                "name": "workers",
                "replicas": 1,
                "template": {"spec": {**_indexed(settings), "backoffLimit": 0, "template": template}},
            }
        ],
    }
    head = metadata(settings, "trainer", name)
    return [{"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": head, "spec": spec}]


def pytorchjob(settings: Settings, config: RunConfig) -> list[Manifest]:
    """A PyTorchJob of Kubeflow's training operator (v1), elastic, so that all pods are workers."""
    name = settings.name
    # The operator finds its container by this name, and creates a Service per pod.
    container = trainer(settings, config, "pytorch", train(settings, f"{name}-worker-0:{RENDEZVOUS}"))
    container["ports"] = [{"name": "pytorchjob-port", "containerPort": RENDEZVOUS}, *container.get("ports", [])]
    template = pod(settings, container)
    del template["spec"]["restartPolicy"]  # set beside the template for this operator
    spec = {
        "runPolicy": {"backoffLimit": settings.backoff_limit, "cleanPodPolicy": "None", **_time_to_live(settings)},
        "elasticPolicy": {
            "rdzvBackend": "c10d",
            "rdzvPort": RENDEZVOUS,
            "minReplicas": settings.workers,
            "maxReplicas": settings.workers,
            "maxRestarts": settings.max_restarts,
        },
        "nprocPerNode": str(settings.nproc_per_node),
        "pytorchReplicaSpecs": {
            "Worker": {"replicas": settings.workers, "restartPolicy": "OnFailure", "template": template}
        },
    }
    head = metadata(settings, "trainer", name)
    return [{"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": head, "spec": spec}]


def trainjob(settings: Settings, config: RunConfig) -> list[Manifest]:
    """A TrainJob of Kubeflow Trainer (v2), with the number of nodes and ranks, and the TrainingRuntime of its pods."""
    name = settings.name
    # The trainer finds its container by this name, and passes the rendezvous address in the environment.
    arguments = train(settings, "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)")
    template = pod(settings, trainer(settings, config, "node", arguments))
    node = {
        "name": "node",
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": {"backoffLimit": 0, "podFailurePolicy": _failures(), "template": template},
        },
    }
    runtime = {
        "mlPolicy": {"numNodes": settings.workers, "torch": {}},
        "template": {"spec": {"failurePolicy": {"maxRestarts": settings.backoff_limit}, "replicatedJobs": [node]}},
    }
    spec = {
        "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name},
        "trainer": {"numNodes": settings.workers, "numProcPerNode": settings.nproc_per_node},
    }
    version = "trainer.kubeflow.org/v1alpha1"
    head = metadata(settings, "trainer", name)
    return [
        {"apiVersion": version, "kind": "TrainingRuntime", "metadata": head, "spec": runtime},
        {"apiVersion": version, "kind": "TrainJob", "metadata": head, "spec": spec},
    ]


def rayjob(settings: Settings, config: RunConfig) -> list[Manifest]:
    """A RayJob of KubeRay: a head that does not train, workers, and a cluster that is deleted when the job is done."""
    # A node offers exactly the CPUs of its ranks, so that no more ranks are placed there than it has memory for.
    each = {
        "num-workers": settings.workers * settings.nproc_per_node,
        "cpus-per-worker": settings.threads,
        **({"gpus-per-worker": 1} if settings.gpus else {}),
        "max-failures": settings.max_restarts,
    }
    options = " ".join(f"--{name} {value}" for name, value in each.items())
    options += " --take-over" if settings.take_over else ""
    head = pod(settings, ray_node(settings, "ray-head", head=True), component="head", restart="Always")
    workers = pod(settings, ray_node(settings, "ray-worker", head=False) | metrics(settings, config), restart="Always")
    submitter = pod(settings, ray_submitter(settings), component="submitter")
    cluster = {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},  # explicit: otherwise nodes with a different token cannot join
        "headGroupSpec": {
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0", "num-gpus": "0"},
            "template": head,
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": settings.workers,
                "minReplicas": settings.workers,
                "maxReplicas": settings.workers,
                "rayStartParams": {"num-cpus": str(settings.threads * settings.nproc_per_node)},
                "template": workers,
            }
        ],
    }
    spec = {
        "entrypoint": f"python /app/launch/ray_train.py {RUN_FILE} {options}",
        # the default of 3 seconds is too short for a checkpoint
        "runtimeEnvYAML": f'env_vars: {{RAY_JOB_STOP_WAIT_TIME_S: "{settings.grace_seconds}"}}\n',
        "submissionMode": "K8sJobMode",
        "backoffLimit": settings.backoff_limit,
        "shutdownAfterJobFinishes": True,
        **_time_to_live(settings),
        "submitterPodTemplate": submitter,
        "rayClusterSpec": cluster,
    }
    return [
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": metadata(settings, "trainer", settings.name),
            "spec": spec,
        }
    ]


KINDS: Final[dict[str, Callable[[Settings, RunConfig], list[Manifest]]]] = {
    "job": job,
    "jobset": jobset,
    "pytorchjob": pytorchjob,
    "trainjob": trainjob,
    "rayjob": rayjob,
}


def render(kind: str, settings: Settings, config: RunConfig) -> str:
    """The manifests of a job of this kind (a key of `KINDS`) with everything it needs, as YAML documents."""
    run: Manifest = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(settings, "run", f"{settings.name}-run"),
        "data": {"run.yaml": config.dump_given()},
    }
    objects = [run, *KINDS[kind](settings, config)]
    if settings.tensorboard:
        objects += tensorboard(settings, config)
    if settings.network_policy:
        objects += policies(kind, settings, config)
    return as_text(objects)


def as_text(objects: list[Manifest]) -> str:
    """Objects as YAML documents."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


def _indexed(settings: Settings) -> Manifest:
    return {
        "completionMode": "Indexed",
        "completions": settings.workers,
        "parallelism": settings.workers,
        "podFailurePolicy": _failures(),
    }


def _failures() -> Manifest:
    """Which pod failures count.

    Pods of a drained node, and pods whose ranks saved because another pod was stopped, are recreated without counting
    as failures. A user's mistake is not retried.
    """
    return {
        "rules": [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [MISTAKE]}},
            {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [PREEMPTED]}},
        ]
    }


def _time_to_live(settings: Settings) -> dict[str, int]:
    return {} if settings.ttl_seconds is None else {"ttlSecondsAfterFinished": settings.ttl_seconds}


class _Dumper(yaml.SafeDumper):
    """Writes multi-line strings as blocks, and repeated objects without aliases."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
