"""The settings of a manifest besides the run file, validated before anything is written."""

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

# Pod names append up to `-workers-0-99999-abcde`, and a host name has at most 63 characters.
NAME_LENGTH = 40
_MIB = 1024**2
_RANK_BYTES = 256 * _MIB  # less than any rank needs before reading data
_SMALL_BYTES = 64 * _MIB  # the same for the other containers
_SHARED_BYTES = _MIB


@dataclass(frozen=True)
class Size:
    """Requests and limits of a container, as Kubernetes quantities."""

    cpu: str
    memory: str


HEAD = Size("2", "4Gi")
SUBMITTER = TENSORBOARD = Size("500m", "1Gi")


@dataclass(frozen=True)
class Settings:
    """How a run is deployed on a cluster.

    Attributes:
        name: of the job and its objects; an RFC 1123 label that begins with a letter, as Services require.
        image: training image.
        workers: number of training pods.
        nproc_per_node: ranks per pod.
        namespace: of all objects; None: kubectl's current one.
        cpu: cores per pod, a Kubernetes quantity.
        memory: memory per pod, a Kubernetes quantity; includes shared memory.
        gpus: NVIDIA GPUs per pod.
        shared_memory: size of /dev/shm, a Kubernetes quantity; None: 1Gi, or half the memory if that is less.
        output_claim: PersistentVolumeClaim mounted at /runs; None: a folder that is deleted with the pod.
        data_claim: PersistentVolumeClaim mounted read-only at /data.
        env_secret: Secret whose keys become environment variables, such as an object store's credentials.
        service_account: of the pods; None: the namespace's default.
        node_selector: labels that nodes must have.
        spread: whether pods may share a node if no other has room (`preferred`) or not (`required`).
        grace_seconds: from SIGTERM to SIGKILL of a rank, time for its checkpoint; the pod's grace period is longer.
        max_restarts: restarts of the ranks before a pod fails.
        backoff_limit: restarts of a failed pod, or of the whole run if the kind only restarts that.
        ttl_seconds: time after which a finished job is deleted; None: never.
        liveness_seconds: time without a heartbeat of a rank after which its pod is restarted; None: never.
        take_over: whether the job takes its output folders over from a running run.
        tensorboard: whether to add a TensorBoard that reads the output claim.
        network_policy: whether to add NetworkPolicies, which let in only what a run needs.
        egress_ports: more TCP ports on which the pods reach storage.
        head: resources of the Ray head, which does not train.
        submitter: resources of the container that submits the job to Ray.
        board: resources of TensorBoard.

    Raises:
        UserError: a name, quantity or number is invalid for the cluster, or contradicts another.
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
    network_policy: bool = True
    egress_ports: tuple[int, ...] = ()
    head: Size = HEAD
    submitter: Size = SUBMITTER
    board: Size = TENSORBOARD

    def __post_init__(self) -> None:
        self._check_names()
        self._check_numbers()
        self._check_sizes()
        if self.gpus and self.gpus < self.nproc_per_node:
            raise UserError(
                f"--gpus-per-worker {self.gpus}: {self.nproc_per_node} ranks per pod need one GPU each; change "
                f"--nproc-per-node or --gpus-per-worker"
            )
        if self.egress_ports and not self.network_policy:
            raise UserError("--egress-port: without network policies all ports are open; leave one of both out")
        if self.tensorboard and self.output_claim is None:
            raise UserError("--tensorboard: reads the output claim; give --output-claim NAME")

    def _check_names(self) -> None:
        if len(self.name) > NAME_LENGTH or not is_service_name(self.name):
            raise UserError(
                f"--name {self.name}: must be at most {NAME_LENGTH} lower-case letters, digits and '-', beginning with "
                f"a letter and not ending with '-' (RFC 1123)"
            )
        if self.namespace is not None and not is_label_name(self.namespace):
            raise UserError(
                f"--namespace {self.namespace}: must be at most 63 lower-case letters, digits and '-' (RFC 1123)"
            )
        for option, value in (
            ("--output-claim", self.output_claim),
            ("--data-claim", self.data_claim),
            ("--env-secret", self.env_secret),
            ("--service-account", self.service_account),
        ):
            if value is not None and not is_object_name(value):
                raise UserError(f"{option} {value}: must be lower-case letters, digits, '-' and '.' (RFC 1123)")
        for label, value in self.node_selector.items():
            if not is_label_key(label) or not is_label_value(value):
                raise UserError(
                    f"--node-selector {label}={value}: a label is at most 63 letters, digits, '-', '_' and '.', "
                    f"with a letter or digit first and last; the key may have a prefix: example.com/pool=large"
                )
        if not is_image(self.image):
            raise UserError(f"--image {self.image}: write an image name, such as registry.example/rechub-dist:0.1.0")

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
                raise UserError(f"{option}: {number:,} is above the cluster's maximum of {most:,}")

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
                    f"--{prefix}memory {size.memory}: {memory:,f} bytes is too small for {what}: give at least "
                    f"{least // _MIB}Mi; 8Gi is 8 GiB"
                )
        shared = _amount("--shared-memory", self.shared_memory_size)
        if shared < _SHARED_BYTES:
            raise UserError(f"--shared-memory {self.shared_memory}: {shared:,f} bytes is too small; 1Gi is 1 GiB")
        if shared > self.memory_bytes:
            raise UserError(
                f"--shared-memory {self.shared_memory}: is part of the pod's memory, --memory {self.memory}; lower it "
                f"or raise --memory"
            )

    @property
    def memory_bytes(self) -> int:
        """Memory per pod, in bytes."""
        return math.ceil(_amount("--memory", self.memory))

    @property
    def shared_memory_size(self) -> str:
        """Size of /dev/shm, a Kubernetes quantity."""
        if self.shared_memory is not None:
            return self.shared_memory
        return "1Gi" if self.memory_bytes >= 2 * 1024**3 else str(self.memory_bytes // 2)

    @property
    def threads(self) -> int:
        """Torch threads per rank; torch itself would count the cores of the node, not those of the pod."""
        return max(1, int(_amount("--cpu", self.cpu) / self.nproc_per_node))

    @property
    def pod_grace_seconds(self) -> int:
        """The pod's grace period in seconds: that of its ranks, plus time for the agent to end."""
        return self.grace_seconds + 30


def _amount(option: str, text: str) -> Decimal:
    amount = quantity(text)
    if amount is None:
        raise UserError(f"{option} {text}: write a quantity above 0, such as 500m, 4 or 16Gi")
    return amount
