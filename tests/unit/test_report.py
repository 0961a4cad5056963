"""Records on a disk that has no room for them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_RUN = """
import resource, sys
from pathlib import Path
import numpy as np
from rechub_dist.reporting.reporter import Reporter

report = Reporter(Path(sys.argv[1]), quiet=False)
for step in range(1, 41):
    if step == 11:  # no file may grow beyond 1 kB from here on, and again at the end
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    if step == 31:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    report.record("train", step, 0, {"loss": 0.5, "samples_per_second": 1000.0})
    report.histogram("predictions", np.random.default_rng(0).random(1000), step)
report.close()
print("done")
"""


def test_a_full_disk_costs_records_and_not_the_run(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _RUN, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "done\n"
    # a thread of TensorBoard's may tell the same at the same time, on the same line
    warnings = [line[line.index("warning:") :] for line in done.stderr.splitlines() if "warning:" in line]
    assert warnings == [f"warning: {tmp_path} cannot be written: File too large; training continues, records are lost"]
    steps = []
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        try:
            steps.append(json.loads(line)["step"])
        except ValueError:
            continue  # cut short where the room ended
    assert set(range(1, 11)) < set(steps)
    assert 40 in steps, "written again as soon as there is room"
