"""Deltas: a bundle with the deltas after it is, bit for bit, the bundle of an export in full."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from rechub_dist.cli.main import app
from rechub_dist.data.parquet.outputs import whole_folder
from rechub_dist.errors import UserError
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.bundle.deltas import DELTA, ROWS, DeltaManifest, read_delta, read_state
from rechub_dist.inference.bundle.manifest import read_manifest
from rechub_dist.inference.check import as_values
from rechub_dist.inference.deltas import compare, fold, write_delta
from rechub_dist.inference.export import export_bundle, export_delta
from rechub_dist.typed import validated
from rechub_tests.runs import run_file, train, write_data
from rechub_tests.shop import DSSM, SASREC, import_shop, trained

ROOT = Path(__file__).parents[2]
STEPS = (1, 2, 3)
PRECISIONS = ("fp32", "fp16", "int8", "int4")

pytestmark = pytest.mark.slow


class Days(NamedTuple):
    """Exports of a run after each step: in full by step, and as deltas by the step that they lead to."""

    run: Path
    full: dict[int, Path]
    deltas: dict[int, Path]

    @property
    def chain(self) -> list[Path]:
        return [self.deltas[step] for step in STEPS[1:]]


def exported(folder: Path, run: Path, step: int, tables: Any = "fp32") -> None:
    """Export in full, and what that changes of the first export and the deltas since."""
    export_bundle(str(run), folder / f"full-{step}", tables=tables)
    if step != STEPS[0]:
        before = [folder / f"delta-{earlier}" for earlier in STEPS[1 : STEPS.index(step)]]
        with whole_folder(folder / f"delta-{step}", "delta") as work:
            write_delta(compare(read_state(folder / f"full-{STEPS[0]}", before), folder / f"full-{step}"), work)


def days_in(folder: Path, run: Path) -> Days:
    deltas = {step: folder / f"delta-{step}" for step in STEPS[1:]}
    return Days(run, {step: folder / f"full-{step}" for step in STEPS}, deltas)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deltas")
    write_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def ranked(root: Path) -> dict[str, Days]:
    """By precision, DeepFM."""
    for step in STEPS:
        # without a valid split none is best, and the newest is exported
        sections = {"data": {"batch_size": 8, "valid": None}, "train": {"max_steps": step}}
        sections["model"] = {"embedding_dim": 13}  # wide enough for steps, and odd
        train(run_file(root / "fm", root / "data", "DeepFM", **sections))
        for precision in PRECISIONS:
            (root / precision).mkdir(exist_ok=True)
            exported(root / precision, root / "fm" / "out", step, precision)
    return {precision: days_in(root / precision, root / "fm" / "out") for precision in PRECISIONS}


@pytest.fixture(scope="module")
def recalled(root: Path) -> dict[str, Days]:
    """By name, DSSM and SASRec."""
    data = import_shop(root / "shop")
    found = {}
    for name, model in (("DSSM", DSSM), ("SASRec", SASREC)):
        for step in STEPS:
            sections = {"data": {"root": str(data), "batch_size": 8, "valid": None}, "train": {"max_steps": step}}
            run = trained(root / name, data, model, **sections)
            exported(root / name, run, step)
        found[name] = days_in(root / name, root / name / "out")
    return found


def assert_same(one: pa.Table, other: pa.Table) -> None:
    """Bit for bit: Arrow's own comparison takes -0.0 for 0.0."""
    assert one.schema == other.schema
    assert one.combine_chunks().to_batches()[0].serialize() == other.combine_chunks().to_batches()[0].serialize()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scores_are_those_of_an_export_in_full(ranked: dict[str, Days], root: Path, precision: str) -> None:
    days, rows = ranked[precision], pq.read_table(root / "data" / "test")
    for count, step in enumerate(STEPS):
        full, found = Bundle(days.full[step]), Bundle(days.full[1], days.chain[:count], check=True)
        assert found.manifest == full.manifest
        assert_same(found.score(rows), full.score(rows))
    before = [Bundle(days.full[step]).score(rows) for step in STEPS]
    assert before[0] != before[1] != before[2]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_rows_that_changed_are_written(ranked: dict[str, Days], precision: str) -> None:
    days = ranked[precision]
    for step in STEPS[1:]:
        delta = read_delta(days.deltas[step])
        assert set(delta.files) == {ROWS, "score.onnx", "README.md"}
        assert 0 < delta.rows["user"] <= 8  # a batch
        assert delta.rows["item"] < 61


