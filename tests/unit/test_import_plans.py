"""The plans of configs/plans on the published files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.data.importing.plan import Plan, read_plan
from rechub_dist.data.importing.run import import_data
from rechub_dist.data.prepare.criteo import prepare as prepare_criteo

ROOT = Path(__file__).parents[2]
PLANS = sorted((ROOT / "configs" / "plans").glob("*.yaml"))
SOURCE = Path(os.environ.get("RECHUB_DATA", ROOT.parent / "shared" / "data"))


def published(name: str) -> Path:
    folder = SOURCE / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set RECHUB_DATA")
    return folder


def plan_in(folder: Path, name: str) -> Plan:
    """A plan whose paths are those of a folder."""
    plan = read_plan(ROOT / "configs" / "plans" / f"{name}.yaml")
    tables = {
        key: table.model_copy(update={"path": tuple(str(folder / path) for path in table.path or ())})
        for key, table in plan.tables.items()
    }
    log = plan.log.model_copy(update={"path": tuple(str(folder / path) for path in plan.log.path or ())})
    return plan.model_copy(update={"log": log, "tables": tables})


def split_of(out: Path, name: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in sorted((out / name).glob("*.parquet")))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_plan_is_read(path: Path) -> None:
    assert read_plan(path).features


@pytest.mark.data
@pytest.mark.parametrize("rows", [8000, 6007])
def test_criteo_is_imported_as_it_is_prepared(tmp_path: Path, rows: int) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    lines = [
        line
        for name in ("train.tsv", "dev.tsv", "test.tsv")
        for line in (published("criteo-sample") / name).read_text().splitlines(keepends=True)
    ][:rows]
    (folder / "train.txt").write_text("".join(lines))
    prepare_criteo(folder / "train.txt", tmp_path / "prepared")
    found = import_data(plan_in(folder, "criteo"), tmp_path / "imported", memory=256 << 20)
    assert found.read == rows
    for split in ("train", "valid", "test"):
        theirs, ours = (split_of(tmp_path / where, split) for where in ("prepared", "imported"))
        assert ours.num_rows == theirs.num_rows > rows // 11
        assert ours.select(theirs.column_names).cast(theirs.schema) == theirs
    for column in (f"C{i}" for i in range(1, 27)):
        theirs, ours = (
            pq.read_table(tmp_path / where / "_vocabularies" / f"{column}.parquet")
            for where in ("prepared", "imported")
        )
        assert ours.cast(theirs.schema).equals(theirs)
    shutil.rmtree(folder)
