"""An index of items' vectors as it is searched: a folder that `rechub-dist index` writes. Needs faiss, not torch.

```
index/
  index.json      this manifest: kind, parameters, what was measured, checksums; sealed
  index.faiss     the index
  items.parquet   the item at each place of the index
```
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray
from pydantic import Field, model_validator

from rechub_dist.config.section import Section
from rechub_dist.data.parquet.pages import read_parquet
from rechub_dist.errors import UserError, one_line
from rechub_dist.inference.bundle.manifest import FileRecord, record
from rechub_dist.inference.bundle.search import NONE, Flags, Floats, Ints, Pairs, best_of
from rechub_dist.typed import validated

FORMAT: Final = 1
MANIFEST: Final = "index.json"
FAISS: Final = "index.faiss"
ITEMS: Final = "items.parquet"
Kind = Literal["flat", "ivf", "hnsw", "pq"]
_AGAIN: Final = "make the index again"


class Measured(Section):
    """What an index was measured to do, with one thread.

    Attributes:
        recall: the share of the k best items, by exact search, that it finds.
        milliseconds: of one query, by how many of them are searched at once: processor time.
        exact_milliseconds: the same of exact search.
    """

    k: int = Field(ge=1)
    queries: int = Field(ge=1)
    queries_of: Literal["items", "given"]
    recall: float = Field(ge=0, le=1)
    milliseconds: dict[str, float]
    exact_milliseconds: dict[str, float]


class IndexManifest(Section):
    """The content of index.json."""

    format: Literal[1] = FORMAT
    kind: Kind
    parameters: dict[str, int]
    metric: Literal["inner_product"] = "inner_product"
    size: int = Field(ge=1)
    dim: int = Field(ge=1)
    source: str = Field(description="what identifies the items and the model that the vectors are of; '' if unknown")
    aim: float = Field(ge=0, le=1, description="the recall that the parameters of search were chosen for")
    measured: Measured
    files: dict[str, FileRecord]
    versions: dict[str, str]
    seal: str = Field("", description="xxh3, 128 bits, of the rest")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if set(self.files) != {FAISS, ITEMS}:
            raise ValueError(f"files: they are not {FAISS} and {ITEMS}")
        return self

    @property
    def sealed(self) -> Self:
        """The manifest with its seal."""
        rest = self.model_copy(update={"seal": ""}).model_dump_json()
        return self.model_copy(update={"seal": xxhash.xxh3_128_hexdigest(rest.encode())})


@dataclass(frozen=True)
class Index:
    """An open index; made by `open_index`.

    Attributes:
        manifest: what it is.
        items: the item at each place [N], in the words of the data.
        faiss: faiss' own index.
        renumber: int64 [N], what stands for each place in what `search` returns and gets.
    """

    manifest: IndexManifest
    items: pa.Array
    faiss: Any
    renumber: Ints

    def search(self, vectors: Floats, k: int, among: Ints | None = None) -> tuple[Ints, Floats]:
        """The k nearest places of vectors [n, D] by inner product, int64 [n, k], and their products; -1 for none.

        Args:
            vectors: float32.
            k: at least 1, at most N.
            among: the only places to find, ascending.
        """
        selector, share = None, 1.0
        if among is not None:
            share = len(among) / len(self.renumber)
            wanted = np.zeros(len(self.renumber), np.bool_)
            wanted[among] = True
            selector = wanted[self.renumber]
        scores, found = self.faiss.search(vectors, k, params=_search(self.manifest, k, selector, share))
        return np.where(found < 0, NONE, self.renumber[np.maximum(found, 0)]), scores


def open_index(folder: Path, threads: int | None = None) -> Index:
    """The index in a folder, after its checksums are compared.

    Raises:
        UserError: it is no index, is damaged or of a later format, or faiss is missing.
    """
    manifest = read_index_manifest(folder)
    for name, file in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise UserError(f"{path} is missing; {_AGAIN}")
        if path.stat().st_size != file.size or record(path) != file:
            raise UserError(f"{path} is damaged: it does not match its checksum; {_AGAIN}")
    faiss = faiss_module()
    if threads is not None:
        faiss.omp_set_num_threads(threads)
    try:
        index = faiss.read_index(str(folder / FAISS))
    except Exception as error:  # faiss' own have no common class
        raise UserError(f"{folder / FAISS} cannot be read: {one_line(error)}; {_AGAIN}") from None
    items = read_parquet(folder / ITEMS)["item"].combine_chunks()
    if not (index.ntotal == len(items) == manifest.size) or index.d != manifest.dim:
        raise UserError(f"{folder / FAISS} does not hold what {MANIFEST} says; {_AGAIN}")
    return Index(manifest, items, index, np.arange(len(items)))


def read_index_manifest(folder: Path) -> IndexManifest:
    """The manifest of an index.

    Raises:
        UserError: it is no index, damaged, or of a later format.
    """
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder} is no index: it has no {MANIFEST}; rechub-dist index makes one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; {_AGAIN}") from None
    if isinstance(tree, dict) and isinstance(found := tree.get("format"), int) and found > FORMAT:
        raise UserError(f"{path}: format {found} is of a later release, this one reads {FORMAT}; upgrade rechub_dist")
    manifest = validated(str(path), IndexManifest, tree)
    if manifest.sealed.seal != manifest.seal:
        raise UserError(f"{path} is damaged: it does not match its seal; {_AGAIN}")
    return manifest


def faiss_module() -> Any:
    """The module faiss. Raises UserError if it is missing."""
    try:
        import faiss  # noqa: PLC0415
    except ImportError:
        raise UserError("an index needs faiss: pip install 'rechub-dist[index]', or faiss-cpu") from None
    return faiss


def _search(manifest: IndexManifest, k: int, wanted: NDArray[np.bool_] | None, share: float) -> Any:
    """The parameters of a search; `wanted` [N]: which places may be found, and their share of all.

    Among a share of the items the same number lies so much further away: a search goes so much further.
    """
    faiss, chosen = faiss_module(), manifest.parameters

    def stretched(parameter: int, most: int) -> int:
        return min(most, math.ceil(parameter / max(share, 1 / most)))

    more = {}
    if wanted is not None:
        more["sel"] = faiss.IDSelectorBitmap(np.packbits(wanted, bitorder="little"))
    match manifest.kind:
        case "flat":
            return faiss.SearchParameters(**more) if more else None
        case "hnsw":
            return faiss.SearchParametersHNSW(efSearch=stretched(max(chosen["ef_search"], k), manifest.size), **more)
        case "ivf":
            return faiss.SearchParametersIVF(nprobe=stretched(chosen["probes"], chosen["lists"]), **more)
        case "pq":
            base = faiss.SearchParametersIVF(nprobe=stretched(chosen["probes"], chosen["lists"]), **more)
            return faiss.IndexRefineSearchParameters(k_factor=float(chosen["refine"]), base_index_params=base)


def by_index(
    index: Index, users: Floats, live: Flags, k: int, hidden: Pairs | None, among: Ints | None
) -> tuple[Ints, Floats]:
    """As `search.exact`, by an index: so many more are looked up as a user of the batch has hidden."""
    found = np.full((len(users), k), NONE, np.int64), np.full((len(users), k), -np.inf, np.float32)
    owner, _ = np.nonzero(live)
    if not len(owner):
        return found
    total = len(index.items)
    more = 0 if hidden is None else int(np.bincount(hidden.users, minlength=1).max(initial=0))
    places, scores = index.search(users[live], min(k + more, total if among is None else len(among)), among)
    candidates, items, worth = np.repeat(owner, places.shape[1]), places.reshape(-1), scores.reshape(-1)
    there = (items >= 0) & (worth > -np.inf)
    candidates, items, worth = candidates[there], items[there], worth[there]
    keys = candidates * total + items
    order = np.lexsort((-worth, keys))  # of an item that several vectors of a user find, the best
    first = np.ones(len(order), np.bool_)
    first[1:] = keys[order][1:] != keys[order][:-1]
    kept = order[first]
    if hidden is not None:
        kept = kept[~np.isin(keys[kept], hidden.users * total + hidden.items)]
    return best_of(len(users), k, candidates[kept], items[kept], worth[kept])
