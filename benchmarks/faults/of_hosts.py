"""What befalls hosts and the cables between them. Each fault takes a scene, plays in it, and returns its times."""

from __future__ import annotations

import signal
import sys
import time

from faults.hosts import Command, Hosts
from faults.scene import RESUMED, TOLD, Fault, Scene, Times


def host_killed(scene: Scene) -> Times:
    """One of two hosts loses power."""
    hosts, run = _two_hosts(scene)
    at = time.monotonic()
    hosts.kill(1)
    return scene.goes_on(run, at, resized=True)


def link_cut(scene: Scene) -> Times:
    """The cable of one of two hosts is pulled."""
    hosts, run = _two_hosts(scene)
    at = time.monotonic()
    hosts.cut(1)
    return scene.goes_on(run, at, resized=True)


def link_cut_for_a_while(scene: Scene) -> Times:
    """The cable of one of two required hosts is pulled, and plugged in again after 20 s."""
    hosts = scene.hosts = Hosts(2)
    run, other = (scene.start_on(host, "2", "--outer-restarts", "9", "--max-restarts", "9") for host in (0, 1))
    scene.reach(110, run)
    at = time.monotonic()
    hosts.cut(1)
    time.sleep(20)
    hosts.heal(1)
    times = scene.goes_on(run, at)
    scene.finish(other)
    return times


def host_joins(scene: Scene) -> Times:
    """A second host joins a run: 1, then 2 hosts."""
    scene.hosts = Hosts(2)
    run = scene.start_on(0, "1:2")
    scene.reach(110, run)
    at = time.monotonic()
    scene.start_on(1, "1:2")
    run.wait_for(r"2 rank\(s\).*resumed", at)
    return scene.goes_on(run, at, resized=True)


def host_gone_and_back(scene: Scene) -> Times:
    """One of two hosts is killed and returns: 2, 1, then 2 hosts."""
    hosts, run = _two_hosts(scene)
    at = time.monotonic()
    hosts.kill(1)
    run.wait_for(r"1 rank\(s\).*resumed", at)
    first = run.saw(RESUMED, at)
    assert first is not None
    hosts.heal(1)
    scene.start_on(1, "1:2")
    run.wait_for(r"2 rank\(s\).*resumed", at)
    times = scene.goes_on(run, at, resized=True)
    return times._replace(resumed=first - at)


def host_preempted(scene: Scene) -> Times:
    """SIGTERM on one of two hosts: the other continues alone."""
    scene.hosts = Hosts(2)
    run, other = (scene.start_on(host, "1:2") for host in (0, 1))
    scene.reach(110, run)
    at = time.monotonic()
    other.signal(signal.SIGTERM)
    times = scene.goes_on(run, at, resized=True)
    scene.finish(other)
    return times


def rendezvous_host_killed(scene: Scene) -> Times:
    """The rendezvous host loses power, and is restarted after 5 s."""
    hosts = scene.hosts = Hosts(2)
    run, other = (scene.start_on(host, "2", "--outer-restarts", "9") for host in (0, 1))
    scene.reach(110, run)
    at = time.monotonic()
    hosts.kill(0)
    time.sleep(5)
    hosts.heal(0)
    again = scene.start_on(0, "2", "--outer-restarts", "9")
    told, resumed = other.wait_for(TOLD, at), again.wait_for(RESUMED, at)
    scene.finish(again)
    scene.finish(other)
    return Times(told - at, resumed - at)


def first_host_killed(scene: Scene) -> Times:
    """The first host loses power for good; a third host runs a standalone rendezvous store."""
    hosts = scene.hosts = Hosts(3)
    store = hosts.run(2, [sys.executable, "-m", "rechub_dist", "store", "--port", "29400"])
    store.wait_for("listening")
    store = ("--rdzv", f"{hosts.address(2)}:29400", "--rdzv-external")
    run, other = (scene.start_on(host, "1:2", *store) for host in (0, 1))
    scene.reach(110, run)
    at = time.monotonic()
    hosts.kill(0)
    return scene.goes_on(other, at, resized=True)


def _two_hosts(scene: Scene) -> tuple[Hosts, Command]:
    """Two hosts of one to two, at step 110, and the first one's command."""
    hosts = scene.hosts = Hosts(2)
    run, _ = (scene.start_on(host, "1:2") for host in (0, 1))
    run.wait_for(r"2 rank\(s\)")
    scene.reach(110, run)
    return hosts, run


OF_HOSTS: tuple[Fault, ...] = (
    host_killed,
    link_cut,
    link_cut_for_a_while,
    host_joins,
    host_gone_and_back,
    host_preempted,
    rendezvous_host_killed,
    first_host_killed,
)
