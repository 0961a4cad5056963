"""An export, with its comparison, of tables four times as large as the memory that it may have."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.checkpoint.folder import Folder
from rechub_dist.checkpoint.load import read_manifest
from rechub_dist.checkpoint.manifest import BLOCK, FileRecord, SavedPiece, SavedTensor, checksum, render
from rechub_dist.config import StorageConfig
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_tests.runs import SCHEMA, run_file, train, write_data

pytestmark = pytest.mark.slow
# Of memory of the process's own, not of files' pages, which the system takes back: with `RLIMIT_AS` no large file could
# be mapped, and `RLIMIT_RSS` does nothing on Linux.
LIMIT = 1 << 30
DIM = 256
ROWS = 4 * LIMIT // (4 * DIM)
MARK = 4999  # rows of the table that is made larger afterwards
# What threads and allocators have in reserve counts as well.
SPARING = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def write_large(root: Path, model: str, table: str) -> Path:
    """A run's output, one of whose tables has ROWS rows, all zero but for those that its valid split reads."""
    schema = {**SCHEMA, "tables": {**SCHEMA["tables"]}, "features": {**SCHEMA["features"]}}  # type: ignore[dict-item]
    if table == "item":
        schema["tables"]["item"] = {"rows": MARK, "init_std": 0.3}  # type: ignore[index]
    else:
        schema["features"]["user"] = {"kind": "sparse", "rows": MARK, "init_std": 0.3}  # type: ignore[index]
    write_data(root / "data")
    (root / "data" / "dataset.yaml").write_text(json.dumps(schema))
    sections: dict[str, Any] = {"embedding": {"optimizer": {"name": "sgd", "lr": 0.05}}, "train": {"epochs": 1}}
    if table == "user":
        sections["model"] = {"features": ["user", "tags", "age"]}
        sections["embedding"]["dim"] = DIM
    else:
        sections["model"] = {"hidden_size": DIM}
    train(run_file(root, root / "data", model, **sections))
    ids = np.random.default_rng(0).permutation(ROWS)
    for part in (root / "data" / "valid").glob("*.parquet"):
        rows = pq.read_table(part)
        mine = pa.array(ids[: rows.num_rows])
        rows = rows.set_column(rows.column_names.index(table), table, mine)
        if table == "item":
            history = pa.ListArray.from_arrays(
                pa.array(np.arange(rows.num_rows + 1, dtype=np.int32) * 3), pa.array(ids[: 3 * rows.num_rows])
            )
            rows = rows.set_column(rows.column_names.index("history"), "history", history)
        pq.write_table(rows, part)
    _grow(root / "out" / "checkpoints", table, ids[:300])
    return root / "out"


def _grow(checkpoints: Path, table: str, ids: np.ndarray) -> None:
    """Put a table of ROWS rows in the place of one of MARK rows, in a file with holes."""
    folder = max(checkpoints.glob("step-*"))
    manifest = read_manifest(Folder(str(checkpoints), StorageConfig()), int(folder.name.removeprefix("step-")))
    file, rng = folder / "large.safetensors", np.random.default_rng(1)
    with file.open("wb") as out:
        out.truncate(ROWS * DIM * 4)
        for row in ids.tolist():
            out.seek(row * DIM * 4)
            out.write(rng.normal(size=DIM).astype("<f4").tobytes())
    sums = []
    with file.open("rb") as whole:
        while block := whole.read(BLOCK):
            sums.append(checksum(block))
    key = f"tables/{table}/weight"
    tensors = {**manifest.tensors, key: SavedTensor("F32", (ROWS, DIM), [SavedPiece(file.name, 0, 0, 0, ROWS, DIM)])}
    tables = {**manifest.run["tables"], table: {**manifest.run["tables"][table], "rows": ROWS}}
    config = re.sub(rf"\brows: {MARK}\b", f"rows: {ROWS}", manifest.run["config"])
    assert config != manifest.run["config"]
    grown = replace(
        manifest, tensors=tensors, files={**manifest.files, file.name: FileRecord(ROWS * DIM * 4, sums)},
        run={**manifest.run, "tables": tables, "config": config},
    )  # fmt: skip
    (folder / "manifest.json").write_bytes(render(grown))


def limited(folder: Path, *arguments: str) -> tuple[int, str, int]:
    """Python with these arguments, in LIMIT bytes of memory: its exit code, what it says, and its pages at most."""
    log = folder / "log"
    with log.open("wb") as out:
        line = [sys.executable, *arguments]
        process = subprocess.Popen(line, stdout=out, stderr=out, env={**os.environ, **SPARING})
        resource.prlimit(process.pid, resource.RLIMIT_DATA, (LIMIT, LIMIT))  # before it has imported anything
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, log.read_text(), used.ru_maxrss << 10


@pytest.mark.parametrize(("model", "table"), [("DCN", "user"), ("SASRec", "item")])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_tables_need_not_fit_in_memory(roomy: Path, model: str, table: str, precision: str) -> None:
    out = write_large(roomy, model, table)
    code, told, _ = limited(roomy, "-c", f"import rechub_dist; rechub_dist.load({str(out)!r})")
    assert (code, "memory" in told.lower()) == (1, True), told[-2000:]
    export = ("-m", "rechub_dist", "export", str(out), "--out", str(roomy / "bundle"), "--tables", precision)
    code, told, pages = limited(roomy, *export)
    assert code == 0, told[-2000:]
    print(f"\n{told.strip()}\nlargest resident set, with pages of files: {pages / 2**20:,.0f} MiB")
    manifest = Bundle(roomy / "bundle").manifest
    assert manifest.checked["rows"] == 90
    assert manifest.tables[table].rows == ROWS
