"""A checkpoint with one bit or byte that is not as it was written is refused by name, and the one before it used."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rechub_dist.checkpoint import saved_steps
from rechub_dist.errors import UserError
from rechub_tests.ranks import RankPool
from rechub_tests.runs import output, position, run_file, train


@pytest.fixture(scope="module")
def four_saves(pool: RankPool, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sections = {"train": {"max_steps": 16}, "checkpoint": {"every_steps": 4, "keep_last": 4}}
    path = run_file(tmp_path_factory.mktemp("saves"), data_root, "DeepFM", **sections)
    pool.run(2, train, path)
    return path


def flip(offset: Callable[[int], int]) -> Callable[[Path], None]:
    def work(path: Path) -> None:
        with path.open("r+b") as file:
            at = offset(path.stat().st_size)
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 16]))

    return work


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "header": ("rank-00001-*", flip(lambda _: 20), "bytes 0 to .* do not match their checksum"),
    "first": ("rank-00000-*", flip(lambda _: 0), "bytes 0 to .* do not match their checksum"),
    "body": ("rank-00000-*", flip(lambda size: size // 2), "bytes 0 to .* do not match their checksum"),
    "last": ("rank-00001-*", flip(lambda size: size - 1), "bytes 0 to .* do not match their checksum"),
    "manifest": ("manifest.json", flip(lambda size: size // 2), "is damaged"),
    "manifest-end": ("manifest.json", flip(lambda size: size - 1), "is damaged"),
    "short": ("rank-00001-*", shorten, r"is damaged: \d+ bytes instead of \d+"),
    "short-manifest": ("manifest.json", shorten, "is damaged"),
    "missing": ("rank-00000-*", Path.unlink, "is missing"),
}


@pytest.mark.parametrize(("pattern", "work", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_refused_by_name_and_the_newest_good_one_is_used(
    pool: RankPool,
    four_saves: Path,
    data_root: Path,
    tmp_path: Path,
    pattern: str,
    work: Callable[[Path], None],
    message: str,
) -> None:
    path = run_file(tmp_path, data_root, "DeepFM")
    shutil.copytree(output(four_saves), output(path))
    folder = output(path) / "checkpoints"
    *_, good, second, newest = saved_steps(folder)
    for step in (newest, second):
        [victim] = (folder / f"step-{step:010d}").glob(pattern)
        work(victim)
    # Three ranks verify what two have saved.
    for rank, (step, told) in enumerate(pool.run(3, position, path)):
        assert step == good
        if rank == 0:
            lines = told.splitlines()
            assert len(lines) == 2
            for line, refused in zip(lines, (newest, second), strict=True):
                assert line.startswith("warning: ")
                assert line.endswith("; trying the checkpoint before it")
                assert f"step-{refused:010d}/{pattern.removesuffix('*')}" in line
                assert re.search(message, line)


def test_without_a_good_one_nothing_is_begun(pool: RankPool, four_saves: Path, data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM")
    shutil.copytree(output(four_saves), output(path))
    for file in (output(path) / "checkpoints").rglob("rank-00000-*"):
        flip(lambda size: size - 1)(file)
    with pytest.raises(
        UserError, match=r"no checkpoint can be read: .*restore it from a copy, or choose another output_dir"
    ):
        pool.run(2, position, path)
