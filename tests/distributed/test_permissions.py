"""What a run writes has the permissions that its user asks for, and no others."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rechub_tests.runs import output, run_file, write_data

UMASK = 0o027


@pytest.mark.slow
def test_files_keep_to_the_umask(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    path = run_file(tmp_path, tmp_path / "data", "DeepFM", train={"max_steps": 3}, checkpoint={"every_steps": 2})
    command = [sys.executable, "-m", "rechub_dist", "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, umask=UMASK, check=False)
    assert done.returncode == 0, done.stderr
    written = [output(path), *output(path).rglob("*")]
    names = {found.name for found in written}
    assert names >= {"config.yaml", "manifest.json", "metrics.jsonl", "rank-0.jsonl", ".lease"}
    modes = {str(found.relative_to(tmp_path)): stat.S_IMODE(found.stat().st_mode) for found in written}
    expected = {str(found.relative_to(tmp_path)): (0o777 if found.is_dir() else 0o666) & ~UMASK for found in written}
    assert modes == expected
