"""Warm start: load tables and dense parameters of another run by name, under any sharding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from rechub_dist.checkpoint.find import find_checkpoint
from rechub_dist.checkpoint.load import read_tensors
from rechub_dist.checkpoint.manifest import SavedTensor, no_other
from rechub_dist.checkpoint.pretrained import load_vectors
from rechub_dist.checkpoint.tensors import Entry, Tensors
from rechub_dist.checkpoint.together import agree, verify_together
from rechub_dist.config import StorageConfig, WarmStartConfig
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.errors import UserError, nearest

_KINDS = {"tables": ("tables/", "/weight", "table"), "dense": ("dense/", "", "dense parameter")}


@dataclass(frozen=True)
class Taken:
    """A tensor to load: its key in the other run, its key here, and its rows there if fewer than here, else None."""

    source: str
    target: str
    rows: int | None


def warm_start(config: WarmStartConfig, storage: StorageConfig, state: Tensors, rt: Runtime) -> list[str]:
    """Load weights into `state` as configured; returns a summary, one string per line.

    Collective: call on every rank. Optimizer states are unchanged. Each rank reads only what its pieces need. Weights
    of another precision are rounded to that of this run.

    Raises:
        UserError: the checkpoint is missing or damaged; a pattern or name matches nothing; shapes differ, except for
            tables with more rows here; a file of vectors does not match its table; weights are beyond the range of
            their table's precision.
    """
    told = []
    if config.from_ is not None:
        address = config.from_
        with no_other():
            folder, manifest = rt.from_main(lambda: find_checkpoint(address, storage, config.step))
        taken = choose(config, manifest.tensors, state, address)
        pairs = [(t.source, state[t.target] if t.rows is None else state[t.target].first_rows(t.rows)) for t in taken]
        with no_other():
            verify_together(rt, folder, manifest)
            agree(rt, lambda: read_tensors(folder, manifest, pairs))
        rt.together(lambda: _check_range([(t.target, entry) for t, (_, entry) in zip(taken, pairs, strict=True)]))
        tables = sum(t.target.startswith("tables/") for t in taken)
        others = len(taken) - tables
        line = f"warm start from {folder.address}, step {manifest.step}: {tables} tables, {others} other tensors"
        if grown := [f"{t.target.split('/')[1]} from {t.rows:,} rows" for t in taken if t.rows is not None]:
            line += f"; grown: {', '.join(grown)}"
        here = {key for names in map(_names, _KINDS, [state] * 2) for key in names.values()}
        if left := sorted(here - {t.target for t in taken}):
            line += f"; left as initialised: {', '.join(left[:5])}{f' and {len(left) - 5} more' if left[5:] else ''}"
        told.append(line)
    tables_here = _names("tables", state)
    for item in config.embeddings:
        if item.table not in tables_here:
            raise UserError(f"warm_start.embeddings: no table {item.table!r}: {nearest(item.table, tables_here)}")
        entry = state[tables_here[item.table]]
        rows = rt.together(lambda item=item, entry=entry: load_vectors(item, entry, storage))  # type: ignore[misc]
        told.append(f"table {item.table!r}: vectors of {rows:,} of {entry.shape[0]:,} rows from {item.file}")
    return told


def _check_range(loaded: Iterable[tuple[str, Entry]]) -> None:
    """Refuse weights that fp16 cannot hold."""
    for key, entry in loaded:
        if entry.dtype == torch.float16 and not all(piece.values.isfinite().all() for piece in entry.pieces):
            raise UserError(
                f"warm_start: {key} has weights that fp16 cannot hold (up to 65,504); set precision: fp32 for it"
            )


def choose(config: WarmStartConfig, saved: Mapping[str, SavedTensor], state: Tensors, address: str) -> list[Taken]:
    """Choose the tensors to load from a checkpoint.

    Raises:
        UserError: as `warm_start`.
    """
    everything = [name for kind in _KINDS for name in _names(kind, state)]
    for pattern in config.exclude:
        if not any(fnmatchcase(name, pattern) for name in everything):
            raise UserError(
                f"warm_start.exclude: {pattern!r} matches nothing in this run: {_hint(pattern, everything)}"
            )
    _known_renames(config, saved, state, address)
    taken: list[Taken] = []
    for kind, patterns in (("tables", config.tables), ("dense", config.dense)):
        word = _KINDS[kind][2]
        here, there = _names(kind, state), _names(kind, saved)
        available = _renamed(config.rename, there)
        chosen: dict[str, None] = {}
        for pattern in patterns:
            matching = [name for name in here if fnmatchcase(name, pattern)]
            if not matching:
                raise UserError(f"warm_start.{kind}: {pattern!r} matches no {word} of this run: {_hint(pattern, here)}")
            wanted = [name for name in matching if not any(fnmatchcase(name, out) for out in config.exclude)]
            found = [name for name in wanted if name in available]
            if not found:
                raise UserError(
                    f"warm_start.{kind}: {address} has none of the {word}s that {pattern!r} matches here"
                    f"{' and exclude leaves' if config.exclude else ''}: {_hint(pattern, available)}"
                )
            chosen.update(dict.fromkeys(found))
        for name in chosen:
            source, target = there[available[name]], here[name]
            taken.append(Taken(source, target, _rows(kind, name, saved[source], state[target].shape)))
    _used_renames(config, saved, {t.source for t in taken})
    return taken


def _rows(kind: str, name: str, saved: SavedTensor, shape: tuple[int, ...]) -> int | None:
    """The rows to read if the table has more rows here, else None."""
    there, here = "x".join(map(str, saved.shape)), "x".join(map(str, shape))
    if saved.shape == shape:
        return None
    if kind == "tables" and len(saved.shape) == 2 and saved.shape[1] == shape[1]:
        if saved.shape[0] < shape[0]:
            return saved.shape[0]
        raise UserError(
            f"warm_start.tables: table {name!r} has {saved.shape[0]:,} rows in the other run but {shape[0]:,} here; a "
            f"table can grow but not shrink: give it as many rows, or add it to warm_start.exclude"
        )
    raise UserError(
        f"warm_start.{kind}: {name!r} is {there} in the other run but {here} here; make them equal, or add it to "
        f"warm_start.exclude"
    )


def _names(kind: str, tensors: Iterable[str]) -> dict[str, str]:
    """User-visible name to key, of tables or of dense parameters."""
    prefix, suffix, _ = _KINDS[kind]
    return {
        key[len(prefix) : len(key) - len(suffix)]: key
        for key in tensors
        if key.startswith(prefix) and key.endswith(suffix)
    }


def _renamed(rename: Mapping[str, str], there: Iterable[str]) -> dict[str, str]:
    """Name in this run to name in the other run."""
    moved = {_new_name(rename, name) or name: name for name in there if _new_name(rename, name) is None}
    return moved | {new: name for name in there if (new := _new_name(rename, name)) is not None}


def _new_name(rename: Mapping[str, str], name: str) -> str | None:
    if name in rename:
        return rename[name]
    for old, new in rename.items():
        if old.endswith("*") and name.startswith(old[:-1]):
            return new[:-1] + name[len(old) - 1 :]
    return None


def _known_renames(config: WarmStartConfig, saved: Iterable[str], state: Tensors, address: str) -> None:
    saved = list(saved)
    for old, new in config.rename.items():
        kinds = [kind for kind in _KINDS if any(_new_name({old: new}, name) for name in _names(kind, saved))]
        if not kinds:
            names = [name for kind in _KINDS for name in _names(kind, saved)]
            raise UserError(f"warm_start.rename: {address} has no {old!r}: {_hint(old, names)}")
        here = [name for kind in kinds for name in _names(kind, state)]
        targets = {_new_name({old: new}, name) for kind in kinds for name in _names(kind, saved)}
        if not targets & set(here):
            raise UserError(f"warm_start.rename: this run has no {new!r}: {_hint(new, here)}")


def _used_renames(config: WarmStartConfig, saved: Iterable[str], sources: set[str]) -> None:
    saved = list(saved)
    for old, new in config.rename.items():
        keys = {key for kind in _KINDS for name, key in _names(kind, saved).items() if _new_name({old: new}, name)}
        if not keys & sources:
            raise UserError(
                f"warm_start.rename: {old} -> {new} renames nothing that is loaded; add a pattern to tables or dense "
                f"that matches {new!r}"
            )


def _hint(pattern: str, names: Iterable[str]) -> str:
    """A hint with the nearest name, or up to 20 valid names."""
    names = sorted(names)
    hint = nearest(pattern.replace("*", ""), names)
    return hint if len(names) <= 20 or hint.startswith("did") else f"valid: {', '.join(names[:20])}, ..."
