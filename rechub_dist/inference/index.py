"""Makes an index of items' vectors, and measures it against exact search."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rechub_dist.data.parquet.outputs import check_replaceable, whole_folder
from rechub_dist.data.parquet.overlap import refuse_overlap
from rechub_dist.data.parquet.pages import parquet_writer
from rechub_dist.errors import UserError, nearest
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.bundle.catalogue import ITEM, VECTOR
from rechub_dist.inference.bundle.deltas import is_bundle
from rechub_dist.inference.bundle.index import (
    FAISS,
    ITEMS,
    MANIFEST,
    Index,
    IndexManifest,
    Kind,
    Measured,
    faiss_module,
)
from rechub_dist.inference.bundle.manifest import record, versions
from rechub_dist.inference.bundle.search import Floats
from rechub_dist.inference.written import read_vectors

KIND: Final = "index"
DEFAULTS: Final[dict[str, dict[str, int | None]]] = {  # None: chosen by the number of items, or measured
    "flat": {},
    "ivf": {"lists": None, "probes": None},
    "hnsw": {"links": 32, "ef_construction": 200, "ef_search": None},
    "pq": {"lists": None, "codes": None, "probes": None, "refine": None},
}
LEAST_FOR_PQ: Final = 1000  # vectors that its codes are learned from
_QUERIES: Final = 500
_TRAINED: Final = 64  # vectors that a list's centre is learned from, on average
_BLOCK: Final = 1 << 16  # vectors that are added at once
_BATCHES: Final = (1, 64)
Progress = Callable[[str, int, int], None]  # what is done, how much of it, and of how much


@dataclass(frozen=True)
class Wanted:
    """The index to make.

    Attributes:
        kind: `flat` (exact), `ivf` (lists around centres), `hnsw` (a graph) or `pq` (lists of codes of four bits, whose
            best are compared by vectors of 16 bits).
        parameters: those of DEFAULTS that are given.
        aim: the recall that parameters of search which are not given are raised for.
        k: of the recall.
        queries: a folder of users' vectors to measure on; default: a sample of the items'.
        threads: to build with; default: as many as there are cores.
    """

    kind: Kind
    parameters: dict[str, int] = field(default_factory=dict)
    aim: float = 0.98
    k: int = 100
    queries: str | None = None
    threads: int | None = None


def make_index(source: str, out: Path, wanted: Wanted, progress: Progress | None = None) -> IndexManifest:
    """Write an index of the vectors of items in a bundle, or in a folder that `vectors --of items` has written.

    The vectors are on disk meanwhile, beside `out`; what is in memory is the index.

    Raises:
        UserError: no vectors, parameters that do not fit, faiss is missing, or `out` holds something else.
    """
    faiss, say = faiss_module(), progress or _nobody
    for name in wanted.parameters:
        if name not in DEFAULTS[wanted.kind]:
            fits = [kind for kind, known in DEFAULTS.items() if name in known]
            raise UserError(
                f"--{name.replace('_', '-')}: is not of an index of kind {wanted.kind}, but of {', '.join(fits)}"
            )
    refuse_overlap(str(out), [source, *([wanted.queries] if wanted.queries else [])])
    check_replaceable(out, KIND, replace=True)
    faiss.omp_set_num_threads(wanted.threads or faiss.omp_get_max_threads())
    with whole_folder(out, KIND, replace=True) as work:
        vectors, fingerprint = _spooled(source, work, say)
        queries = _queries(vectors, wanted)
        built = build(vectors, wanted, say)
        tuning, measuring = queries[::2], queries[1::2] if len(queries) > 1 else queries
        k = min(wanted.k, len(vectors))
        chosen = tuned(built, wanted, tuning, nearest_exactly(tuning, vectors, k), say)
        say("measure", 0, 0)
        measured = measure(chosen, vectors, measuring, k, wanted.queries is not None)
        faiss.write_index(built.faiss, str(work / FAISS))
        size, dim = vectors.shape
        del vectors
        (work / _SPOOL).unlink()
        manifest = chosen.manifest.model_copy(
            update={
                "size": size,
                "dim": dim,
                "source": fingerprint,
                "measured": measured,
                "files": {name: record(work / name) for name in (FAISS, ITEMS)},
                "versions": versions() | {"faiss": faiss.__version__},
            }
        )
        (work / MANIFEST).write_text(manifest.sealed.model_dump_json(indent=1), encoding="utf-8")
    return manifest.sealed


_SPOOL: Final = ".vectors"


def _nobody(_what: str, _done: int, _total: int) -> None:
    """Where nobody asked for progress."""


def _spooled(source: str, work: Path, say: Progress) -> tuple[NDArray[np.float32], str]:
    """The vectors of a source in a file, mapped, float32 [N, D], their items beside it; and what identifies them."""
    found = batches_of(source)
    writer: pq.ParquetWriter | None = None
    dim, count = 0, 0
    with (work / _SPOOL).open("wb") as spool:
        for batch in found.batches:
            if not batch.num_rows:
                continue
            vectors = as_matrix(batch[VECTOR], source)
            dim = dim or vectors.shape[1]
            if vectors.shape[1] != dim:
                raise UserError(f"{source}: its vectors are {dim} and {vectors.shape[1]} wide; write them again")
            wrong = ~np.isfinite(vectors).all(axis=1)
            if wrong.any():
                item = batch[ITEM][int(wrong.argmax())].as_py()
                raise UserError(f"{source}: the vector of item {item!r} is not finite, so nothing is near it; train on")
            items = batch.select([ITEM])
            writer = writer or parquet_writer(work / ITEMS, items.schema)
            writer.write_table(items.cast(writer.schema))
            spool.write(vectors.tobytes())
            count += len(vectors)
            say("vectors", count, 0)
    if writer is None:
        raise UserError(f"{source} holds no vectors of items; rechub-dist vectors --of items writes them")
    writer.close()
    return np.memmap(work / _SPOOL, np.float32, "r", shape=(count, dim)), found.fingerprint


@dataclass(frozen=True)
class Source:
    """Vectors of items: batches with `item` and `vector`, and what identifies items and model."""

    batches: Iterable[pa.Table]
    fingerprint: str


def batches_of(source: str) -> Source:
    """The vectors of items in a bundle or a folder of them. Raises UserError if it is neither."""
    if "://" not in source and is_bundle(Path(source)):
        bundle = Bundle(source)
        return Source(bundle.catalogue.batches(), bundle.fingerprint)
    written = read_vectors(source, (ITEM, VECTOR))
    return Source(written.batches, written.fingerprint)


def as_matrix(column: pa.ChunkedArray | pa.Array, where: str) -> NDArray[np.float32]:
    """Lists of numbers of one length as float32 [n, D]. Raises UserError for anything else."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not pa.types.is_fixed_size_list(array.type) or array.null_count:
        raise UserError(f"{where}: column {VECTOR!r} is {array.type}, not lists of one length; write it again")
    flat = array.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return flat.reshape(len(array), array.type.list_size)


