"""What a host gives: memory, open files, shared memory, a home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rechub_dist.data.parquet.footers import FooterCache
from rechub_dist.distributed.host import free_memory, host_memory, require_home, warn_of_little_shared_memory
from rechub_dist.errors import UserError

GB = 2**30


def group(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("own", "parent", "expected"), [("1073741824", "max", GB), ("max", "536870912", GB // 2), ("max", "max", None)]
)
def test_version_2(tmp_path: Path, own: str, parent: str, expected: int | None) -> None:
    (tmp_path / "cgroup").write_text("0::/pods/mine\n")
    group(tmp_path / "sys" / "pods", "memory.max", parent)
    group(tmp_path / "sys" / "pods" / "mine", "memory.max", own)
    assert host_memory(tmp_path / "cgroup", tmp_path / "sys") == (expected or host_memory(tmp_path / "none"))


def test_what_is_free(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:  {GB >> 10} kB\nHugePages_Total: 0\n")
    there = (tmp_path / "cgroup", tmp_path / "sys", tmp_path / "meminfo")
    assert free_memory(*there) == GB
    (tmp_path / "cgroup").write_text("0::/pods/mine\n")
    group(tmp_path / "sys" / "pods" / "mine", "memory.max", str(GB))
    group(tmp_path / "sys" / "pods" / "mine", "memory.current", str(GB // 2))
    assert free_memory(*there) == GB // 2
    group(tmp_path / "sys" / "pods" / "mine", "memory.stat", f"anon 3\ninactive_file {GB // 4}")
    assert free_memory(*there) == GB // 4 * 3
    (tmp_path / "cgroup").write_text("4:memory:/box\n")
    group(tmp_path / "sys" / "memory" / "box", "memory.limit_in_bytes", str(GB))
    group(tmp_path / "sys" / "memory" / "box", "memory.usage_in_bytes", str(2 * GB))
    assert free_memory(*there) == 0
    assert 0 < free_memory(tmp_path / "none", tmp_path, tmp_path / "none") == host_memory(tmp_path / "none")


def test_version_1_beside_version_2(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("3:cpuset:/\n4:memory:/box\n0::/\n")
    group(tmp_path / "sys" / "memory" / "box", "memory.limit_in_bytes", str(GB))
    group(tmp_path / "sys" / "memory", "memory.limit_in_bytes", str(2**63 - 4096))  # none
    assert host_memory(tmp_path / "cgroup", tmp_path / "sys") == GB


def test_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/pods/of/the/host\n")
    group(tmp_path / "sys", "memory.max", str(GB))
    assert host_memory(tmp_path / "cgroup", tmp_path / "sys") == GB


def test_no_control_groups(tmp_path: Path) -> None:
    assert host_memory(tmp_path / "none", tmp_path) > GB // 4


@pytest.mark.parametrize(("limit", "ranks", "fits"), [(400, 30, True), (400, 60, False)])
def test_open_files(limit: int, ranks: int, fits: bool) -> None:
    code = (
        "import resource; from rechub_dist.distributed.host import allow_open_files; "
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (100, {limit})); allow_open_files({ranks}); "
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if fits:
        assert done.stdout == f"({limit}, {limit})\n"
    else:
        assert "a process may open 400 files here, and a rank of 60 needs 536: raise the limit" in done.stderr


def test_little_shared_memory_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_little_shared_memory(2, str(tmp_path / "none"))
    warn_of_little_shared_memory(1, "/proc")  # a file system of 0 bytes
    assert capsys.readouterr().err == ""
    warn_of_little_shared_memory(2, "/proc")
    assert capsys.readouterr().err.startswith(
        "warning: /proc has 0 MB, through which NCCL moves data between the 2 ranks"
    )


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become a user without an entry in the passwd file")
def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    child = os.fork()
    if not child:
        os.setuid(54321)
        try:
            require_home()
        except UserError as error:
            told = str(error).startswith("user 54321 has no entry in the passwd file, and HOME is not set: set HOME")
            os._exit(0 if told and FooterCache("any").load() == {} else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
