"""The table of docs/gpu.md, from results: one block for each card and set of versions that was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

BEGIN = "<!-- from here to the end mark `make gpu-check` writes: a block for each card and versions -->"
END = "<!-- end -->"

Line = dict[str, Any]


def write(document: Path, results: Path) -> None:
    """Put the block of these results between the marks, in place of that of the same card and versions.

    Raises:
        ValueError: no marks in the document, or no environment in the results.
    """
    text = document.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{document} must have once each the lines\n{BEGIN}\n{END}")
    before, rest = text.split(BEGIN)
    old, after = rest.split(END)
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    heading, new = block(lines, _tests(results.parent.glob("pytest*.xml")))
    blocks = {part.splitlines()[0]: part.strip() for part in ("\n" + old.strip()).split("\n### ") if part.strip()}
    blocks[heading] = new
    body = "\n\n".join(f"### {part}" for part in blocks.values())
    document.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")


def block(lines: Iterable[Line], tests: str = "") -> tuple[str, str]:
    """The heading, and the block that begins with it.

    Raises:
        ValueError: the results do not say what they were measured on.
    """
    lines = list(lines)
    about = next((line for line in lines if line["check"] == "env" and line.get("torch")), None)
    if about is None:
        raise ValueError("the results do not say what they were measured on: run the check `env` as well")
    versions = f"torch {about['torch']}, torchrec {about['torchrec']}, fbgemm {about['fbgemm_gpu']}"
    heading = f"{about.get('gpu', 'CPU, which shows only that it works')}, {versions}"
    driver = f"driver {about['driver']}, " if about.get("driver") else ""
    memory = f"{about['memory_gb']} GiB, " if about.get("memory_gb") else ""
    parts = [heading, f"{memory}{driver}{about['cores']} CPU cores.{tests}", _table(lines)]
    if profile := next((line for line in lines if line["check"] == "profile" and "ms_per_step" in line), None):
        parts.append(_profile(profile))
    if failed := [line for line in lines if line["ok"] is False and "error" in line]:
        parts.append("Failed: " + "; ".join(f"{_name(line)}: {line['error']}" for line in failed))
    return heading, "\n\n".join(parts)


def _table(lines: list[Line]) -> str:
    measured = [line for line in lines if "samples_per_s" in line]
    plain = {line["batch"]: line["samples_per_s"] for line in measured if line.get("how") == "plain"}
    rows = ["| | batch | samples/s | of bare | GPU busy | waited for the reader |", "|---|---|---|---|---|---|"]
    for line in sorted(measured, key=lambda line: (line["batch"], line["check"])):
        # the bare loop is DeepFM's
        base = plain.get(line["batch"]) if line["check"] == "bare" or line["model"] == "DeepFM" else None
        share = f"{line['samples_per_s'] / base:.2f}" if base else ""
        busy = f"{line['gpu_percent']:.0f}%" if line.get("gpu_percent") is not None else ""
        waited = f"{line['waiting_share']:.0%}" if "waiting_share" in line else ""
        rate = float(f"{line['samples_per_s']:.4g}")
        rows.append(f"| {_name(line)} | {line['batch']} | {rate:,.0f} | {share} | {busy} | {waited} |")
    return "\n".join(rows)


def _name(line: Line) -> str:
    if line["check"] == "bare" and "how" in line:
        return "bare, without a pipeline" if line["how"] == "plain" else "bare, `TrainPipelineSparseDist`"
    if "pipeline" in line and "model" in line:
        return f"{line['model']}, `pipeline: {line['pipeline']}`"
    return str(line["check"])


def _profile(line: Line) -> str:
    batch = f" of batch {line['batch']}" if "batch" in line else ""
    return (
        f"Profiled, a step of DeepFM{batch} takes {line['ms_per_step']:.1f} ms; the GPU works for "
        f"{line['gpu_busy_share']:.0%} of it, on {line['launches_per_step']:.0f} kernels and copies."
    )


def _tests(reports: Iterable[Path]) -> str:
    """How `pytest -m gpu` ended, where it has left its reports."""
    suites = [suite for report in reports for suite in ElementTree.parse(report).getroot().iter("testsuite")]
    if not suites:
        return ""
    count = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    return f" Tests: {passed} passed, {failed} failed, {count['skipped']} skipped or failed as expected."
