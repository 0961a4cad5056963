"""Approximate search beside exact search, on vectors from a fixed generator.

    python benchmarks/index.py --items 1000000 --out index.jsonl

Vectors are those of clusters: points around centres in a space of few dimensions, turned into one of `--width`, with a
little noise in all of it, and of length 1 times a log-normal factor (`--norms`; 0, all of one length, is what models
give that compare by cosine). Users' vectors are drawn in the same way. Everything follows from `--seed`.

Times are processor time of one thread, which other work on the machine hardly changes: of exact search the quicker one
of faiss' and this project's own. Recall is that of the k best items, on queries that the parameters of search were not
chosen with.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rechub_dist.inference.bundle.index import Index, faiss_module
from rechub_dist.inference.bundle.search import exact
from rechub_dist.inference.index import Wanted, build, nearest_exactly, recall_of, tuned

Floats = NDArray[np.float32]
CENTRES, INNER, SPREAD, NOISE = 1000, 16, 0.5, 0.1
BATCHES = (1, 64)


def generated(count: int, width: int, seed: int, norms: float, part: int) -> Floats:
    """Vectors [count, width]; `part` numbers independent draws from the same clusters."""
    fixed = np.random.default_rng(seed)
    centres = fixed.standard_normal((CENTRES, INNER), dtype=np.float32)
    turn = fixed.standard_normal((INNER, width), dtype=np.float32) / np.float32(INNER**0.5)
    rng = np.random.default_rng([seed, part])
    found = np.empty((count, width), np.float32)
    for first in range(0, count, 1 << 16):
        n = len(found[first : first + (1 << 16)])
        inner = centres[rng.integers(0, CENTRES, n)] + SPREAD * rng.standard_normal((n, INNER), dtype=np.float32)
        some = inner @ turn + NOISE * rng.standard_normal((n, width), dtype=np.float32)
        some /= np.linalg.norm(some, axis=1, keepdims=True)
        found[first : first + n] = some * np.exp(norms * rng.standard_normal((n, 1), dtype=np.float32))
    return found


def milliseconds(search: Callable[[Floats], object], queries: Floats, size: int, turns: int) -> float:
    """The median processor time that a query takes, `size` of them searched at once."""
    spent = []
    for turn in range(turns + 1):
        some = np.ascontiguousarray(np.roll(queries, -turn * size, axis=0)[:size])
        began = time.process_time()
        search(some)
        spent.append((time.process_time() - began) / size)
    return float(np.median(spent[1:])) * 1e3  # the first one warms up


def exact_times(vectors: Floats, queries: Floats, k: int) -> dict[str, float]:
    """Milliseconds a query of the quicker exact search, by batch size."""

    def own(some: Floats) -> object:
        return exact(some[:, None], np.ones((len(some), 1), np.bool_), vectors, k)

    def by_faiss(some: Floats) -> object:
        return nearest_exactly(some, vectors, k)

    return {str(size): min(milliseconds(one, queries, size, 5) for one in (own, by_faiss)) for size in BATCHES}


def measured(index: Index, queries: Floats, truth: NDArray[np.int64], k: int) -> dict[str, object]:
    """What an index finds, and how fast."""
    found, _ = index.search(queries, k)
    return {
        "recall": round(recall_of(found, truth), 4),
        "ms": {str(size): milliseconds(lambda some: index.search(some, k), queries, size, 15) for size in BATCHES},
    }


def main() -> None:
    """Measure, and write a line of JSON for each index and setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--norms", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", default=["hnsw", "ivf", "pq"], choices=["flat", "hnsw", "ivf", "pq"])
    parser.add_argument("--links", type=int, default=32)
    parser.add_argument("--aim", type=float, default=0.98)
    parser.add_argument("--build-threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("index.jsonl"))
    wanted = parser.parse_args()
    faiss = faiss_module()
    k, aim = wanted.top_k, wanted.aim
    vectors = generated(wanted.items, wanted.width, wanted.seed, wanted.norms, 0)
    queries = generated(1000, wanted.width, wanted.seed, 0.0, 1)
    truth = nearest_exactly(queries, vectors, k)
    faiss.omp_set_num_threads(1)
    beside = exact_times(vectors, queries, k)
    about = {"items": wanted.items, "width": wanted.width, "norms": wanted.norms, "seed": wanted.seed, "k": k,
             "machine": platform.platform(), "faiss": faiss.__version__, "exact_ms": beside}  # fmt: skip
    with wanted.out.open("a", encoding="utf-8") as file:

        def tell(line: dict[str, object]) -> None:
            print(json.dumps(line), flush=True)
            file.write(json.dumps(line) + "\n")
            file.flush()

        tell(about)
        for kind in wanted.kinds:
            chosen = Wanted(kind, {"links": wanted.links} if kind == "hnsw" else {}, aim, k)
            faiss.omp_set_num_threads(wanted.build_threads)
            began, spent = time.perf_counter(), time.process_time()
            built = build(vectors, chosen)
            building = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - spent}
            faiss.omp_set_num_threads(1)
            best = tuned(built, chosen, queries[:500], truth[:500])
            found = measured(best, queries[500:], truth[500:], k)
            times = found["ms"]
            assert isinstance(times, dict)
            faster = {size: round(beside[size] / times[size], 1) for size in times}
            parameters = best.manifest.parameters
            tell({"kind": kind, "parameters": parameters, "build": building, **found, "times_faster": faster})


if __name__ == "__main__":
    main()
