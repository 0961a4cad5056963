"""Parts that measure training: contests of shapes."""

from __future__ import annotations

from typing import Any

from speed import rechub
from speed.bench import BARE, OURS, Bench
from speed.record import Figure, ratio
from speed.shapes import RANKS, Tree, deepfm, model, models
from speed.turns import Contestant

LOADER, MEMORY = "torch-rechub, its loader", "torch-rechub, from memory"


def deepfm_end_to_end(bench: Bench) -> None:
    """DeepFM from Parquet, beside the barest loop and torch-rechub."""
    for vocabulary, of_bare, of_rechub in ((100_000, 0.97, 4.5), (1_000_000, 0.97, 20.0)):
        shape = bench.sized(deepfm(vocabulary))
        group = f"26 x {vocabulary:,} rows"
        contestants = [bench.ours(shape), bench.bare(shape)]
        if rechub.is_there():
            contestants.append(bench.rechub(shape, LOADER, loader=True))
            if vocabulary == 100_000:  # at a million rows a step is the dense Adam of all tables, whatever feeds it
                contestants.append(bench.rechub(shape, MEMORY, loader=False))
        else:
            bench.note("torch-rechub is not installed: left out. `make bench` installs it.")
        found = bench.contest(group, contestants)
        bench.compare(group, found, OURS, BARE, of_bare)
        for name, target in ((LOADER, of_rechub), (MEMORY, None)):
            if name in found.results:
                bench.compare(group, found, OURS, name, target)
        waited = [100 * share for share in found[OURS].waited]
        bench.add(Figure(group, "rechub_dist waits for data", "% of the time", waited))


def models_beside_loops(bench: Bench) -> None:
    """Further models beside the barest loops."""
    for shape in map(bench.sized, models()):
        found = bench.contest(shape.name, [bench.ours(shape), bench.bare(shape)])
        bench.compare(shape.name, found, OURS, BARE, 0.95)
    bench.note(
        "DIN's loop by hand normalises with each rank's statistics; rechub_dist with those of the global batch, for "
        "which ranks exchange sums in each layer."
    )


def table_sizes(bench: Bench) -> None:
    """Samples/s as tables grow."""
    sizes = (10_000, 100_000, 1_000_000, 4_000_000)
    names = {size: f"26 x {size:,} rows" for size in sizes}
    shapes = {size: bench.sized(deepfm(size, rows=512_000)) for size in sizes}
    found = bench.contest("", [bench.ours(shape, names[size]) for size, shape in shapes.items()])
    for size in sizes[2:]:
        target = 0.7 if size == sizes[-1] else None
        bench.compare("", found, names[size], names[100_000], target, cpu=False)


def ranks_and_bytes(bench: Bench) -> None:
    """One rank beside two, of a thread each; and what ranks send to each other."""
    shape = bench.sized(deepfm())
    who = {"rechub_dist": bench.ours, "TorchRec alone": bench.bare}
    found = bench.contest(
        "ranks of one thread",
        [make(shape, f"{name}, {ranks} rank(s)", ranks=ranks) for name, make in who.items() for ranks in (1, 2)],
    )
    for name in who:
        bench.compare("ranks of one thread", found, f"{name}, 2 rank(s)", f"{name}, 1 rank(s)", cpu=False)
    group = f"sent in a step of {shape.batch:,} rows, all ranks together"
    for ranks in (2, 4, 8) if not bench.smoke else (2,):
        sent = {}
        for name, make in who.items():
            # more ranks than cores: their samples/s say nothing, so they are not recorded
            alone = bench.contest(None, [make(shape, name, ranks=ranks)], bench.pace(1.0))
            sent[name] = [count / 1e6 for count in alone[name].sent]
            bench.add(Figure(group, f"{name}, {ranks} ranks", "MB", sent[name]))
        bench.add(ratio(group, f"{ranks} ranks: rechub_dist / TorchRec alone", *sent.values()))
    bench.note("Bytes are those that the loopback interface counts, headers included, while the ranks have their turn.")


