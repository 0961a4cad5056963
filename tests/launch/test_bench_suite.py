"""benchmarks/suite.py in small: records, what is passed over, parts that fail, and the page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from speed.page import BEGIN, END
from speed.record import Record, read_record

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def suite(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "suite.py"), "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=out.parent)


def found(out: Path, part: str) -> Record:
    return read_record(out / "records" / f"{part}.json")


def test_parts_are_measured_once_and_become_a_page(tmp_path: Path) -> None:
    out = tmp_path / "bench"
    done = suite(out, "e", "g", "r", "--smoke")
    assert done.returncode == 0, done.stdout + done.stderr + "".join(log.read_text() for log in out.glob("*.log"))
    for part in "egr":
        record = found(out, part)
        assert record.failed is None
        assert record.seconds > 0
        assert record.figures
        assert all(len(one.values) == 1 and one.values[0] > 0 for one in record.figures)
    assert [one.target for one in found(out, "e").figures if one.target] == [0.95]
    assert {one.target for one in found(out, "r").figures if one.target} == {0.8, 0.9, 0.95}
    assert [one.target for one in found(out, "g").figures] == [8.0, 0.5]
    assert not list(out.glob("e-*"))  # what it has used is gone

    before = found(out, "r").began
    assert suite(out, "r", "--smoke").stdout.startswith("r            The reader")
    assert found(out, "r").began == before
    assert suite(out, "r", "--smoke", "--again").returncode == 0
    assert found(out, "r").began != before

    page = tmp_path / "performance.md"
    page.write_text(f"{BEGIN}\n{END}")
    assert suite(out, "--docs", str(page)).returncode == 0
    text = page.read_text()
    assert "`--smoke`, which only show" in text
    assert all(f"\n## {part}. " in text for part in "egr")


def test_a_part_that_fails_is_recorded_and_others_go_on(tmp_path: Path) -> None:
    out = tmp_path / "bench"
    out.mkdir()
    (out / "data").write_text("no folder")
    done = suite(out, "e", "r", "--smoke")
    assert done.returncode == 1
    assert "e has failed: " in done.stdout
    assert found(out, "r").failed is None
    assert "data" in (found(out, "e").failed or "")


def test_what_it_refuses(tmp_path: Path) -> None:
    assert "no part 'z'" in suite(tmp_path / "bench", "z").stderr
    page = tmp_path / "performance.md"
    page.write_text("no marks")
    done = suite(tmp_path / "bench", "--docs", str(page))
    assert (done.returncode, done.stderr.count("\n")) == (2, 3)
