"""What a pod is to the ranks in it: one description, of which manifests are made and by which runs are checked."""

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
_RAY_PORTS = (
    (range(8080, 8081), "Ray tells its own metrics there"),
    (range(RAY_AGENT, RAY_AGENT + 1), "Ray's agent listens there"),
    (range(10002, 20000), "Ray's workers listen there"),
)


@dataclass(frozen=True)
class Mount:
    """A folder of the pod that is not the image's. All else can be read only.

    Attributes:
        name: of the volume.
        volume: its source, as a manifest has it.
        kept: whether what lies there outlasts the pod: a claim.
    """

    name: str
    path: PurePosixPath
    volume: dict[str, Any]
    writable: bool = True
    kept: bool = False


@dataclass(frozen=True)
class PodView:
    """A pod that trains.

    Attributes:
        pods: how many there are of them.
        ranks: in each.
        device: what the ranks compute on.
        memory: bytes of all its ranks, shared memory among them.
        cpus: whole cores of each rank, 1 at least.
        mounts: its folders.
        taken: ports on which something else listens, and what.
    """

    pods: int
    ranks: int
    device: Literal["cpu", "cuda"]
    memory: int
    cpus: int
    mounts: tuple[Mount, ...]
    taken: tuple[tuple[range, str], ...]

    def mount_of(self, path: str) -> Mount | None:
        """The mount that a path lies in, or is; None for a relative path and for what is the image's."""
        if not path.startswith("/"):
            return None
        pure = PurePosixPath("/", posixpath.normpath(path).lstrip("/"))
        found = [mount for mount in self.mounts if pure.is_relative_to(mount.path)]
        return max(found, key=lambda mount: len(mount.path.parts), default=None)


def pod_view(kind: str, settings: Settings) -> PodView:
    """What the pods of a job of this kind are."""
    ray = kind == "rayjob"
    return PodView(
        pods=settings.workers,
        ranks=settings.nproc_per_node,
        device="cuda" if settings.gpus else "cpu",
        memory=settings.memory_bytes,
        cpus=settings.threads,
        mounts=mounts(settings),
        taken=_RAY_PORTS if ray else ((range(RENDEZVOUS, RENDEZVOUS + 1), "that is the rendezvous store's"),),
    )


def mounts(settings: Settings) -> tuple[Mount, ...]:
    """The folders that are mounted into all pods of a run."""
    scratch: dict[str, Any] = {"emptyDir": {}}
    runs = scratch if settings.output_claim is None else _claim(settings.output_claim)
    found = [
        Mount("run", RUN, {"configMap": {"name": f"{settings.name}-run"}}, writable=False),
        Mount("runs", RUNS, runs, kept=settings.output_claim is not None),
        Mount("tmp", PurePosixPath("/tmp"), scratch),
        Mount("home", PurePosixPath(HOME), scratch),
        # torch and NCCL pass tensors through it; the container engine's own is 64 MB.
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
