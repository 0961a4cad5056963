"""Exports a trained run as a bundle: a folder that scores rows without the packages that trained it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rechub_dist.assembly.parts import Plan, plan
from rechub_dist.checkpoint.find import find_checkpoint
from rechub_dist.checkpoint.folder import Folder
from rechub_dist.checkpoint.load import blocks_of, read_rows, verify
from rechub_dist.checkpoint.manifest import CheckpointManifest
from rechub_dist.checkpoint.tensors import framed
from rechub_dist.checkpoint.trained import trained_config
from rechub_dist.data.columns.frequencies import vocabulary_name
from rechub_dist.data.columns.vocabulary import vocabulary_fingerprint
from rechub_dist.data.parquet.outputs import whole_folder
from rechub_dist.data.parquet.overlap import refuse_overlap
from rechub_dist.data.prepare.writer import SCHEMA_FILE, VOCABULARIES, schema_text
from rechub_dist.embedded import Lookup
from rechub_dist.errors import UserError, nearest
from rechub_dist.features import Feature, FeatureSchema, SequenceFeature, SparseFeature
from rechub_dist.inference.bundle.deltas import DeltaManifest, State
from rechub_dist.inference.bundle.manifest import (
    ITEMS,
    KIND,
    TABLES,
    BundleManifest,
    GraphName,
    GraphRecord,
    LookupRecord,
    Precision,
    TableRecord,
    record,
    versions,
    write_manifest,
)
from rechub_dist.inference.bundle.tables import LOW, SCALE, STORED, quantized
from rechub_dist.inference.deltas import DELTA_KIND, compare, precision_of, write_delta
from rechub_dist.inference.graphs import export_graph, parts_of
from rechub_dist.inference.items import write_items

Progress = Callable[[str, int, int], None]  # what is written, and how many bytes of how many


def export_bundle(
    output_dir: str,
    out: Path,
    *,
    tables: Precision = "fp32",
    overrides: Iterable[str] = (),
    allowed_code: Iterable[str] = (),
    wanted: Literal["best"] | int = "best",
    check: Callable[[Path], dict[str, float]] | None = None,
    progress: Progress | None = None,
) -> BundleManifest:
    """Write the bundle of a run's best checkpoint (its newest, where none is marked best).

    Tables are streamed from the checkpoint, 64 MiB at a time.

    Args:
        output_dir: of the run, or its folder of checkpoints; path or address.
        out: the folder; an earlier, unchanged bundle is replaced.
        tables: how their numbers are stored; int8 has a scale for each row.
        overrides: `section.key=value`, where data has moved.
        allowed_code: modules of the run's own classes.
        wanted: the step of another checkpoint.
        check: called with the bundle before it becomes visible; what it returns is kept in the manifest.
        progress: called with what is being done.

    Raises:
        UserError: there is no checkpoint, a vocabulary has changed since, or the model cannot be exported.
    """
    config = trained_config(output_dir, overrides, allowed_code=allowed_code)
    folder, manifest = find_checkpoint(str(config.checkpoint.folder or config.output_dir), config.storage, wanted)
    found = plan(config, device="cpu", world_size=1)
    _check_vocabularies(found, folder, manifest)
    say = progress or _nobody
    for _ in verify(folder, manifest, blocks_of(manifest)):
        pass
    _load_dense(found, folder, manifest)
    parts = parts_of(found)
    read = {lookup.name: lookup for part in parts for lookup in (*part.pooled, *part.sequences)}
    with whole_folder(out, KIND, replace=True) as work:
        say("graphs", 0, len(parts))
        graphs: dict[GraphName, GraphRecord] = {}
        for done, part in enumerate(parts, 1):
            graphs[part.name] = export_graph(part, found.model, work)
            say("graphs", done, len(parts))
        records = _write_tables(folder, manifest, read.values(), work / TABLES, tables, say)
        _write_schema(found, work)
        write_items(found, work / ITEMS)
        ranking = found.objective.ranking
        bundle = BundleManifest(
            model=config.model.name,
            kind="scores" if ranking is None else "recall",
            step=manifest.step,
            graphs=graphs,
            lookups=tuple(_record(lookup) for lookup in read.values()),
            tables=records,
            item=None if ranking is None else ranking.item.feature.name,
            history=None if ranking is None or ranking.history is None else ranking.history.name,
            exclude_seen=config.evaluation.exclude_seen,
            aligned=found.spec.aligned,
            files={str(path.relative_to(work)): record(path) for path in _files(work)},
            versions=versions(),
        )
        write_manifest(work, bundle)
        if check is not None:
            bundle = bundle.model_copy(update={"checked": check(work)})
            write_manifest(work, bundle)
    return bundle


def export_delta(
    output_dir: str,
    out: Path,
    since: State,
    *,
    tables: Precision | None = None,
    overrides: Iterable[str] = (),
    allowed_code: Iterable[str] = (),
    check: Callable[[Path], dict[str, float]] | None = None,
    progress: Progress | None = None,
) -> DeltaManifest:
    """Write what the bundle of a run's best checkpoint changes of a state. It is made whole beside, for the time.

    Args:
        output_dir, overrides, allowed_code, check, progress: as of `export_bundle`.
        out: the folder; an earlier, unchanged delta is replaced.
        since: the state.
        tables: how their numbers are stored; default: as they are.

    Raises:
        UserError: as `export_bundle`; no delta leads there.
    """
    refuse_overlap(str(out), [str(since.base), *(str(place) for place, _ in since.deltas)])
    with whole_folder(out, DELTA_KIND, replace=True) as work:
        full = work / "full"
        export_bundle(
            output_dir, full, tables=tables or precision_of(since.manifest), overrides=overrides,
            allowed_code=allowed_code, check=check, progress=progress,
        )  # fmt: skip
        found = write_delta(compare(since, full, progress), work)
        shutil.rmtree(full)
    return found


def _record(lookup: Lookup) -> LookupRecord:
    return LookupRecord(name=lookup.name, feature=lookup.feature.name, table=lookup.table.name, pooling=lookup.pooling)


def _nobody(_what: str, _done: int, _total: int) -> None:
    """Where nobody asked for progress."""


def _check_vocabularies(found: Plan, folder: Folder, manifest: CheckpointManifest) -> None:
    trained = manifest.run["identity"]["data"].get("vocabularies", {})
    for feature in found.spec.stored:
        now = vocabulary_fingerprint(feature)
        if now is not None and trained.get(feature.name) != now:
            raise UserError(
                f"{folder.address}: the vocabulary of feature {feature.name!r} is not the one that the run was "
                "trained with, so its ids have other meanings; restore that file, or train again"
            )


def _load_dense(found: Plan, folder: Folder, manifest: CheckpointManifest) -> None:
    """Fill the model's parameters and buffers from the checkpoint."""
    state: dict[str, Any] = {}
    for name, value in found.model.state_dict().items():
        key = next((k for k in (f"dense/model.{name}", f"dense/{name}") if k in manifest.tensors), None)
        if key is None:
            raise UserError(f"{folder.address}: the checkpoint has no {name}: {nearest(name, manifest.tensors)}")
        rows = torch.cat([block.view(-1) for block in read_rows(folder, manifest, key)] or [value.new_zeros(0)])
        state[name] = rows.view(value.shape)
    found.model.load_state_dict(state)