def _queries(vectors: Floats, wanted: Wanted) -> Floats:
    """What the index is tuned and measured with: a sample, float32 [Q, D]."""
    rng = np.random.default_rng(0)
    if wanted.queries is None:
        return np.asarray(vectors[np.sort(rng.choice(len(vectors), min(2 * _QUERIES, len(vectors)), replace=False))])
    pieces, count = [], 0
    for batch in read_vectors(wanted.queries, ()).batches:
        column = "vectors" if "vectors" in batch.column_names else VECTOR
        if column not in batch.column_names:
            raise UserError(f"--queries: {wanted.queries} has no vectors; {nearest('vectors', batch.column_names)}")
        array = batch[column].combine_chunks()
        pieces.append(as_matrix(array.flatten() if column == "vectors" else array, wanted.queries))
        count += len(pieces[-1])
        if count >= 100 * _QUERIES:
            break
    found = np.concatenate(pieces) if pieces else np.empty((0, vectors.shape[1]), np.float32)
    if not len(found) or found.shape[1] != vectors.shape[1]:
        raise UserError(f"--queries: {wanted.queries} has {len(found)} vectors {found.shape[1]} wide, which do not fit")
    return found[rng.permutation(len(found))[: 2 * _QUERIES]]


def build(vectors: Floats, wanted: Wanted, progress: Progress | None = None) -> Index:
    """An index of vectors [N, D], also memory-mapped, not yet tuned: parameters of search are given, or least.

    Raises:
        UserError: too few vectors, or parameters that do not fit.
    """
    faiss, say = faiss_module(), progress or _nobody
    count, dim = vectors.shape
    chosen = _parameters(wanted, count, dim)
    metric = faiss.METRIC_INNER_PRODUCT
    match wanted.kind:
        case "flat":
            index = faiss.IndexFlatIP(dim)
        case "hnsw":
            index = faiss.IndexHNSWFlat(dim, chosen["links"], metric)
            index.hnsw.efConstruction = chosen["ef_construction"]
        case "ivf":
            index = faiss.index_factory(dim, f"IVF{chosen['lists']},Flat", metric)
        case "pq":
            index = faiss.index_factory(dim, f"IVF{chosen['lists']},PQ{chosen['codes']}x4fs,Refine(SQfp16)", metric)
    if not index.is_trained:
        say("learn centres", 0, 0)
        sample = np.random.default_rng(0).choice(
            count, min(count, max(_TRAINED * chosen["lists"], LEAST_FOR_PQ)), replace=False
        )
        faiss.extract_index_ivf(index).cp.min_points_per_centroid = 1  # few vectors are no reason to print advice
        index.train(np.asarray(vectors[np.sort(sample)]))
    for first in range(0, count, _BLOCK):
        say("add", first, count)
        index.add(np.ascontiguousarray(vectors[first : first + _BLOCK]))
    nothing = Measured(k=1, queries=1, queries_of="items", recall=0, milliseconds={}, exact_milliseconds={})
    empty = {name: {"size": 0, "checksum": "0" * 32} for name in (FAISS, ITEMS)}
    manifest = IndexManifest.model_validate(
        {
            "kind": wanted.kind, "parameters": chosen, "size": count, "dim": dim, "source": "", "aim": wanted.aim,
            "measured": nothing, "files": empty, "versions": {},
        }
    )  # fmt: skip
    return Index(manifest, pa.nulls(count), index, np.arange(count))


