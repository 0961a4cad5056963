"""What a manifest is made from besides the run file, checked before anything is written."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from rechub_dist.errors import UserError

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"{_LABEL.pattern}(\.{_LABEL.pattern})*")
_IMAGE = re.compile(r"[a-z0-9][a-z0-9._/-]*(:\d+/[a-z0-9._/-]+)?(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?", re.ASCII)
_QUANTITY = re.compile(r"(\d+|\d*\.\d+)(m|k|Ki|[MGTPE]i?)?")
# Pods append as much as `-workers-0-999-abcde` to it, and a host's name has 63 characters at most.
NAME_LENGTH = 40


@dataclass(frozen=True)
class Settings:
    """How a run is to be placed on a cluster.

    Attributes:
        name: of the job and of what belongs to it; an RFC 1123 label that begins with a letter, as Services want it.
        image: the training image.
        workers: pods that train.
        nproc_per_node: ranks a pod.
        namespace: of all objects; None leaves it to the one who applies them.
        cpu: cores a pod, a Kubernetes quantity.
        memory: of a pod, a Kubernetes quantity; shared memory counts towards it.
        gpus: NVIDIA devices a pod.
        shared_memory: size of /dev/shm, a Kubernetes quantity.
        output_claim: PersistentVolumeClaim mounted at /runs; None for a folder that ends with the pod.
        data_claim: PersistentVolumeClaim mounted read-only at /data.
        env_secret: Secret whose keys become environment variables: an object store's credentials.
        service_account: that the pods run under; None for the namespace's default.
        node_selector: labels that nodes must have.
        spread: whether two pods may share a node when no other has room.
        grace_seconds: from a request to stop to the end of a rank, time for its checkpoint; the pod's is longer.
        max_restarts: how often torchrun starts workers again before a pod fails.
        backoff_limit: how often a failed pod, or the whole run where the kind knows no other way, is started again.
        ttl_seconds: after which a job that has ended is removed; None keeps it.
        liveness_seconds: after which a rank without a step has its pod restarted; None never does.
        take_over: whether the job takes its folders from a run that holds them.
        tensorboard: whether a TensorBoard on the output claim belongs to it.

    Raises:
        UserError: a name, quantity or number that the cluster would refuse, or that contradicts another.
    """

    name: str
    image: str
    workers: int = 1
    nproc_per_node: int = 1
    namespace: str | None = None
    cpu: str = "2"
    memory: str = "8Gi"
    gpus: int = 0
    shared_memory: str = "1Gi"
    output_claim: str | None = None
    data_claim: str | None = None
    env_secret: str | None = None
    service_account: str | None = None
    node_selector: dict[str, str] = field(default_factory=dict)
    spread: Literal["preferred", "required"] = "preferred"
    grace_seconds: int = 120
    max_restarts: int = 3
    backoff_limit: int = 3
    ttl_seconds: int | None = None
    liveness_seconds: int | None = None
    take_over: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if len(self.name) > NAME_LENGTH or not _LABEL.fullmatch(self.name) or not self.name[0].isalpha():
            raise UserError(
                f"--name {self.name}: at most {NAME_LENGTH} lower-case letters, digits and '-', a letter first and no "
                f"'-' last (RFC 1123)"
            )
        if self.namespace is not None and (len(self.namespace) > 63 or not _LABEL.fullmatch(self.namespace)):
            raise UserError(f"--namespace {self.namespace}: at most 63 lower-case letters, digits and '-' (RFC 1123)")
        for option, value in (
            ("--output-claim", self.output_claim),
            ("--data-claim", self.data_claim),
            ("--env-secret", self.env_secret),
            ("--service-account", self.service_account),
        ):
            if value is not None and (len(value) > 253 or not _SUBDOMAIN.fullmatch(value)):
                raise UserError(f"{option} {value}: lower-case letters, digits, '-' and '.' (RFC 1123)")
        if not _IMAGE.fullmatch(self.image):
            raise UserError(f"--image {self.image}: write an image's name, such as registry.example/rechub-dist:0.1.0")
        for option, value in (("--cpu", self.cpu), ("--memory", self.memory), ("--shared-memory", self.shared_memory)):
            if _amount(value) is None:
                raise UserError(f"{option} {value}: write a quantity above 0, such as 500m, 4 or 16Gi")
        if self.gpus and self.gpus < self.nproc_per_node:
            raise UserError(
                f"--gpus-per-worker {self.gpus}: {self.nproc_per_node} ranks a pod need as many; change "
                f"--nproc-per-node or --gpus-per-worker"
            )
        if self.tensorboard and self.output_claim is None:
            raise UserError("--tensorboard: it reads the output claim; give --output-claim NAME")

    @property
    def threads(self) -> int:
        """Threads of a rank. A process counts the cores of its node, not those it may use."""
        cores = _amount(self.cpu)
        assert cores is not None
        return max(1, int(cores / self.nproc_per_node))

    @property
    def pod_grace_seconds(self) -> int:
        """What the cluster waits for a pod: what its ranks have, and as long as it takes torchrun to end after them."""
        return self.grace_seconds + 30


def _amount(quantity: str) -> float | None:
    """A quantity without regard to its unit (but thousandths), None where it is none or 0."""
    match = _QUANTITY.fullmatch(quantity)
    if match is None or float(match[1]) == 0:
        return None
    return float(match[1]) / (1000 if match[2] == "m" else 1)
