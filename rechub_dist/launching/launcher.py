"""How training is started on one host or many: the one place that knows torchrun's settings."""

from __future__ import annotations

import ipaddress
import os
import shlex
import signal
import socket
import sys
import uuid
from dataclasses import dataclass

from torch.distributed.run import config_from_args, get_args_parser, parse_args

from rechub_dist.distributed.process import LAUNCH
from rechub_dist.errors import UserError
from rechub_dist.launching.agent import run_agent
from rechub_dist.launching.rendezvous import (
    addresses,
    await_rendezvous,
    interface,
    is_here,
    listens,
    open_store,
    parse_address,
)

_LAST_CALL_SECONDS = 5  # how long to wait for more hosts, where their number may vary
_JOIN_SECONDS = 600  # how long to wait for hosts that are missing, unless it is said
_MONITOR_SECONDS = 0.2  # between two looks at the workers
# torchrun has it from torch 2.12 on; our own agent is told in any case
_HAS_SHUTDOWN_TIMEOUT = "--shutdown-timeout" in get_args_parser().format_help()


@dataclass(frozen=True)
class Launch:
    """What to start on this host; the same on every host of a run.

    Attributes:
        nproc: ranks on this host.
        nnodes: hosts, `2`, or a range of them, `1:3`.
        rendezvous: HOST:PORT of the rendezvous store; None on one machine alone.
        run_id: tells runs that share a rendezvous store apart.
        external_store: a `rechub-dist store` listens there, rather than the agent of that host.
        max_restarts: how often workers are started again after a failure.
        grace_seconds: from a request to stop to SIGKILL.
        join_seconds: how long to wait for hosts that are missing. Where it is given, also for the rendezvous store,
            whose name may not be known yet; else that is a mistake.

    Raises:
        UserError: hosts that are no number or range, or several without a rendezvous store.
    """

    nproc: int = 1
    nnodes: str = "1"
    rendezvous: str | None = None
    run_id: str = "rechub-dist"
    external_store: bool = False
    max_restarts: int = 3
    grace_seconds: int = 30
    join_seconds: int | None = None

    def __post_init__(self) -> None:
        low, _, high = self.nnodes.partition(":")
        if not (low.isdigit() and (high or low).isdigit() and 1 <= int(low) <= int(high or low)):
            raise UserError(f"--nnodes {self.nnodes}: write a number of hosts, or a range like 1:3")
        if self.rendezvous is None and self.nnodes != "1":
            raise UserError(f"--nnodes {self.nnodes}: several hosts need a rendezvous store, --rdzv HOST:PORT")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the rendezvous store; port 0, any free one, on one machine."""
        if self.rendezvous is None:
            return "localhost", 0
        return parse_address(self.rendezvous)

    @property
    def several(self) -> bool:
        """Whether other hosts are to reach this one."""
        return self.rendezvous is not None and self.nnodes != "1"


def environment(wanted: Launch) -> dict[str, str]:
    """What has to stand in the environment of agent and workers, beside what the user has put there."""
    found = {
        # Restarted workers would dial the store of the round before, at an address that is gone.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // wanted.nproc)),
    }
    name, _ = interface(*wanted.address, others=wanted.several)
    if name is not None:
        found |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return {key: value for key, value in found.items() if key not in os.environ}


def torchrun_arguments(wanted: Launch, arguments: list[str]) -> list[str]:
    """The arguments with which torchrun starts `python -m rechub_dist ARGUMENTS`."""
    host, port = wanted.address
    settings = f"last_call_timeout={_LAST_CALL_SECONDS},join_timeout={wanted.join_seconds or _JOIN_SECONDS}"
    if wanted.rendezvous is not None:
        there = listens(host, port)  # of another agent on this host, say
        # torchrun tells by names, which may not resolve
        settings += f",is_host={str(not (wanted.external_store or there) and is_here(host, port)).lower()}"
    _, local = interface(host, port, others=wanted.several)
    return [
        f"--nnodes={wanted.nnodes}",
        f"--nproc-per-node={wanted.nproc}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={f'[{host}]' if ':' in host else host}:{port}",
        f"--rdzv-id={wanted.run_id if wanted.rendezvous else uuid.uuid4().hex}",
        f"--rdzv-conf={settings}",
        f"--max-restarts={wanted.max_restarts}",
        f"--monitor-interval={_MONITOR_SECONDS}",
        *([f"--shutdown-timeout={wanted.grace_seconds}"] if _HAS_SHUTDOWN_TIMEOUT else []),
        *([f"--local-addr={local}"] if local else []),
        "-m",
        "rechub_dist",
        *arguments,
    ]


def launch(wanted: Launch, arguments: list[str], *, show: bool = False) -> int:
    """Run `python -m rechub_dist ARGUMENTS` on this host's ranks; returns the exit code of `run_agent`.

    The settings are torchrun's own, read by its own parser; `show` prints the command that has them.
    """
    if wanted.rendezvous is not None and wanted.join_seconds is not None:
        await_rendezvous(*wanted.address, wanted.join_seconds)
    extra = environment(wanted)
    os.environ.update(extra)
    os.environ.setdefault(LAUNCH, _name_of(wanted))
    options = torchrun_arguments(wanted, arguments)
    if show:
        before = [f"{name}={value}" for name, value in extra.items()]
        print(shlex.join([*before, "torchrun", *options]), file=sys.stderr, flush=True)
    config, command, command_arguments = config_from_args(parse_args(options))
    assert isinstance(command, str)
    return run_agent(config, command, command_arguments, wanted.grace_seconds)


def _name_of(wanted: Launch) -> str:
    """What all agents of one run, and no others, agree on."""
    if wanted.rendezvous is None:
        return uuid.uuid4().hex
    host, port = wanted.address
    _, address = addresses(host, port)[0]
    loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    return f"{wanted.run_id}@{host}:{port}{f' on {socket.gethostname()}' if loopback else ''}"


def serve_store(port: int) -> None:
    """Run a standalone rendezvous store until a signal comes: then no host of the run is one that must not die.

    Raises:
        UserError: the port is taken.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    store = open_store(port)
    print(f"store: listening on port {store.port}", file=sys.stderr, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
