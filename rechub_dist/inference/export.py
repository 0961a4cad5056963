"""Exports a trained run as a bundle: a folder that scores rows without the packages that trained it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

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
from rechub_dist.errors import UserError
from rechub_dist.features import Feature, FeatureSchema, SequenceFeature, SparseFeature
from rechub_dist.inference.bundle.deltas import DeltaManifest, State
from rechub_dist.inference.bundle.engines import PACKAGES
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
    records_of,
    versions,
    write_manifest,
)
from rechub_dist.inference.bundle.tables import DTYPES, precision_of, stored, tensors_of
from rechub_dist.inference.card import CARD, card, metrics_of
from rechub_dist.inference.comparison import Comparison
from rechub_dist.inference.deltas import DELTA_KIND, compare, stored_precision, write_delta
from rechub_dist.inference.formats import DEFAULT, Format, check_formats, formats_of
from rechub_dist.inference.from_checkpoint import load_dense, open_run
from rechub_dist.inference.graphs import export_graph, parts_of
from rechub_dist.inference.items import write_items
from rechub_dist.inference.triton import add_repository
from rechub_dist.inference.whole import Whole, add_whole, check_sizes

Progress = Callable[[str, int, int], None]  # what is written, and how many bytes of how many


def export_bundle(
    output_dir: str,
    out: Path,
    *,
    tables: Precision = "fp32",
    formats: Collection[Format] = DEFAULT,
    whole: Whole | None = None,
    overrides: Iterable[str] = (),
    allowed_code: Iterable[str] = (),
    wanted: Literal["best"] | int = "best",
    check: Callable[[Path], Comparison] | None = None,
    progress: Progress | None = None,
) -> BundleManifest:
    """Write the bundle of a run's best checkpoint (its newest, where none is marked best).

    Tables are streamed from the checkpoint, 64 MiB at a time.

    Args:
        output_dir: of the run, or its folder of checkpoints; path or address.
        out: the folder; an earlier, unchanged bundle is replaced.
        tables: how their numbers are stored; int8 and int4 in steps, with a scale for each row.
        formats: what it is written for; `onnx`, `torch` or both are the bundle's own graphs.
        whole: of `whole` and `triton`, how large and compared on what.
        overrides: `section.key=value`, where data has moved.
        allowed_code: modules of the run's own classes.
        wanted: the step of another checkpoint.
        check: called with the bundle before it becomes visible; what it finds is kept in the manifest.
        progress: called with what is being done.

    Raises:
        UserError: there is no checkpoint, a vocabulary has changed since, or the model cannot be exported.
    """
    check_formats(formats)
    config = trained_config(output_dir, overrides, allowed_code=allowed_code)
    folder, manifest = find_checkpoint(str(config.checkpoint.folder or config.output_dir), config.storage, wanted)
    found = plan(config, device="cpu", world_size=1)
    _check_vocabularies(found, folder, manifest)
    say = progress or _nobody
    for _ in verify(folder, manifest, blocks_of(manifest)):
        pass
    load_dense(found, folder, manifest)
    found.objective.eval()
    if config.evaluation.calibration is not None:
        found.objective.set_calibrators(open_run(output_dir, overrides, allowed_code, wanted).calibrators)
    parts = parts_of(found)
    whole = whole or Whole()
    if "whole" in formats:
        check_sizes(parts, found.model, whole.limit)
    read = {lookup.name: lookup for part in parts for lookup in (*part.pooled, *part.sequences)}
    with whole_folder(out, KIND, replace=True) as work:
        say("graphs", 0, len(parts))
        graphs: dict[GraphName, GraphRecord] = {}
        for done, part in enumerate(parts, 1):
            graphs[part.name] = export_graph(part, found.model, work, [name for name in PACKAGES if name in formats])
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
            files=records_of(work),
            versions=versions(),
            metrics=metrics_of(config, manifest),
        )
        write_manifest(work, bundle)
        if "whole" in formats:
            say("whole", 0, 1)
            bundle = add_whole(work, found, parts, bundle, whole)
            write_manifest(work, bundle)
        if "triton" in formats:
            bundle = add_repository(work, bundle)
            write_manifest(work, bundle)
        if check is not None:
            compared = check(work)
            bundle = bundle.model_copy(update={"checked": compared.checked, "compared": compared.finite})
        (work / CARD).write_text(card(bundle, found.schema, config), encoding="utf-8")
        bundle = bundle.model_copy(update={"files": bundle.files | {CARD: record(work / CARD)}})
        write_manifest(work, bundle)
    return bundle


def export_delta(
    output_dir: str,
    out: Path,
    since: State,
    *,
    tables: Precision | None = None,
    whole: Whole | None = None,
    overrides: Iterable[str] = (),
    allowed_code: Iterable[str] = (),
    check: Callable[[Path], Comparison] | None = None,
    progress: Progress | None = None,
) -> DeltaManifest:
    """Write what the bundle of a run's best checkpoint changes of a state. It is made whole beside, for the time.

    Args:
        output_dir, whole, overrides, allowed_code, check, progress: as of `export_bundle`.
        out: the folder; an earlier, unchanged delta is replaced.
        since: the state.
        tables: how their numbers are stored; default: as they are. It is written for what the state is.

    Raises:
        UserError: as `export_bundle`; no delta leads there.
    """
    refuse_overlap(str(out), [str(since.base), *(str(place) for place, _ in since.deltas)])
    with whole_folder(out, DELTA_KIND, replace=True) as work:
        full = work / "full"
        export_bundle(
            output_dir, full, tables=tables or stored_precision(since.manifest), formats=formats_of(since.manifest),
            whole=whole, overrides=overrides, allowed_code=allowed_code, check=check, progress=progress,
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
    records = {
        n: TableRecord(rows=t.rows, dim=t.dim or 1, precision=precision_of(precision, t.dim or 1))
        for n, t in specs.items()
    }
    tensors = {name: kind for n, record in records.items() for name, kind in tensors_of(n, record).items()}
    header: dict[str, Any] = {}
    end = 0
    # The largest elements first, so that each tensor is aligned.
    for name, (kind, shape) in sorted(tensors.items(), key=lambda entry: -DTYPES[entry[1][0]].itemsize):
        begin, end = end, end + int(np.prod(shape)) * DTYPES[kind].itemsize
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    frame = framed(header)
    total, done = sum(record.rows * record.dim * 4 for record in records.values()), 0
    with path.open("wb") as file:
        file.write(frame)
        file.truncate(len(frame) + end)

        def put(name: str, first: int, values: Any) -> None:
            """Write rows from `first` on."""
            width = values.nbytes // max(1, len(values))
            file.seek(len(frame) + header[name]["data_offsets"][0] + first * width)
            file.write(np.ascontiguousarray(values).data)

        for table, record in records.items():
            first = 0
            for block in _vectors(folder, manifest, table):
                try:
                    arrays = stored(block, record.precision)
                except OverflowError as error:
                    raise UserError(f"table {table!r}: {error}; export with --tables fp32") from None
                for name, values in zip(tensors_of(table, record), arrays, strict=True):
                    put(name, first, values)
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