def many_features(bench: Bench) -> None:
    """200 sparse features of 10,000 rows each."""
    shape = bench.sized(deepfm(10_000, sparse=200, rows=160_000))
    found = bench.contest("", [bench.ours(shape), bench.bare(shape)])
    bench.compare("", found, OURS, BARE, 0.95)


def what_was_tried(bench: Bench) -> None:
    """Settings and changes beside the default, and whether losses stay what they are."""
    shape, sequences = map(bench.sized, (deepfm(), model("DIN")))
    base = "default"
    adam = "torch.optim:Adam"
    huge = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    often = {"train__log_every": 2 if bench.smoke else 10}

    def ours(name: str, changes: Tree | None = None, **more: Any) -> Contestant:
        return bench.ours(shape, name, often | (changes or {}), **more)

    variants = [
        ours(base),
        ours("one rank of two threads", ranks=1, threads=RANKS),
        ours("two threads a rank", threads=2),
        ours("dense Adam: foreach", {"optimizer__name": adam, "optimizer__arguments": {"foreach": True}}),
        ours("dense Adam: fused", {"optimizer__name": adam, "optimizer__arguments": {"fused": True}}),
        ours("DDP buckets of 1 MB", {"distributed__bucket_mb": 1}),
        ours("gradient_as_bucket_view", change=gradient_as_bucket_view),
        ours("transparent huge pages for malloc", env=huge),
        ours("without keeping freed memory", change=give_back_memory),
        ours("control all-reduce under the step before", change=ask_ahead),
        ours("towers compiled", {"train__compile": True}),
        ours("prefetch of 16 batches", {"data__prefetch": 16}),
        ours("fp16 exchanged", {"embedding__communication": {"forward": "fp16", "backward": "fp16"}}),
    ]
    pairs = [(variants[0], change) for change in variants[1:]]
    once = bench.ours(sequences, "DIN, ids of histories deduplicated", often, change=deduplicate)
    pairs.append((bench.ours(sequences, "DIN, default", often), once))
    for first, change in pairs:  # two at a time: what is stopped still fills caches and memory
        try:
            found = bench.contest(change.name, [first, change], bench.pace(1.0))
        except RuntimeError as error:
            bench.note(f"{change.name}: does not run here: {error}")
            continue
        bench.compare(change.name, found, change.name, first.name)
        before, after = found.losses[first.name], found.losses[change.name]
        if common := before.keys() & after.keys():
            worst = max(abs(after[step] / before[step] - 1) for step in common)
            name = f"largest relative difference of losses, up to step {max(common)}"
            bench.add(Figure(change.name, name, "", [worst]))


def gradient_as_bucket_view() -> None:
    """Have DDP keep gradients in its buckets."""
    from torch.nn.parallel import DistributedDataParallel  # noqa: PLC0415

    made = DistributedDataParallel.__init__

    def init(self: DistributedDataParallel, *arguments: object, **given: object) -> None:
        made(self, *arguments, **{**given, "gradient_as_bucket_view": True})  # type: ignore[arg-type]

    DistributedDataParallel.__init__ = init  # type: ignore[method-assign, assignment]


def ask_ahead() -> None:
    """Have ranks agree on a batch while they compute the one before, as they do on GPUs."""
    from rechub_dist.training import feed  # noqa: PLC0415

    feed.looks_ahead = lambda _: True


def deduplicate() -> None:
    """Have ranks exchange each id of an unpooled collection once, and each of its vectors."""
    from torchrec.distributed.embedding import set_ec_index_dedup  # noqa: PLC0415

    set_ec_index_dedup(True)


def give_back_memory() -> None:
    """Leave the C library's allocator as it is."""
    from rechub_dist.distributed import runtime  # noqa: PLC0415

    runtime.keep_freed_memory = lambda: None
