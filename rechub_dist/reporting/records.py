"""The records of a run, a line of JSON each: `metrics.jsonl` in its output folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

RECORDS: Final = "metrics.jsonl"


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records in an output folder, without a last line that a kill has cut short; none where there is no file."""
    path = folder / RECORDS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