@pytest.mark.parametrize("precision", PRECISIONS)
def test_folded_it_is_the_export_in_full(ranked: dict[str, Days], tmp_path: Path, precision: str) -> None:
    days = ranked[precision]
    made = fold(read_state(days.full[1], days.chain), tmp_path / "folded")
    assert made == read_manifest(tmp_path / "folded")
    assert contents(tmp_path / "folded") == contents(days.full[3])
    # and from there on
    export_delta(str(days.run), tmp_path / "delta", read_state(tmp_path / "folded"))
    assert read_delta(tmp_path / "delta").rows == {}
    with pytest.raises(UserError, match=r"--out: .* is the input"):
        fold(read_state(days.full[1], days.chain), days.full[1])


@pytest.mark.parametrize("model", ["DSSM", "SASRec"])
def test_items_and_vectors_follow(recalled: dict[str, Days], root: Path, tmp_path: Path, model: str) -> None:
    days, users = recalled[model], pq.read_table(root / "shop" / "now")
    full, found = Bundle(days.full[3]), Bundle(days.full[1], days.chain)
    assert_same(found.retrieve(values_of(users, full), 7), full.retrieve(values_of(users, full), 7))
    assert_same(found.vectors("user", values_of(users, full)), full.vectors("user", values_of(users, full)))
    assert (found.catalogue.vectors == full.catalogue.vectors).all()
    assert (found.catalogue.vectors != Bundle(days.full[1]).catalogue.vectors).any()
    assert found.fingerprint == full.fingerprint
    for one, other in zip(found.catalogue.batches(), full.catalogue.batches(), strict=True):
        assert_same(one, other)
    fold(read_state(days.full[1], days.chain), tmp_path / "folded")
    assert contents(tmp_path / "folded") == contents(days.full[3])


def values_of(rows: pa.Table, bundle: Bundle) -> pa.Table:
    return as_values(rows, bundle.schema)


def test_the_order_is_that_of_the_seals(ranked: dict[str, Days]) -> None:
    days = ranked["fp32"]
    first, second, third = (read_manifest(days.full[step]).label for step in STEPS)
    with pytest.raises(UserError) as caught:
        Bundle(days.full[1], days.chain[::-1])
    assert str(caught.value) == (
        f"{days.deltas[3]} follows version {second}, but {days.full[1]} is version {first}: what leads from there to "
        f"{second} is missing"
    )
    with pytest.raises(UserError, match=f"follows version {first}, but .*delta-2 is version {second}"):
        Bundle(days.full[1], [days.deltas[2], days.deltas[2]])
    with pytest.raises(UserError, match=f"follows version {second}, but .*full-3 is version {third}"):
        Bundle(days.full[3], [days.deltas[3]])
    with pytest.raises(UserError, match=r"is no delta: it has no delta\.json; rechub-dist export --since makes one"):
        Bundle(days.full[1], [days.full[2]])
    assert Bundle(days.full[2], [days.deltas[3]]).manifest.label == third  # what a delta follows is a state


def test_damage_is_told(ranked: dict[str, Days], tmp_path: Path) -> None:
    days = ranked["int8"]
    delta = tmp_path / "delta"
    shutil.copytree(days.deltas[2], delta)

    def refused(name: str, text: bytes | None, reason: str) -> None:
        whole = (delta / name).read_bytes()
        if text is None:
            (delta / name).unlink()
        else:
            (delta / name).write_bytes(text)
        with pytest.raises(UserError, match=reason):
            Bundle(days.full[1], [delta])
        (delta / name).write_bytes(whole)

    rows = (delta / ROWS).read_bytes()
    refused(ROWS, rows[:-1], r"rows\.safetensors is damaged: \d+ bytes instead of \d+; export the delta again")
    refused(ROWS, rows[:-1] + bytes([rows[-1] ^ 1]), r"rows\.safetensors is damaged: it does not match its checksum")
    refused(ROWS, None, r"rows\.safetensors is missing")
    refused(DELTA, (delta / DELTA).read_bytes().replace(b'"parent_step": 1', b'"parent_step": 7'), "match its seal")
    refused("score.onnx", b"\0" * (delta / "score.onnx").stat().st_size, "does not match its checksum")
    assert Bundle(days.full[1], [delta]).manifest == read_manifest(days.full[2])


