"""What the measurements share: their settings and results, the data set, and what the device is doing meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DENSE = [f"dense_{i}" for i in range(13)]
SPARSE = [f"sparse_{i}" for i in range(26)]
DIM, HIDDEN = 16, [256, 128]
TABLE_LR, DENSE_LR = 0.02, 1e-3


@dataclass(frozen=True)
class Setting:
    """Where results go, on which device, and whether sizes are those that only show that it works."""

    out: Path
    device: str
    small: bool

    @property
    def vocabulary(self) -> int:
        """Ids of each sparse feature."""
        return 2000 if self.small else 1_000_000

    @property
    def rows(self) -> int:
        """Rows of the data set; 8 in 10 train."""
        return 20_000 if self.small else 2_600_000

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes."""
        return (512,) if self.small else (8192, 32768)

    @property
    def data(self) -> Path:
        """The data set's folder."""
        return self.out / "work" / f"data-{self.rows}"

    def tell(self, check: str, *, ok: bool | None = None, **found: Any) -> None:
        """One line of the results: `ok` is None of a measurement, False of one that failed."""
        line = json.dumps({"check": check, "ok": ok, **found}, default=str)
        with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    @contextlib.contextmanager
    def guarded(self, check: str, **about: Any) -> Iterator[None]:
        """Whatever is raised within becomes a line, and does not keep the next case from running."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.tell(check, ok=False, **about, error=f"{type(error).__name__}: {error}"[:400])

    def wait(self) -> None:
        """For what the device still has to do."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def env(setting: Setting) -> None:
    """What there is: versions, the card, and whether its kernels work at all."""
    found: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    for name in ("fbgemm_gpu", "torchrec", "rechub_dist"):
        module = __import__(name)
        found[name] = getattr(module, "__version__", None)
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory_gb": round(properties.total_memory / 2**30, 1)}
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        with contextlib.suppress(OSError):
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
            found["driver"] = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    lengths = torch.arange(4, device=setting.device)
    sums = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths).tolist()
    setting.tell("env", ok=sums == [0, 0, 1, 3, 6], **found)


def data(setting: Setting) -> None:
    """The data set of `throughput` and `profile`; one that is there is kept."""
    from rechub_dist.data.prepare.synthetic import synthesize  # noqa: PLC0415

    began = time.perf_counter()
    if not (setting.data / "dataset.yaml").exists():
        shutil.rmtree(setting.data, ignore_errors=True)
        shape = {"dense": len(DENSE), "sparse": len(SPARSE), "vocabulary": setting.vocabulary}
        synthesize(setting.data, setting.rows, files=8, **shape)
    setting.tell("data", ok=True, seconds=round(time.perf_counter() - began, 1))


class Sampler:
    """The device's utilisation, as nvidia-smi has it, and this process's CPU time."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._values: list[int] = []
        self._end = threading.Event()
        self.seconds = self._cpu = 0.0

    def __enter__(self) -> Sampler:
        self._began, self._cpu_began = time.perf_counter(), time.process_time()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self._began
        self._cpu = time.process_time() - self._cpu_began

    def told(self) -> dict[str, Any]:
        """The median utilisation in percent, None where nobody knows it, and how many cores have worked."""
        busy = statistics.median(self._values) if self._values else None
        return {"gpu_percent": busy, "cores_used": round(self._cpu / self.seconds, 2)}

    def _run(self) -> None:
        while self._device == "cuda" and not self._end.wait(0.1):
            try:
                self._values.append(torch.cuda.utilization())
            except Exception:  # without NVML
                return
