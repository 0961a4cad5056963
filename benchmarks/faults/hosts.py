"""Several hosts on one Linux machine: network namespaces with a switch between them, apart from all other networks."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
_KNOWN = Path("/etc/netns")  # what lies in /etc of each namespace, for `ip netns exec`
_serial = itertools.count()


def possible() -> bool:
    """Whether this process may make network namespaces (root, or CAP_NET_ADMIN and CAP_SYS_ADMIN, and `ip`)."""
    name = f"rdprobe{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
    if made:
        subprocess.run(["ip", "netns", "del", name], check=True)
    return made


class Command:
    """A running command, in a session of its own; every line that it prints is kept with the time it came at."""

    def __init__(self, arguments: list[str], environment: dict[str, str] | None = None) -> None:
        self.lines: list[tuple[float, str]] = []
        self._process = subprocess.Popen(
            ["env", "--default-signal=HUP", *arguments],  # it takes hang-ups even where nohup has started us
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Of the process that was started: a shell, or the agent."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    @property
    def text(self) -> str:
        """All that it has printed."""
        return "".join(f"{line}\n" for _, line in list(self.lines))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    def saw(self, pattern: str, after: float = 0.0) -> float | None:
        """When the first line came that has `pattern`, not before `after`."""
        return next((at for at, line in list(self.lines) if at >= after and re.search(pattern, line)), None)

    def wait_for(self, pattern: str, after: float = 0.0, timeout: float = 180.0) -> float:
        """Wait for such a line; returns when it came.

        Raises:
            RuntimeError: the command has ended without it, or it did not come in time.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            ended = self.code is not None
            if ended:
                self._reader.join(10)
            found = self.saw(pattern, after)
            if found is not None:
                return found
            if ended:
                break
            time.sleep(0.01)
        raise RuntimeError(f"no line with {pattern!r}; exit code {self.code}:\n{self.text}")

    def wait(self, timeout: float = 300.0) -> int:
        """Its exit code, when it has ended and all is read."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"does not end:\n{self.text}") from None
        self._reader.join(10)
        return code

    def signal(self, number: signal.Signals) -> None:
        """Signal the process that was started."""
        os.kill(self.pid, number)

    def tree(self) -> list[int]:
        """The processes below it, itself first, parents before children."""
        found = [self.pid]
        for pid in found:
            with suppress(OSError):
                found += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return found

    def workers(self) -> dict[int, int]:
        """Process by rank, of the ranks that run below it now."""
        found = {}
        for pid in self.tree():
            with suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                rank = next((int(word[5:]) for word in words if word.startswith(b"RANK=")), None)
                if rank is not None:
                    found[rank] = pid
        return found

    def agent(self) -> int:
        """The agent's process: the parent of the workers."""
        worker = next(iter(self.workers().values()))
        return int(Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[1])

    def kill(self) -> None:
        """SIGKILL to all of it at once, as when its host loses power."""
        for pid in self.tree():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


class Hosts:
    """`count` hosts, numbered from 0, each with an address at one switch."""

    def __init__(self, count: int) -> None:
        self._prefix = f"rd{os.getpid()}n{next(_serial)}"
        self._switch = f"{self._prefix}s"
        self._commands: list[Command] = []
        self.count = 0
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for host in range(count):
            name = self._name(host)
            _ip("netns", "add", name)
            self.count += 1
            _ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"p{host}", "netns", self._switch)
            _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", self._switch, "link", "set", f"p{host}", "master", "br0")
            self.heal(host)
            (_KNOWN / name).mkdir(parents=True)
            (_KNOWN / name / "hosts").write_text("127.0.0.1 localhost\n", encoding="ascii")

    def address(self, host: int) -> str:
        """Its address."""
        return f"10.77.0.{10 + host}"

    def run(self, host: int, arguments: list[str], environment: dict[str, str] | None = None) -> Command:
        """Start a command there."""
        command = Command(["ip", "netns", "exec", self._name(host), *arguments], environment)
        self._commands.append(command)
        return command

    def name(self, name: str, host: int) -> None:
        """From here on all hosts know a host by this name, too."""
        for knowing in range(self.count):
            table = _KNOWN / self._name(knowing) / "hosts"
            with table.open("a", encoding="ascii") as file:
                file.write(f"{self.address(host)} {name}\n")

    def kill(self, host: int) -> None:
        """End all that runs there, as when its power fails: nothing is said to anyone."""
        self.cut(host)
        found = subprocess.run(["ip", "netns", "pids", self._name(host)], capture_output=True, text=True, check=True)
        for pid in found.stdout.split():
            with suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)

    def cut(self, host: int) -> None:
        """Pull its cable."""
        _ip("-n", self._switch, "link", "set", f"p{host}", "down")

    def heal(self, host: int) -> None:
        """Put the cable in again."""
        _ip("-n", self._switch, "link", "set", f"p{host}", "up")

    def close(self) -> None:
        """End everything."""
        for command in self._commands:
            command.kill()
        for host in range(self.count):
            self.kill(host)
            _ip("netns", "del", self._name(host))
            shutil.rmtree(_KNOWN / self._name(host))
        _ip("netns", "del", self._switch)

    def _name(self, host: int) -> str:
        return f"{self._prefix}h{host}"


def train_command(run_file: Path, *options: str) -> list[str]:
    """The one documented command."""
    script = str(ROOT / "launch" / "torchrun.sh")
    return ["env", f"PYTHON={sys.executable}", "bash", script, str(run_file), *options]


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