def test_what_no_delta_can_say_is_to_be_exported_in_full(ranked: dict[str, Days], root: Path, tmp_path: Path) -> None:
    days = ranked["fp32"]
    before = read_state(days.full[1])
    reason = (
        r"no delta leads here: table 'user' is 101 x 13 in int8, and 101 x 13 in fp32 in version 1-.*; export in full"
    )
    with pytest.raises(UserError, match=reason):
        export_delta(str(days.run), tmp_path / "delta", before, tables="int8")
    train(run_file(tmp_path / "din", root / "data", "DIN", train={"max_steps": 1}))
    with pytest.raises(UserError, match="no delta leads here: its model is DIN, and DeepFM in version 1-"):
        export_delta(str(tmp_path / "din" / "out"), tmp_path / "delta", before)
    assert not [path.name for path in tmp_path.iterdir() if "delta" in path.name]


def test_the_commands_of_the_page(ranked: dict[str, Days], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line of docs/export.md on deltas, in its order."""
    days, said = ranked["int8"], []
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    [block] = re.findall(r"## Deltas\n.*?```sh\n(.*?)```", text, re.DOTALL)
    for name, target in (("runs", days.run), ("bundles", days.full[1])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "deepfm").symlink_to(target)
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        name, *arguments = shlex.split(line)
        assert name == "rechub-dist"
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{line}: {done.output} {done.exception}"
        said.append(done.output)
    assert len(said) == 4
    first, third = (read_manifest(days.full[step]) for step in (1, 3))
    assert f"deltas/tuesday: DeepFM, step 3, follows version {first.label}, 0.1 MB, in full 0.1 MB" in said[0]
    rows = read_delta(tmp_path / "deltas" / "tuesday").rows["user"]
    assert f"user: {rows} of 101 rows have changed" in said[0]
    assert "largest differences from the run's own on 530 rows: predicted_click " in said[0]
    assert "user: 0 of 101 rows have changed" in said[1]  # it has not been trained meanwhile
    made = Bundle(tmp_path / "bundles" / "wednesday", check=True).manifest
    assert said[2] == f"bundles/wednesday: DeepFM, step 3, version {made.label}, 0.1 MB\n"
    files, wanted = (dict(one.files) for one in (made, third))
    assert files.pop("README.md") != wanted.pop("README.md")  # exports in the tests are not compared
    assert files == wanted
    assert made.checked["rows"] == 530
    assert "/published/deepfm/000001-bundle: version 3-" in said[3]
    done = CliRunner().invoke(app, ["fold", "bundles/deepfm", "deltas/wednesday", "--out", "other"])
    assert isinstance(done.exception, UserError)
    assert "is missing" in str(done.exception)


def test_a_delta_is_not_trusted(ranked: dict[str, Days], tmp_path: Path) -> None:
    """Sealed again by somebody who wants the server to read what is not there."""
    days = ranked["fp32"]
    delta = tmp_path / "delta"
    shutil.copytree(days.deltas[2], delta)
    tree = json.loads((delta / DELTA).read_text())

    def refused(reason: str, **changes: Any) -> None:

        def opened() -> None:
            made = validated("delta.json", DeltaManifest, {**tree, **changes}).sealed
            (delta / DELTA).write_text(made.model_dump_json())
            Bundle(days.full[1], [delta])

        with pytest.raises(UserError, match=reason):
            opened()

    refused("there is no table 'x'", rows={**tree["rows"], "x": 1})
    refused("there is no table 'user' of so many rows", rows={**tree["rows"], "user": 102})
    refused("table 'user' is not there as", rows={**tree["rows"], "user": 2})
    refused("do not hold the rows that changed", rows={})
    refused("is not that of the result", files={**tree["files"], "../x": tree["files"][ROWS]})
    refused("it does not match its seal", result={**tree["result"], "step": 9})
