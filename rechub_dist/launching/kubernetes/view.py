"""What a pod provides to its ranks: one description from which manifests are made and run files validated."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final, Literal

from rechub_dist.launching.kubernetes.settings import Settings
from rechub_dist.launching.ports import RENDEZVOUS

RUN, RUNS, DATA = PurePosixPath("/run"), PurePosixPath("/runs"), PurePosixPath("/data")
RUN_FILE: Final = str(RUN / "run.yaml")
HOME: Final = "/home/rechub"
USER: Final = 1000
RAY_DASHBOARD, RAY_AGENT = 8265, 52365
TENSORBOARD_PORT: Final = 6006
_RAY_PORTS = (
    (range(8080, 8081), "Ray serves its own metrics there"),
    (range(RAY_AGENT, RAY_AGENT + 1), "Ray's agent listens there"),
    (range(10002, 20000), "Ray's workers listen there"),
)


@dataclass(frozen=True)
class Mount:
    """A volume mounted in the pod. Everything else in the pod is read-only.

    Attributes:
        name: name of the volume.
        path: where it is mounted.
        volume: its source, as in a manifest.
        writable: whether pods may write to it.
        kept: whether its content outlives the pod (a claim).
    """

    name: str
    path: PurePosixPath
    volume: dict[str, Any]
    writable: bool = True
    kept: bool = False


@dataclass(frozen=True)
class PodView:
    """A training pod.

    Attributes:
        pods: number of such pods.
        ranks: ranks per pod.
        device: device of the ranks.
        memory: memory of all ranks of the pod in bytes, including shared memory.
        cpus: whole cores per rank, at least 1.
        mounts: mounted volumes.
        taken: ports in use by something else, with a description.
    """

    pods: int
    ranks: int
    device: Literal["cpu", "cuda"]
    memory: int
    cpus: int
    mounts: tuple[Mount, ...]
    taken: tuple[tuple[range, str], ...]

    def mount_of(self, path: str) -> Mount | None:
        """The mount that contains a path; None for relative paths and paths of the image."""
        if not path.startswith("/"):
            return None
        pure = PurePosixPath("/", posixpath.normpath(path).lstrip("/"))
        found = [mount for mount in self.mounts if pure.is_relative_to(mount.path)]
        return max(found, key=lambda mount: len(mount.path.parts), default=None)


def pod_view(kind: str, settings: Settings) -> PodView:
    """The training pods of a job of this kind (a key of `kinds.KINDS`)."""
    ray = kind == "rayjob"
    return PodView(
        pods=settings.workers,
        ranks=settings.nproc_per_node,
        device="cuda" if settings.gpus else "cpu",
        memory=settings.memory_bytes,
        cpus=settings.threads,
        mounts=mounts(settings),
        taken=_RAY_PORTS if ray else ((range(RENDEZVOUS, RENDEZVOUS + 1), "the rendezvous store listens there"),),
    )


def mounts(settings: Settings) -> tuple[Mount, ...]:
    """The volumes that are mounted in all pods of a run."""
    scratch: dict[str, Any] = {"emptyDir": {}}
    runs = scratch if settings.output_claim is None else _claim(settings.output_claim)
    found = [
        Mount("run", RUN, {"configMap": {"name": f"{settings.name}-run"}}, writable=False),
        Mount("runs", RUNS, runs, kept=settings.output_claim is not None),
        Mount("tmp", PurePosixPath("/tmp"), scratch),
        Mount("home", PurePosixPath(HOME), scratch),
        # torch and NCCL pass tensors through it; the container default is 64 MB.
        Mount(
            "shared-memory",
            PurePosixPath("/dev/shm"),
            {"emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory_size}},
        ),
    ]
    if settings.data_claim is not None:
        claim = _claim(settings.data_claim)
        claim["persistentVolumeClaim"]["readOnly"] = True
        found.append(Mount("data", DATA, claim, writable=False, kept=True))
    return tuple(found)


def _claim(name: str) -> dict[str, Any]:
    return {"persistentVolumeClaim": {"claimName": name}}
