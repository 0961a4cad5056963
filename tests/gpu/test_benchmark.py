"""benchmarks/gpu.py in small and on CPU, and the table that it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from on_gpu.docs import BEGIN, END, block, write
from on_gpu.trace import summary, total, union

ROOT = Path(__file__).parents[2]
ENV = {"check": "env", "ok": True, "torch": "2.1", "torchrec": "1.1", "fbgemm_gpu": "1.2", "cores": 4, "gpu": "Card A"}
BARE = {"check": "bare", "ok": None, "batch": 8, "how": "plain", "samples_per_s": 2000, "gpu_percent": 40.0}
OURS = {
    "check": "throughput",
    "ok": None,
    "model": "DeepFM",
    "pipeline": "auto",
    "batch": 8,
    "samples_per_s": 1500,
    "gpu_percent": 7,
    "waiting_share": 0.25,
}
TEXT = f"before\n{BEGIN}\n\n{END}\nafter\n"
REPORT = '<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>'


def lines_to(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_table_has_a_block_for_each_card(tmp_path: Path) -> None:
    document = tmp_path / "gpu.md"
    document.write_text(TEXT)
    write(document, lines_to(tmp_path, ENV, BARE, OURS))
    write(document, lines_to(tmp_path, {**ENV, "gpu": "Card B"}, {**OURS, "model": "DCNv2"}))
    (tmp_path / "pytest.xml").write_text(REPORT)
    failed = {"check": "profile", "ok": False, "error": "exit code 1"}
    write(document, lines_to(tmp_path, ENV, BARE, {**OURS, "samples_per_s": 1800}, failed))  # in place of the first
    text = document.read_text()
    assert text.startswith(f"before\n{BEGIN}\n\n### Card A, torch 2.1, torchrec 1.1, fbgemm 1.2\n")
    assert text.endswith(f"\n\n{END}\nafter\n")
    first, second = text.split("\n### ")[1:]
    assert "| bare, without a pipeline | 8 | 2,000 | 1.00 | 40% |  |" in first
    assert "| DeepFM, `pipeline: auto` | 8 | 1,800 | 0.90 | 7% | 25% |" in first
    assert "5 passed, 2 failed, 2 skipped" in first
    assert "Failed: profile: exit code 1" in first
    assert second.startswith("Card B, torch 2.1")
    assert "| DCNv2, `pipeline: auto` | 8 | 1,500 |  | 7% | 25% |" in second
    assert "1,500" not in first


def test_a_table_without_a_place_or_a_card(tmp_path: Path) -> None:
    document = tmp_path / "gpu.md"
    document.write_text("no marks")
    with pytest.raises(ValueError, match="once each the lines"):
        write(document, lines_to(tmp_path, ENV))
    assert document.read_text() == "no marks"
    with pytest.raises(ValueError, match="what they were measured on"):
        block([BARE])


def test_the_marks_of_the_documentation() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1


def test_overlap_in_a_trace() -> None:
    def event(category: str, name: str, began: float, took: float, stream: int = 0) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "ts": began, "dur": took, "args": {"stream": stream}}

    assert union([(5, 7), (0, 2), (1, 3)]) == [(0, 3), (5, 7)]
    assert total([(0, 3), (5, 7)]) == 5
    events = [
        event("kernel", "a", 0, 400, 7),
        event("kernel", "b", 600, 200, 7),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 300, 200, 9),
        event("cuda_runtime", "cudaStreamSynchronize", 0, 5),
        {"ph": "M", "name": "a name of a process"},
    ]
    found = summary(events, 2, 0.001)
    assert found["ms_per_step"] == 0.5
    assert found["gpu_busy_share"] == 0.7
    assert found["overlapped_ms"] == 0.1
    assert found["launches_per_step"] == 1.5
    assert found["copies_per_step"] == {"Memcpy HtoD (Pageable -> Device)": [0.5, 0.1]}
    assert found["host_calls_per_step"] == {"cudaStreamSynchronize": 0.5}


@pytest.mark.slow
def test_all_of_it_in_small_on_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(tmp_path / "out")]
    small = [*command, "--device", "cpu", "--small", "--budget", "3600"]
    done = subprocess.run(small, capture_output=True, text=True, check=False)
    said = done.stdout + "".join(log.read_text() for log in (tmp_path / "out").glob("*.log"))
    assert done.returncode == 0, said
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {line["check"] for line in lines} == {"env", "data", "bare", "throughput", "profile"}
    rates = {(line["check"], line.get("how") or line["model"]) for line in lines if line.get("samples_per_s", 0) > 0}
    assert rates == {("bare", "plain"), ("bare", "pipeline"), ("throughput", "DeepFM"), ("throughput", "DCNv2")}
    again = subprocess.run([*small, "--only", "env"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == len(lines)  # the others are kept
    document = tmp_path / "gpu.md"
    document.write_text(TEXT)
    subprocess.run([*command, "--docs", str(document)], check=True)
    assert document.read_text().count("| DeepFM, `pipeline: auto` | 512 |") == 1
