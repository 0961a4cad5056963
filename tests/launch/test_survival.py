"""Every fault of benchmarks/survival.py: no row lost or doubled, and the losses of a run without faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

from faults.hosts import ROOT, possible


@pytest.mark.slow
def test_no_fault_leaves_a_trace() -> None:
    if not possible():
        pytest.skip("needs the right to make network namespaces (root), and iproute2")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "survival.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
