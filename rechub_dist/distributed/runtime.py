"""A rank's process groups and device, small collectives, and how ranks agree on an error."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from rechub_dist.distributed.collectives import all_rows
from rechub_dist.distributed.host import allow_open_files, warn_of_little_shared_memory
from rechub_dist.distributed.process import die_with_agent
from rechub_dist.errors import UserError

T = TypeVar("T")
Bytes = NDArray[np.uint8]
_LOOPBACK = "127.0.0.1"


class Stopped(Exception):  # noqa: N818 - no error
    """All ranks stop, as at least one was asked to."""


@dataclass(frozen=True)
class Runtime:
    """This rank in its world. `control` is a CPU (gloo) group for small host-side collectives."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    group: dist.ProcessGroup
    control: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the terminal."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> T:
        """The result of local work that may fail. Collective.

        Raises:
            UserError: on all ranks, the one of the first rank on which `work` has raised one.
        """
        result: T | None = None
        message: str | None = None
        try:
            result = work()
        except UserError as error:
            message = str(error)
        self.raise_together(message)
        return result  # type: ignore[return-value]

    def from_main(self, work: Callable[[], T]) -> T:
        """The result of work that only the main rank does, on all ranks; raises its UserError on all. Collective."""
        box: list[T | None] = [None]

        def guarded() -> None:
            if self.is_main:
                box[0] = work()

        self.together(guarded)
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]  # type: ignore[return-value]

    def all_reduce_sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over ranks, in a new tensor; shapes are the same on all ranks. Collective."""
        total = part.clone()
        dist.all_reduce(total, group=self._group_for(part))
        return total

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """All ranks' rows [n_r, ...], in rank order, on every rank; n_r may differ and be 0. Collective."""
        return all_rows(rows, self._group_for(rows))[0]

    def gather_list(self, items: Sequence[T]) -> list[T]:
        """All ranks' items, in rank order, on every rank; anything that can be pickled. Collective."""
        found: list[Sequence[T]] = [()] * self.world_size
        dist.all_gather_object(found, items, group=self.control)
        return [item for part in found for item in part]

    def exchange(self, parts: Sequence[Bytes], check: Callable[[int], None]) -> list[Bytes]:
        """All-to-all of bytes in host memory: sends `parts[r]` to rank r, returns what each rank sent here. Collective.

        `check` gets the number of incoming bytes before they are sent; a UserError that it raises is raised on all.
        """
        outgoing = [len(part) for part in parts]
        sizes = torch.empty(self.world_size, dtype=torch.int64)
        dist.all_to_all_single(sizes, torch.tensor(outgoing), group=self.control)
        incoming = sizes.tolist()
        self.together(lambda: check(sum(incoming)))
        received = torch.empty(sum(incoming), dtype=torch.uint8)
        sent = torch.from_numpy(np.concatenate(parts))
        dist.all_to_all_single(received, sent, incoming, outgoing, group=self.control)
        return [part.numpy() for part in received.split(incoming)]

    def _group_for(self, tensor: torch.Tensor) -> dist.ProcessGroup:
        return self.control if tensor.device.type == "cpu" else self.group

    def raise_together(self, message: str | None, *, stop: bool = False) -> None:
        """Raise UserError on all ranks if any has a message, else `Stopped` if any wants to stop. Collective."""
        flags = torch.tensor([message is not None, stop], dtype=torch.int64)
        dist.all_reduce(flags, group=self.control)
        if not flags[0]:
            if flags[1]:
                raise Stopped
            return
        messages: list[str | None] = [None] * self.world_size
        dist.all_gather_object(messages, message, group=self.control)
        agreed = UserError(next(m for m in messages if m is not None))
        agreed.on_all_ranks = True
        raise agreed


