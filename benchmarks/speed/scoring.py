"""Parts that measure what is done with a trained model, and the reader."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reader
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.distributed.runtime import keep_freed_memory
from rechub_dist.embedded import Jagged
from rechub_dist.metrics.ranking import Catalogue, target_ranks, top_items
from speed import ours
from speed.bench import Bench
from speed.record import Figure, ratio
from speed.shapes import RANKS, deepfm
from speed.turns import Contestant, Seat, serve

USERS, WIDTH, BEST, SEEN = 256, 64, 100, 20  # of a step of ranking


def evaluation_and_prediction(bench: Bench) -> None:
    """Evaluation, prediction, and ranking of a whole catalogue."""
    shape = bench.sized(deepfm(rows=512_000))
    names = {"training": None, "evaluation": ours.evaluating, "prediction": ours.predicting}
    steps = -(-(shape.data.rows - 2 * (shape.data.rows // 10)) // shape.batch)  # a turn is a pass, with what ends it
    contestants = [bench.ours(shape, "training")]
    for name, enter in names.items():
        if enter is not None:
            given = partial(enter, shape=shape, cache=bench.cache, changes={})
            contestants.append(Contestant(name, given, shape.batch, RANKS, 1, steps=steps, warmup=steps))
    found = bench.contest("DeepFM, from Parquet", contestants)
    for name in ("evaluation", "prediction"):
        bench.compare("DeepFM, from Parquet", found, name, "training", 1.5, cpu=False)
    items = 20_000 if bench.smoke else 1_000_000
    group = f"ranking {items:,} items for users, width {WIDTH}"
    kinds = {
        "the best 100, prediction": "best",
        "the target's place, evaluation": "place",
        "matmul and top-k in blocks": "bare",
    }
    ranked = bench.contest(
        group,
        [Contestant(n, partial(ranking, kind=k, items=items), USERS, 1, RANKS, warmup=1) for n, k in kinds.items()],
    )
    best, place, by_hand = kinds
    bench.compare(group, ranked, best, by_hand, 0.8, cpu=False)
    bench.compare(group, ranked, place, by_hand, 0.8, cpu=False)
    for name, kind in ((best, "best"), (place, "place")):
        share = _longest(_Ranking(kind, items)) / items
        bench.add(Figure(group, f"{name}: the longest new array / items", "ratio", [share], 0.99, at_most=True))


@dataclass
class _Ranking:
    """Ranks for USERS users, as a batch of evaluation or prediction does, or as one writes it."""

    kind: str
    items: int

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self.vectors = torch.randn(self.items, WIDTH, generator=random)
        self.users = torch.randn(USERS, 1, WIDTH, generator=random)
        self.mask = torch.ones(USERS, 1, dtype=torch.bool)
        self.target = torch.randint(self.items, (USERS,), generator=random)
        seen = torch.randint(self.items, (USERS * SEEN,), generator=random)
        self.seen = Jagged(seen, torch.full((USERS,), SEEN))
        self.catalogue = Catalogue.whole(self.vectors)

    def step(self) -> None:
        """Once for all users."""
        if self.kind == "best":
            top_items(self.users, self.mask, self.catalogue, BEST, self.seen)
        elif self.kind == "place":
            target_ranks(self.users, self.mask, self.catalogue, self.target, self.seen)
        else:
            users = self.users[:, 0]
            for start in range(0, USERS, 32):
                (users[start : start + 32] @ self.vectors.T).topk(min(BEST, self.items), dim=1)


def ranking(pipe: Connection, seat: Seat, kind: str, items: int) -> None:
    """A contestant that ranks."""
    keep_freed_memory()
    torch.set_num_threads(seat.threads)
    work = _Ranking(kind, items)

    def steps(count: int) -> None:
        with torch.no_grad():
            for _ in range(count):
                work.step()

    serve(pipe, steps)


class _Lengths(TorchDispatchMode):
    """Notes the longest side of what operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = function(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            # a view of the catalogue is no new array
            if isinstance(one, Tensor) and one.numel() and not one._is_view():
                self.longest = max(self.longest, *one.shape, 0)
        return found


def _longest(work: _Ranking) -> int:
    """The longest side of any array that a step makes, when the catalogue has what it keeps."""
    with torch.no_grad():
        work.step()
        with _Lengths() as lengths:
            work.step()
    return lengths.longest


def reading(bench: Bench) -> None:
    """The reader beside Arrow's bare decoding, one thread each."""
    keep_freed_memory()
    rows = 1 << 17 if bench.smoke else 1 << 22
    cases = {
        ("flat", "stored order", None): 0.9,
        ("flat", "shuffled, 4 streams", 4): 0.8,
        ("jagged", "stored order", None): 0.95,
        ("jagged", "shuffled, 4 streams", 4): 0.9,
    }
    for name, write, size in (("flat", reader.flat, rows), ("jagged", reader.jagged, rows // 8)):
        with tempfile.TemporaryDirectory(dir=bench.scratch) as scratch:
            folder = Path(scratch) / name
            spec = write(folder, size)
            manifest = Manifest.read(str(folder))
            of_name = {(title, streams): target for (data, title, streams), target in cases.items() if data == name}
            runs = {"bare decoding": partial(reader.decode, manifest, spec)}
            runs |= {title: partial(reader.consume, manifest, spec, streams, 0) for title, streams in of_name}
            times = reader.measure(runs, bench.rounds, manifest.rows)
            rates = {title: [manifest.rows / wall for wall, _ in found] for title, found in times.items()}
            bench.add(*(Figure(name, title, "rows/s", values) for title, values in rates.items()))
            for (title, _), target in of_name.items():
                bench.add(ratio(name, f"{title} / bare decoding", rates[title], rates["bare decoding"], target))
                cpu = [[seconds for _, seconds in times[one]] for one in ("bare decoding", title)]
                bench.add(ratio(name, f"{title} / bare decoding, by CPU time", *cpu))
