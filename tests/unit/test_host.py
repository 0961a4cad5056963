"""The memory that there is: the least that any control group of this process allows."""

from __future__ import annotations

from pathlib import Path

import pytest

from rechub_dist.distributed.host import host_memory

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
