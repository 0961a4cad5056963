"""What is served: the versions of a bundle, of which one answers, and how one takes the place of another."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import pyarrow as pa
from pydantic_core import to_json

from rechub_dist.data.spec import BatchSpec
from rechub_dist.errors import UserError
from rechub_dist.inference.bundle.deltas import DELTA, places
from rechub_dist.inference.bundle.index import MANIFEST as INDEX
from rechub_dist.inference.bundle.index import IndexManifest
from rechub_dist.inference.bundle.manifest import MANIFEST, BundleManifest, read_manifest
from rechub_dist.inference.server.requests import JSON, Parsed, Reader, RequestError

Operation = Literal["score", "retrieve", "vectors"]
OPERATIONS: Final[tuple[Operation, ...]] = ("score", "retrieve", "vectors")
MOST_ITEMS: Final = 10_000  # that `retrieve` finds for a row
MOST_FOUND: Final = 1 << 20  # and for all rows of a request
_TRIES: Final = 20  # to open a folder that is being replaced
_PAUSE: Final = 0.1  # seconds between them


class Scorer(Protocol):
    """What answers: a `Bundle`, or what does the same in another way."""

    folder: Path
    manifest: BundleManifest

    def spec(self, part: str) -> BatchSpec: ...
    def score(self, rows: Any) -> Any: ...
    def score_candidates(self, user: Any, candidates: Any) -> Any: ...
    def retrieve(self, users: Any, k: int = 10, *, where: str | None = None) -> Any: ...
    def vectors(self, side: str, rows: Any) -> Any: ...
    def use_index(self, index: Path) -> IndexManifest: ...


Opener = Callable[[Path], Scorer]


@dataclass(frozen=True)
class Asked:
    """What is asked of a bundle, besides the rows.

    Attributes:
        operation: which.
        k: of `retrieve`: items a row.
        side: of `vectors`: `user` or `item`.
        where: of `retrieve`: an SQL expression that must be true of an item.
    """

    operation: Operation
    k: int = 10
    side: Literal["user", "item"] = "user"
    where: str | None = None

    @property
    def part(self) -> str:
        """The graph whose rows it takes."""
        return {"score": "score", "retrieve": "user", "vectors": self.side}[self.operation]


class Version:
    """A bundle as it was exported once. It reads, scores, and never changes.

    Args:
        scorer: the open bundle.
        max_rows: of a request.
        index: the folder of an index of its items, or None.

    Attributes:
        index: what is searched; None for all items.
        unindexed: why the index given is not used, if so. Search is exact then: right answers, if late ones.

    Raises:
        UserError: a sample request gets no answer.
    """

    def __init__(self, scorer: Scorer, max_rows: int, index: Path | None = None) -> None:
        self.scorer, self.manifest = scorer, scorer.manifest
        self.label = self.manifest.label
        self.opened = time.time()
        recall = self.manifest.kind == "recall"
        self.index: IndexManifest | None = None
        self.unindexed: str | None = None
        if index is not None:
            try:
                self.index = scorer.use_index(index)
            except (UserError, OSError) as error:
                self.unindexed = str(error)
        self.readers = {
            part: Reader(scorer.spec(part), max_rows, candidates=not recall) for part in self.manifest.graphs
        }
        self.refused: dict[Operation, str] = {}
        self.examples = {part: self._sample(part) for part in self.readers}
        if recall:
            self.refused["score"] = (
                f"{self.manifest.model} is a recall model: it has retrieve and vectors, and no score"
            )
            try:
                self.answer(Asked("retrieve", k=1), self._parsed("user", self.examples["user"]))
            except UserError as error:
                self.refused["retrieve"] = str(error)
        else:
            for operation in ("retrieve", "vectors"):
                self.refused[operation] = f"{self.manifest.model} is no recall model: it has score, and no {operation}"

    @property
    def identity(self) -> tuple[str, str]:
        """The seals of what answers: of the bundle, and of the index."""
        return self.manifest.seal, "" if self.index is None else self.index.seal

    def reader(self, asked: Asked) -> Reader:
        """What reads the rows of a request.

        Raises:
            RequestError: the bundle does not answer such requests.
        """
        if asked.operation in self.refused:
            raise RequestError(self.refused[asked.operation], 404)
        return self.readers[asked.part]  # type: ignore[index]

    def answer(self, asked: Asked, rows: Parsed) -> pa.Table:
        """The answer, a row for each of the rows.

        Raises:
            RequestError: the rows do not fit.
        """
        try:
            if asked.operation == "retrieve":
                if rows.rows.num_rows * asked.k > MOST_FOUND:
                    text = f"k = {asked.k} of {rows.rows.num_rows} rows is more than {MOST_FOUND} items; ask for fewer"
                    raise RequestError(text, 413)
                return self.scorer.retrieve(rows.rows, asked.k, where=asked.where)
            if asked.operation == "vectors":
                return self.scorer.vectors(asked.side, rows.rows)
            if rows.user is not None:
                return self.scorer.score_candidates(rows.user, rows.rows)
            return self.scorer.score(rows.rows)
        except RequestError:
            raise
        except UserError as error:
            raise RequestError(error) from None
        except (pa.ArrowException, OverflowError, MemoryError) as error:  # of values that no feature reads
            raise RequestError(f"the rows given: {type(error).__name__}: {error}") from None

    def _sample(self, part: str) -> dict[str, Any]:
        """A row that gets an answer: if it can be, with what columns are derived from."""
        asked = Asked("score") if part == "score" else Asked("vectors", side=part)  # type: ignore[arg-type]
        for derived in (False, True):
            row = self.readers[part].example(derived=derived)  # type: ignore[index]
            try:
                self.answer(asked, self._parsed(part, row))
            except UserError as error:
                failure = error
            else:
                return row
        raise UserError(f"a sample request gets no answer: {failure}")

    def _parsed(self, part: str, row: dict[str, Any]) -> Parsed:
        return self.readers[part].read(to_json({"rows": [row]}), JSON)  # type: ignore[index]


class Served:
    """A bundle that is served under a name: the version that answers, and the one before it.

    Whoever answers a request reads `current` once, and uses it for the whole answer.

    Args:
        name: of the bundle.
        folder: which later exports replace, or publish to.
        opener: opens it.
        max_rows: of a request.
        index: the folder of an index of its items, which later ones replace, or None.

    Raises:
        UserError: the folder is no bundle, or a damaged one.
    """

    def __init__(self, name: str, folder: Path, opener: Opener, max_rows: int, index: Path | None = None) -> None:
        self.name, self.folder, self._index = name, folder, index
        self._opener, self._max_rows = opener, max_rows
        self._changing = threading.Lock()
        self.former: Version | None = None
        self._seen = self._mark()
        self.current = self._open()

    @property
    def replaced(self) -> bool:
        """Whether the folders hold another bundle, or index, than when they were last looked at."""
        return self._mark() not in (self._seen, None)

    def reload(self) -> bool:
        """Open the folder anew, and answer with it from now on; False if it holds what answers already.

        Raises:
            UserError: the folder is no bundle, a damaged one, or one that gets no sample right; nothing has changed.
        """
        with self._changing:
            self._seen = self._mark()
            found = self._open()
            if found.identity == self.current.identity:
                return False
            self.former, self.current = self.current, found
            return True

    def rollback(self) -> None:
        """Answer with the version before; the present one is then the one before.

        Raises:
            UserError: there is none.
        """
        with self._changing:
            if self.former is None:
                raise UserError(f"{self.name}: there is no version before {self.current.label}")
            self.former, self.current = self.current, self.former

    def _mark(self) -> tuple[int, ...] | None:
        """What changes when a folder is replaced, or more is published in it; None while there is no bundle."""
        try:
            base, deltas = places(self.folder)
            found = [os.stat(path) for path in (base / MANIFEST, *(delta / DELTA for delta in deltas))]
        except OSError:
            return None
        if self._index is not None:
            with suppress(OSError):
                found.append(os.stat(self._index / INDEX))
        return tuple(number for one in found for number in (one.st_ino, one.st_mtime_ns, one.st_size))

    def _open(self) -> Version:
        """The folder's bundle, all of it of one export, though it be replaced meanwhile; what is published is not."""
        failure = UserError(f"{self.folder}: is replaced all the time")
        for _ in range(_TRIES):
            before = self._mark()
            try:
                version = Version(self._opener(self.folder), self._max_rows, self._index)
                meanwhile = version.unindexed is not None and self._mark() != before
                published = places(self.folder)[0] != self.folder
                same = published or read_manifest(self.folder).seal == version.manifest.seal
                if same and not meanwhile:
                    return version
            except (UserError, OSError) as error:
                failure = error if isinstance(error, UserError) else UserError(f"{self.folder}: {error}")
                if before is not None and self._mark() == before:
                    break
            time.sleep(_PAUSE)
        raise failure
