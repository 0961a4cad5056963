"""The rendezvous store: addresses of all kinds, and what listens there."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from rechub_dist.distributed.runtime import environment
from rechub_dist.errors import UserError
from rechub_dist.launching import launcher, rendezvous
from rechub_dist.launching.launcher import Launch, torchrun_arguments
from rechub_dist.launching.rendezvous import interface, is_here, listens, open_store, parse_address


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("host0:29500", ("host0", 29500)),
        ("host0", ("host0", 29400)),
        ("10.0.0.7:1", ("10.0.0.7", 1)),
        ("[fd00::1]:29500", ("fd00::1", 29500)),
        ("[::1]", ("::1", 29400)),
    ],
)
def test_addresses(given: str, expected: tuple[str, int]) -> None:
    assert parse_address(given) == expected


@pytest.mark.parametrize("given", ["", ":29500", "host0:x", "host0:99999", "fd00::1", "tcp://host0:1", "host0:1/run"])
def test_what_is_no_address(given: str) -> None:
    with pytest.raises(UserError, match="write HOST:PORT"):
        parse_address(given)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1", "localhost", "::1"])
def test_this_host(host: str) -> None:
    """Debian gives a host's own name the address 127.0.1.1."""
    assert is_here(host, 29400)


def test_another_host_and_none() -> None:
    assert not is_here("198.51.100.1", 29400)
    with pytest.raises(UserError, match=r"the host name 'nowhere\.invalid' does not resolve here"):
        is_here("nowhere.invalid", 29400)


def test_the_interface_of_a_loopback_address() -> None:
    assert interface("127.0.0.1", 29400, others=False) == ("lo", "127.0.0.1")
    assert interface("::1", 29400, others=False) == ("lo", "::1")


@pytest.fixture
def other_service() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_what_listens(other_service: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    assert listens("127.0.0.1", store.port)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert not listens("127.0.0.1", free.getsockname()[1])
    monkeypatch.setattr(rendezvous, "_ANSWER_SECONDS", 1.0)
    with pytest.raises(UserError, match=f"the service on port {other_service} of 127.0.0.1 is not a rendezvous store"):
        listens("127.0.0.1", other_service)
    with pytest.raises(UserError, match=f"--port {other_service}: something listens there already"):
        open_store(other_service)


def test_torchrun_is_told_who_keeps_the_rendezvous() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for host, told in (("127.0.1.1", f"127.0.1.1:{port}"), ("[::1]", f"[::1]:{port}")):
        arguments = torchrun_arguments(Launch(1, "1:2", f"{host}:{port}"), [])
        assert f"--rdzv-endpoint={told}" in arguments
        assert any("is_host=true" in argument for argument in arguments)


@pytest.mark.parametrize("wanted", [Launch(2), Launch(2, "1", "host0:29400"), Launch(2, "1:1", "host0:29400")])
def test_a_single_host_has_its_rendezvous_in_a_file(wanted: Launch) -> None:
    arguments = torchrun_arguments(wanted, [], Path("/tmp/mine/rendezvous"))
    assert "--rdzv-endpoint=/tmp/mine/rendezvous" in arguments
    assert any("store_type=file" in argument for argument in arguments)
    assert "--local-addr=127.0.0.1" in arguments
    assert not any("host0" in argument for argument in arguments)
    assert not any("endpoint" in argument for argument in torchrun_arguments(wanted, []))  # torchrun makes a file
    assert launcher._name_of(wanted) != launcher._name_of(wanted)  # host0 need not resolve


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "has WORLD_SIZE=2, but no MASTER_ADDR, MASTER_PORT: start ranks with"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "has WORLD_SIZE=2, but no RANK:"),
        ({"WORLD_SIZE": "two"}, "has WORLD_SIZE=two, which is not a number"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, r"srun has started several .* \(this is task 1\)"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, r"srun has started several .* \(this is task 0\)"),
    ],
)
def test_an_environment_that_is_a_part_of_something(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert environment() == (0, 1, 0, 1)
    monkeypatch.setenv("SLURM_PROCID", "0")  # of a batch script that was given --ntasks, and of one task
    assert environment() == (0, 1, 0, 1)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        environment()