class _Alone(Runtime):
    """A single process without process groups: collectives are local."""

    def together(self, work: Callable[[], T]) -> T:
        """The result of `work`."""
        return work()

    def from_main(self, work: Callable[[], T]) -> T:
        """The result of `work`."""
        return work()

    def all_reduce_sum(self, part: torch.Tensor) -> torch.Tensor:
        """A copy of the tensor."""
        return part.clone()

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows."""
        return rows

    def gather_list(self, items: Sequence[T]) -> list[T]:
        """The items."""
        return list(items)

    def exchange(self, parts: Sequence[Bytes], check: Callable[[int], None]) -> list[Bytes]:
        """The one part. Raises what `check` raises."""
        check(sum(len(part) for part in parts))
        return list(parts)

    def raise_together(self, message: str | None, *, stop: bool = False) -> None:
        """Raise UserError if there is a message, else `Stopped` if `stop`."""
        if message is not None:
            raise UserError(message)
        if stop:
            raise Stopped


def alone(device: torch.device) -> Runtime:
    """A runtime of this process alone, whatever the environment says; it makes no process group.

    For loading a run whole; anything sharded needs the groups of `runtime`.
    """
    return _Alone(0, 1, 1, device, None, None)  # type: ignore[arg-type]  # no collective needs them


def environment() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) from torchrun's variables; (0, 1, 0, 1) without them.

    Raises:
        UserError: the variables are incomplete or no numbers, or srun has started several of this command.
    """
    read = os.environ.get
    if "WORLD_SIZE" not in os.environ:
        _refuse_srun()
        return 0, 1, 0, 1
    world = _number("WORLD_SIZE", "1")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world > 1 and missing:
        raise UserError(
            f"the environment has WORLD_SIZE={world}, but no {', '.join(missing)}: start ranks with --nproc, torchrun "
            f"or Ray, which set them all, or unset WORLD_SIZE"
        )
    return _number("RANK", "0"), world, _number("LOCAL_RANK", "0"), _number("LOCAL_WORLD_SIZE", read("WORLD_SIZE", "1"))


def _number(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise UserError(
            f"the environment has {name}={text}, which is not a number: unset it, or start ranks with --nproc"
        )
    return int(text)


def _refuse_srun() -> None:
    """Raise UserError if `srun` has started several of this command: each would train the whole run by itself."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    task = os.environ.get("SLURM_PROCID", "0")
    if tasks not in ("", "0", "1") or task not in ("", "0"):
        raise UserError(
            f"srun has started several of this command (this is task {task}), and each would train the whole run: "
            f"start one per host (--ntasks-per-node=1) with --nnodes, --nproc and --rdzv, as launch/slurm/ shows"
        )


def device_type(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """The device type to use: CUDA where it is wanted and available.

    Raises:
        UserError: `cuda` is wanted but not available.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda, but torch finds no CUDA device; use device: auto or cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


@contextmanager
def runtime(device: Literal["cpu", "cuda"], timeout_seconds: float, threads: int | None = None) -> Iterator[Runtime]:
    """Join the process group that the environment describes, or create one of this process alone. Collective.

    The groups are destroyed when the block ends. Ranks that are all on one host listen on its loopback address alone.

    Args:
        timeout_seconds: of collectives.
        threads: of torch on this rank; by default the host's CPUs divided by its ranks.

    Raises:
        UserError: the environment or the resources of this host do not allow the rank to run.
    """
    rank, world, local_rank, local_world = environment()
    die_with_agent()
    allow_open_files(world)
    if device == "cpu":
        keep_freed_memory()
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_world))
    target = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {rank} is number {local_rank + 1} on this host, which has {torch.cuda.device_count()} GPU(s): "
                f"start at most one rank per GPU (--nproc), or set device: cpu"
            )
        torch.cuda.set_device(target)
        if local_rank == 0:
            warn_of_little_shared_memory(local_world)
    timeout = timedelta(seconds=timeout_seconds)
    backend = "nccl" if device == "cuda" else "gloo"
    # Bound to its GPU a rank connects here, where a failure names it, rather than within the first collective.
    bound = target if device == "cuda" else None
    alone = world == 1 or os.environ.get("LOCAL_WORLD_SIZE") == str(world)
    with _on_loopback() if alone else contextlib.nullcontext():
        store = _local_store(rank, world, timeout) if alone else None
        if store is None:
            dist.init_process_group(backend, timeout=timeout, device_id=bound)
        else:
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=bound)
        try:
            group = dist.group.WORLD
            assert group is not None
            control = group if device == "cpu" else dist.new_group(backend="gloo", timeout=timeout)
            yield Runtime(rank, world, local_world, target, group, control)
        finally:
            dist.destroy_process_group()


def _local_store(rank: int, world: int, timeout: timedelta) -> dist.Store | None:
    """The store of a world on one host, which only this host can reach; None if torchrun's agent runs one for it."""
    if world == 1:
        return dist.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    port = _number("MASTER_PORT", "")
    listener = None
    if rank == 0:  # torch would listen on all addresses
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((_LOOPBACK, port))
            listener = server.detach()  # the store's from here on
    return dist.TCPStore(_LOOPBACK, port, world, rank == 0, timeout, master_listen_fd=listener)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have gloo and NCCL listen on the loopback interface within the block, unless the environment names another."""
    names = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name not in os.environ]
    os.environ.update(dict.fromkeys(names, "lo"))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory: faulting in fresh pages for each step's activations costs a tenth of the step."""
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)
