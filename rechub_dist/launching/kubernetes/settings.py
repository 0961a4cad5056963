"""What a manifest is made from besides the run file, checked before anything is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

from rechub_dist.errors import UserError
from rechub_dist.launching.kubernetes.rules import (
    INT32,
    MOST_PODS,
    is_image,
    is_label_key,
    is_label_name,
    is_label_value,
    is_object_name,
    is_service_name,
    quantity,
)

# Pods append as much as `-workers-0-99999-abcde` to it, and a host's name has 63 characters at most.
NAME_LENGTH = 40
_MIB = 1024**2
_RANK_BYTES = 256 * _MIB  # less than what a rank takes before it has read anything
_SMALL_BYTES = 64 * _MIB  # the same, of the other containers
_SHARED_BYTES = _MIB


@dataclass(frozen=True)
class Size:
    """What a container may take, Kubernetes quantities: it is requested, and it is the limit."""

    cpu: str
    memory: str


HEAD = Size("2", "4Gi")
SUBMITTER = TENSORBOARD = Size("500m", "1Gi")


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
        shared_memory: size of /dev/shm, a Kubernetes quantity; None for 1Gi, or half the memory where that is less.
        output_claim: PersistentVolumeClaim mounted at /runs; None for a folder that ends with the pod.
        data_claim: PersistentVolumeClaim mounted read-only at /data.
        env_secret: Secret whose keys become environment variables: an object store's credentials.
        service_account: that the pods run under; None for the namespace's default.
        node_selector: labels that nodes must have.
        spread: whether two pods may share a node when no other has room.
        grace_seconds: from a request to stop to the end of a rank, time for its checkpoint; the pod's is longer.
        max_restarts: how often workers are started again before a pod fails.
        backoff_limit: how often a failed pod, or the whole run where the kind knows no other way, is started again.
        ttl_seconds: after which a job that has ended is removed; None keeps it.
        liveness_seconds: after which a rank without a step has its pod restarted; None never does.
        take_over: whether the job takes its folders from a run that holds them.
        tensorboard: whether a TensorBoard on the output claim belongs to it.
        head: of the Ray node that trains nothing.
        submitter: of the container that hands a job to Ray.
        board: of TensorBoard.

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
    shared_memory: str | None = None
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
    head: Size = HEAD
    submitter: Size = SUBMITTER
    board: Size = TENSORBOARD

    def __post_init__(self) -> None:
        self._check_names()
        self._check_numbers()
        self._check_sizes()
        if self.gpus and self.gpus < self.nproc_per_node:
            raise UserError(
                f"--gpus-per-worker {self.gpus}: {self.nproc_per_node} ranks a pod need as many; change "
                f"--nproc-per-node or --gpus-per-worker"
            )
        if self.tensorboard and self.output_claim is None:
            raise UserError("--tensorboard: it reads the output claim; give --output-claim NAME")

    def _check_names(self) -> None:
        if len(self.name) > NAME_LENGTH or not is_service_name(self.name):
            raise UserError(
                f"--name {self.name}: at most {NAME_LENGTH} lower-case letters, digits and '-', a letter first and no "
                f"'-' last (RFC 1123)"
            )
        if self.namespace is not None and not is_label_name(self.namespace):
            raise UserError(f"--namespace {self.namespace}: at most 63 lower-case letters, digits and '-' (RFC 1123)")
        for option, value in (
            ("--output-claim", self.output_claim),
            ("--data-claim", self.data_claim),
            ("--env-secret", self.env_secret),
            ("--service-account", self.service_account),
        ):
            if value is not None and not is_object_name(value):
                raise UserError(f"{option} {value}: lower-case letters, digits, '-' and '.' (RFC 1123)")
        for label, value in self.node_selector.items():
            if not is_label_key(label) or not is_label_value(value):
                raise UserError(
                    f"--node-selector {label}={value}: a label is at most 63 letters, digits, '-', '_' and '.', a "
                    f"letter or digit first and last, its key with or without a prefix: example.com/pool=large"
                )
        if not is_image(self.image):
            raise UserError(f"--image {self.image}: write an image's name, such as registry.example/rechub-dist:0.1.0")

    def _check_numbers(self) -> None:
        for option, number, most in (
            ("--workers", self.workers, MOST_PODS),
            ("--nproc-per-node", self.nproc_per_node, INT32),
            ("--gpus-per-worker", self.gpus, INT32),
            ("--grace-seconds", self.pod_grace_seconds, INT32),
            ("--max-restarts", self.max_restarts, INT32),
            ("--backoff-limit", self.backoff_limit, INT32),
            ("--liveness", self.liveness_seconds, INT32),
            ("--ttl-seconds", self.ttl_seconds, INT32),
        ):
            if number is not None and number > most:
                raise UserError(f"{option}: {number:,} is more than a cluster takes: {most:,}")

    def _check_sizes(self) -> None:
        containers = (
            ("", Size(self.cpu, self.memory), self.nproc_per_node * _RANK_BYTES, f"{self.nproc_per_node} rank(s)"),
            ("head-", self.head, _SMALL_BYTES, "Ray"),
            ("submitter-", self.submitter, _SMALL_BYTES, "Ray"),
            ("tensorboard-", self.board, _SMALL_BYTES, "TensorBoard"),
        )
        for prefix, size, least, what in containers:
            _amount(f"--{prefix}cpu", size.cpu)
            memory = _amount(f"--{prefix}memory", size.memory)
            if memory < least:
                raise UserError(
                    f"--{prefix}memory {size.memory}: {memory:,f} bytes, and {what} would take {least // _MIB}Mi at "
                    f"least; 8Gi is 8 GiB"
                )
        shared = _amount("--shared-memory", self.shared_memory_size)
        if shared < _SHARED_BYTES:
            raise UserError(f"--shared-memory {self.shared_memory}: {shared:,f} bytes; 1Gi is 1 GiB")
        if shared > self.memory_bytes:
            raise UserError(
                f"--shared-memory {self.shared_memory}: it is a part of the pod's memory, which is --memory "
                f"{self.memory}; lower it or raise --memory"
            )

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory a pod."""
        return math.ceil(_amount("--memory", self.memory))

    @property
    def shared_memory_size(self) -> str:
        """Size of /dev/shm, a Kubernetes quantity."""
        if self.shared_memory is not None:
            return self.shared_memory
        return "1Gi" if self.memory_bytes >= 2 * 1024**3 else str(self.memory_bytes // 2)

    @property
    def threads(self) -> int:
        """Threads of a rank. A process counts the cores of its node, not those it may use."""
        return max(1, int(_amount("--cpu", self.cpu) / self.nproc_per_node))

    @property
    def pod_grace_seconds(self) -> int:
        """What the cluster waits for a pod: what its ranks have, and what the agent takes to end after them."""
        return self.grace_seconds + 30


def _amount(option: str, text: str) -> Decimal:
    amount = quantity(text)
    if amount is None:
        raise UserError(f"{option} {text}: write a quantity above 0, such as 500m, 4 or 16Gi")
    return amount