def _parameters(wanted: Wanted, count: int, dim: int) -> dict[str, int]:
    """All parameters of an index: as given, else as the number of vectors suggests; those of search, the least."""
    if wanted.kind == "pq" and count < LEAST_FOR_PQ:
        raise UserError(f"--kind pq: learns its codes from {LEAST_FOR_PQ:,} vectors, and there are {count:,}; use flat")
    lists = min(max(1, int(4 * count**0.5)), max(1, count // 39))
    codes = max(n for n in range(1, max(2, dim // 2 + 1)) if dim % n == 0)
    least = {"lists": lists, "codes": codes, "probes": 1, "refine": 2, "ef_search": 16}
    chosen = {
        name: wanted.parameters.get(name, least[name] if default is None else default)
        for name, default in DEFAULTS[wanted.kind].items()
    }
    if chosen.get("lists", 1) > count:
        raise UserError(f"--lists {chosen['lists']}: there are {count:,} vectors; give fewer lists than that")
    if dim % chosen.get("codes", 1):
        raise UserError(f"--codes {chosen['codes']}: does not divide the vectors' width, {dim}")
    return chosen


def tuned(
    built: Index, wanted: Wanted, queries: Floats, truth: NDArray[np.int64], progress: Progress | None = None
) -> Index:
    """The index with parameters of search that reach the aim on queries [Q, D], the quickest of those tried.

    Args:
        built: as `build` returns it.
        wanted: the aim, and which parameters are given.
        queries: float32.
        truth: int64 [Q, k], the places to find.
        progress: called with the number of those tried.
    """
    say, best = progress or _nobody, None
    for number, chosen in enumerate(candidates(wanted, built.manifest.parameters, len(built.items))):
        say("choose parameters", number, 0)
        one = with_parameters(built, chosen)
        with _one_thread():
            began = time.thread_time()
            found, _ = one.search(queries, truth.shape[1])
            spent = time.thread_time() - began
        recall = recall_of(found, truth)
        reached = recall >= wanted.aim
        worth = (reached, -spent if reached else recall)
        if best is None or worth > best[0]:
            best = worth, one
        if reached and wanted.kind != "pq":  # what follows is slower
            break
    assert best is not None
    return best[1]


def candidates(wanted: Wanted, chosen: dict[str, int], count: int) -> Iterator[dict[str, int]]:
    """Parameters of search to try, quicker ones first."""
    given = wanted.parameters
    if wanted.kind == "hnsw" and "ef_search" not in given:
        yield from (chosen | {"ef_search": ef} for ef in _steps(min(count, max(16, wanted.k)), min(count, 4096)))
    elif wanted.kind == "ivf" and "probes" not in given:
        yield from (chosen | {"probes": probes} for probes in _steps(1, chosen["lists"]))
    elif wanted.kind == "pq":
        for refine in [given["refine"]] if "refine" in given else [2, 4, 8, 16]:
            for probes in [given["probes"]] if "probes" in given else _steps(1, chosen["lists"]):
                yield chosen | {"refine": refine, "probes": probes}
    else:
        yield chosen


def _steps(least: int, most: int) -> list[int]:
    """Ascending numbers, each half as large again as the one before, up to `most`."""
    found = [least]
    while found[-1] < most:
        found.append(min(most, max(found[-1] + 1, found[-1] * 3 // 2)))
    return found


def with_parameters(index: Index, parameters: dict[str, int]) -> Index:
    """The same index, searched with other parameters."""
    manifest = index.manifest.model_copy(update={"parameters": parameters})
    return Index(manifest, index.items, index.faiss, index.renumber)


def measure(index: Index, vectors: Floats, queries: Floats, k: int, given: bool) -> Measured:
    """Recall of the k nearest, and processor time of a query, beside those of exact search; with one thread."""
    truth = nearest_exactly(queries, vectors, k)
    found, _ = index.search(queries, k)
    with _one_thread():
        return Measured(
            k=k,
            queries=len(queries),
            queries_of="given" if given else "items",
            recall=recall_of(found, truth),
            milliseconds=_times(lambda some: index.search(some, k), queries),
            exact_milliseconds=_times(lambda some: nearest_exactly(some, vectors, k), queries),
        )


def nearest_exactly(queries: Floats, vectors: Floats, k: int) -> NDArray[np.int64]:
    """The places of the k vectors with the largest products, int64 [Q, k]; by faiss, without an index."""
    faiss = faiss_module()
    found: NDArray[np.int64] = faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)[1]
    return found


def recall_of(found: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """The mean share of each row of `truth` that the same row of `found` holds."""
    width = int(max(found.max(initial=0), truth.max(initial=0))) + 1
    rows = np.arange(len(truth))[:, None] * width
    return float(np.isin(rows + truth, np.where(found < 0, -1, rows + found)).mean())


def _times(search: Callable[[Floats], Any], queries: Floats) -> dict[str, float]:
    """The median milliseconds of processor time that a query takes, by how many are searched at once."""
    found = {}
    for size in _BATCHES:
        some = np.ascontiguousarray(np.resize(queries, (size, queries.shape[1])))
        search(some)
        spent = []
        for turn in range(20 if size == 1 else 3):
            some = np.ascontiguousarray(np.roll(queries, -turn * size, axis=0)[:size])
            began = time.thread_time()
            search(some)
            spent.append((time.thread_time() - began) / max(1, len(some)))
        found[str(size)] = round(float(np.median(spent)) * 1e3, 4)
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for faiss, and then again as many as before."""
    faiss = faiss_module()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
