"""Publishes a run: the first time as a whole bundle, later as deltas, into a folder that servers watch.

```
published/
  000001-bundle/   whole; see bundle/manifest.py
  000002-delta/    what changed since; see bundle/deltas.py
  000003-bundle/   whole again
```

Each appears when it is whole, under a number that is never used again. What is older than the last bundle but one, and
the deltas after that, is removed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rechub_dist.checkpoint.find import find_folder
from rechub_dist.checkpoint.folder import steps_in
from rechub_dist.data.parquet.outputs import held_folder, remove_output, scratch_folder, whole_folder
from rechub_dist.errors import UserError
from rechub_dist.inference.bundle.deltas import State, publications, read_state
from rechub_dist.inference.bundle.manifest import KIND, BundleManifest, Precision
from rechub_dist.inference.comparison import Comparison
from rechub_dist.inference.deltas import DELTA_KIND, Difference, compare, write_delta
from rechub_dist.inference.export import Progress, export_bundle

PUBLISHED: Final = "publications"
MOST_DELTAS: Final = 20
_MOST_OF_A_BUNDLE: Final = 0.5  # that deltas may be as large as, all together, before there is a bundle again
_OPTION: Final = "--to"


@dataclass(frozen=True)
class Wanted:
    """What to publish, and where.

    Attributes:
        run: its output folder or its folder of checkpoints; path or address.
        folder: a local one, which no other process publishes to.
        tables: how their numbers are stored.
        deltas: after so many there is a whole bundle again.
        overrides, allowed_code: as of `export_bundle`.
        check: compares each export with the run before it is published.
    """

    run: str
    folder: Path
    tables: Precision = "fp32"
    deltas: int = MOST_DELTAS
    overrides: tuple[str, ...] = ()
    allowed_code: tuple[str, ...] = ()
    check: Callable[[Path], Comparison] | None = None


def publish(wanted: Wanted, said: Callable[[str], None], progress: Progress | None = None) -> None:
    """Publish a run's best checkpoint, unless that is what was published last.

    Args:
        wanted: what, and where.
        said: called with what was done.
        progress: called with what is being done.

    Raises:
        UserError: the run cannot be exported, or the folder is not for publications, or in use.
    """
    with held_folder(wanted.folder, PUBLISHED, option=_OPTION) as folder:
        _Publisher(wanted, folder, said, progress).publish()


def follow(wanted: Wanted, every: float, said: Callable[[str], None], progress: Progress | None = None) -> None:
    """Publish a run's newest checkpoint whenever there is a newer one, until the process is ended.

    What fails is told, and tried again.

    Args:
        wanted, said, progress: as of `publish`.
        every: seconds between looks.

    Raises:
        UserError: the folder is not for publications, or in use.
    """
    with held_folder(wanted.folder, PUBLISHED, option=_OPTION) as folder:
        publisher, done, told = _Publisher(wanted, folder, said, progress), None, ""
        while True:
            try:
                newest = newest_step(wanted.run)
                if newest is None:
                    text = f"{wanted.run}: waiting for a checkpoint"
                elif newest != done:
                    publisher.publish(newest)
                    done, text = newest, ""
            except UserError as error:
                text = f"{error}; tried again every {every:g} s"
            if text and text != told:
                said(text)
            told = text
            time.sleep(every)


def newest_step(run: str) -> int | None:
    """The step of a run's newest complete checkpoint; None where there is none."""
    try:
        folder, _ = find_folder(run, None)
    except UserError:
        return None
    return max(steps_in(folder.files()), default=None)


class _Publisher:
    def __init__(self, wanted: Wanted, folder: Path, said: Callable[[str], None], progress: Progress | None) -> None:
        self._wanted, self._folder = wanted, folder
        self._said, self._progress = said, progress

    def publish(self, step: int | None = None) -> None:
        """Publish the checkpoint of a step, or the best."""
        number = max((one.number for one in publications(self._folder)), default=0) + 1
        with scratch_folder(self._folder, option=_OPTION) as work:
            bundle = work / "bundle"
            made = export_bundle(
                self._wanted.run, bundle, tables=self._wanted.tables, overrides=self._wanted.overrides,
                allowed_code=self._wanted.allowed_code, wanted="best" if step is None else step,
                check=self._wanted.check, progress=self._progress,
            ).sealed  # fmt: skip
            found = self._difference(made, bundle)
            if found is None:
                self._said(f"{self._folder}: version {made.label} is what was published last")
            elif isinstance(found, str):
                self._show(bundle, number, KIND, f"version {made.label} in full ({found}), {_mb(_size(made))}")
            else:
                with whole_folder(work / "delta", DELTA_KIND) as place:
                    rows = write_delta(found, place).rows
                text = f"version {made.label}, {_rows(rows, made)}, {_mb(found.size)}, in full {_mb(_size(made))}"
                self._show(work / "delta", number, DELTA_KIND, text)
        self._clean()

    def _difference(self, made: BundleManifest, bundle: Path) -> Difference | str | None:
        """What an export changes of what was published last; None: nothing; text: why it is published in full."""
        if not publications(self._folder):
            return "the first"
        try:
            state = read_state(self._folder)
            if state.manifest.seal == made.seal:
                return None
            if len(state.deltas) >= self._wanted.deltas:
                return f"after {len(state.deltas)} deltas"
            found = compare(state, bundle, self._progress)
        except UserError as error:
            return str(error)
        large = found.size + _deltas_size(state) > _MOST_OF_A_BUNDLE * _size(made)
        return "the deltas would be more than half as large" if large else found

    def _show(self, made: Path, number: int, kind: str, text: str) -> None:
        path = self._folder / f"{number:06d}-{kind}"
        os.rename(made, path)
        self._said(f"{path}: {text}")

    def _clean(self) -> None:
        """Remove what is older than the last bundle but one: a server may be opening that one yet."""
        found = publications(self._folder)
        bundles = [one.number for one in found if one.kind == KIND]
        for one in found:
            if one.number < min(bundles[-2:]):
                try:
                    remove_output(one.path, one.kind, option=_OPTION)
                except UserError as error:
                    self._said(f"{error}; {one.path} stays")


def _rows(rows: dict[str, int], made: BundleManifest) -> str:
    return f"{sum(rows.values()):,} of {sum(table.rows for table in made.tables.values()):,} rows"


def _size(made: BundleManifest) -> int:
    return sum(file.size for file in made.files.values())


def _deltas_size(state: State) -> int:
    return sum(file.size for _, delta in state.deltas for file in delta.files.values())


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