def _write_tables(
    folder: Folder,
    manifest: CheckpointManifest,
    lookups: Iterable[Lookup],
    path: Path,
    precision: Precision,
    say: Progress,
) -> dict[str, TableRecord]:
    """Write the tables that are read as one safetensors file; returns what each is."""
    specs = {lookup.table.name: lookup.table for lookup in lookups}
    records = {n: TableRecord(rows=t.rows, dim=t.dim or 1, precision=precision) for n, t in specs.items()}
    size = {"F32": 4, "F16": 2, "U8": 1}
    header: dict[str, Any] = {}
    end = 0
    # Numbers of four bytes first, so that each tensor is aligned.
    extra = [
        (f"{n}{part}", "F32", (r.rows,)) for n, r in records.items() if precision == "int8" for part in (SCALE, LOW)
    ]
    main = [(n, STORED[precision], (r.rows, r.dim)) for n, r in records.items()]
    for name, kind, shape in [*extra, *main]:
        begin, end = end, end + int(np.prod(shape)) * size[kind]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    frame = framed(header)
    total, done = end, 0
    with path.open("wb") as file:
        file.write(frame)
        file.truncate(len(frame) + end)

        def put(name: str, first: int, values: Any) -> None:
            """Write rows from `first` on."""
            width = values.nbytes // max(1, len(values))
            file.seek(len(frame) + header[name]["data_offsets"][0] + first * width)
            file.write(np.ascontiguousarray(values).data)

        for name in records:
            first = 0
            for block in _vectors(folder, manifest, name):
                if precision == "int8":
                    for part, values in zip(("", SCALE, LOW), quantized(block), strict=True):
                        put(name + part, first, values)
                else:
                    put(name, first, block.astype("<f4" if precision == "fp32" else "<f2"))
                first += len(block)
                done += block.nbytes
                say("tables", done, total)
    return records


def _vectors(folder: Folder, manifest: CheckpointManifest, table: str) -> Iterator[np.ndarray[Any, Any]]:
    for block in read_rows(folder, manifest, f"tables/{table}/weight"):
        yield block.float().numpy()


def _write_schema(found: Plan, work: Path) -> None:
    """Write the schema with its vocabularies beside it."""
    features: list[Feature] = []
    for feature in found.schema.features:
        if isinstance(feature, SparseFeature | SequenceFeature) and feature.vocabulary is not None:
            (work / VOCABULARIES).mkdir(exist_ok=True)
            name = f"{VOCABULARIES}/{vocabulary_name(feature.name)}"
            shutil.copyfile(feature.vocabulary, work / name)
            features.append(replace(feature, vocabulary=name))
        else:
            features.append(feature)
    schema = FeatureSchema(tuple(features), found.labels, None, found.schema.derived)
    (work / SCHEMA_FILE).write_text(schema_text(str(found.config.model.name), schema), encoding="utf-8")


def _files(work: Path) -> list[Path]:
    return sorted(path for path in work.rglob("*") if path.is_file() and not path.name.startswith("_rechub"))
