"""Launching on one or several hosts: the only place that knows torchrun's settings."""

from __future__ import annotations

import ipaddress
import os
import shlex
import signal
import socket
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

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

_LAST_CALL_SECONDS = 5  # wait for more hosts, if their number may vary
_JOIN_SECONDS = 600  # default wait for missing hosts
_MONITOR_SECONDS = 0.2  # between checks of the workers
_ALONE_SECONDS = (
    3600  # between an agent's heartbeats where no other watches them: each makes the file of the store longer
)
# torchrun has it from torch 2.12 on; our own agent applies it always
_HAS_SHUTDOWN_TIMEOUT = "--shutdown-timeout" in get_args_parser().format_help()


@dataclass(frozen=True)
class Launch:
    """What to launch on this host; the same on every host of a run.

    Attributes:
        nproc: ranks on this host.
        nnodes: number of hosts, `2`, or a range, `1:3`.
        rendezvous: HOST:PORT of the rendezvous of several hosts; a single one needs none.
        run_id: distinguishes runs that share a rendezvous store.
        external_store: the rendezvous is a `rechub-dist store`, not the agent of that host.
        max_restarts: restarts of workers after failures.
        grace_seconds: between SIGTERM and SIGKILL.
        join_seconds: how long to wait for missing hosts; None: 600 s. If set, also how long to wait for the rendezvous,
            whose name may not resolve yet; otherwise that is an error.

    Raises:
        UserError: `nnodes` is neither a number nor a range, several hosts have no rendezvous, or it is no address.
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
        if self.rendezvous is None and self.several:
            raise UserError(f"--nnodes {self.nnodes}: several hosts need a rendezvous: --rdzv HOST:PORT")
        if self.rendezvous is not None:
            parse_address(self.rendezvous)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the rendezvous; a single host, whose store is a file, has port 0."""
        if self.rendezvous is None or not self.several:
            return "localhost", 0
        return parse_address(self.rendezvous)

    @property
    def several(self) -> bool:
        """Whether other hosts must reach this one."""
        return int(self.nnodes.rpartition(":")[2]) > 1


def environment(wanted: Launch) -> dict[str, str]:
    """Environment variables that agent and workers need and the user has not set."""
    found = {
        # Otherwise restarted workers connect to the previous round's store, at a dead address.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // wanted.nproc)),
    }
    name, _ = interface(*wanted.address, others=wanted.several)
    if name is not None:
        found |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return {key: value for key, value in found.items() if key not in os.environ}


def torchrun_arguments(wanted: Launch, arguments: list[str], file: Path | None = None) -> list[str]:
    """The arguments for torchrun to start `python -m rechub_dist ARGUMENTS`.

    The rendezvous store of a single host is `file`, or a temporary one that torchrun makes. It does not listen: whoever
    reaches a store can run code in its agents, which unpickle what it holds.
    """
    host, port = wanted.address
    settings = f"last_call_timeout={_LAST_CALL_SECONDS},join_timeout={wanted.join_seconds or _JOIN_SECONDS}"
    if not wanted.several:
        settings += f",store_type=file,keep_alive_interval={_ALONE_SECONDS}"
        endpoint = None if file is None else str(file)
    else:
        endpoint = f"{f'[{host}]' if ':' in host else host}:{port}"
        there = listens(host, port)  # such as another agent's on this host
        # torchrun compares names, which may not resolve
        settings += f",is_host={str(not (wanted.external_store or there) and is_here(host, port)).lower()}"
    _, local = interface(host, port, others=wanted.several)
    return [
        f"--nnodes={wanted.nnodes}",
        f"--nproc-per-node={wanted.nproc}",
        "--rdzv-backend=c10d",
        *([f"--rdzv-endpoint={endpoint}"] if endpoint else []),
        f"--rdzv-id={wanted.run_id if wanted.several else uuid.uuid4().hex}",
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

    The settings are torchrun's, parsed by torchrun; `show` prints the equivalent torchrun command to stderr.

    Raises:
        UserError: the rendezvous address is invalid, or another service listens there.
    """
    if wanted.several and wanted.join_seconds is not None:
        await_rendezvous(*wanted.address, wanted.join_seconds)
    extra = environment(wanted)
    os.environ.update(extra)
    os.environ.setdefault(LAUNCH, _name_of(wanted))
    if show:
        before = [f"{name}={value}" for name, value in extra.items()]
        print(shlex.join([*before, "torchrun", *torchrun_arguments(wanted, arguments)]), file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="rechub-dist-", ignore_cleanup_errors=True) as folder:
        options = torchrun_arguments(wanted, arguments, Path(folder) / "rendezvous")
        config, command, command_arguments = config_from_args(parse_args(options))
        assert isinstance(command, str)
        return run_agent(config, command, command_arguments, wanted.grace_seconds)


def _name_of(wanted: Launch) -> str:
    """A name that all agents of one launch share, and no others."""
    if not wanted.several:
        return uuid.uuid4().hex
    host, port = wanted.address
    _, address = addresses(host, port)[0]
    loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    return f"{wanted.run_id}@{host}:{port}{f' on {socket.gethostname()}' if loopback else ''}"


def serve_store(port: int) -> None:
    """Run a standalone rendezvous store until SIGTERM or SIGINT, so that any host of the run may die.

    Raises:
        UserError: the port is in use.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    store = open_store(port)
    print(f"store: listening on port {store.port}", file=sys.stderr, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
