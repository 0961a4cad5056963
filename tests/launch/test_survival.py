"""benchmarks/survival.py, by some of its faults: no row lost or doubled, and the losses of a run without faults.

All of them take half an hour; most befall runs of other tests here, too.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from faults.hosts import ROOT, possible

FAULTS = ("sighup", "killed_while_saving", "taken_over", "host_joins")


@pytest.mark.slow
def test_no_fault_leaves_a_trace() -> None:
    if not possible():
        pytest.skip("needs the right to make network namespaces (root), and iproute2")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "survival.py"), *FAULTS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
