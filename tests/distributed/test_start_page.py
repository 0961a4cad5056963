"""docs/start.md: what it tells its readers to type, typed in its order."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(sh|text)\n(.*?)```", TEXT, re.DOTALL)


def said(folder: Path, block: str) -> str:
    """What the commands of a block print."""
    env = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env |= {"COLUMNS": "120", "OMP_NUM_THREADS": "1"}  # beside other tests, more threads wait for each other
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(["sh", "-e"], text=True, cwd=folder, env=env, start_new_session=True, **pipes) as shell:
        try:
            stdout, stderr = shell.communicate(block)
        finally:
            with suppress(ProcessLookupError):  # a server that a failing block has left
                os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, (block, stdout[-2000:], stderr[-3000:])
    return stdout


@pytest.mark.slow
def test_the_first_ten_minutes(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name, module in (("rechub-dist", "-m rechub_dist"), ("python", "")):
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
        script.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    answer = ""
    for kind, block in BLOCKS:
        if kind == "sh":
            answer = said(tmp_path, block.replace("8000", port) if "serve" in block else block)
        else:
            assert [line for line in block.splitlines() if line not in answer] == []
    scores = json.loads(answer[answer.rindex('{"bundle"') :])["columns"]["predicted_rating_high"]
    assert len(scores) == 2
    assert all(0 < score < 1 for score in scores)
    predicted = pq.read_table(tmp_path / "mine" / "predictions")
    assert predicted.num_rows == 800
    assert {"userId", "movieId", "predicted_rating_high"} <= set(predicted.column_names)
    assert (tmp_path / "mine" / "data.html").is_file()
