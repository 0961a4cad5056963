"""`simulate` beside real ranks: its rates are measured on one rank and on bare exchanges, then it says the rest."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
import yaml
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen

from handwritten.common import IDS, WIDTH
from rechub_dist.assembly.simulate import Hardware, Step, simulate
from rechub_dist.config import RunConfig, changed
from rechub_dist.data.run_file import load_run
from rechub_dist.embedding.planning import Cluster
from speed.bench import Bench
from speed.record import Figure
from speed.shapes import TABLE_LR, Shape, deepfm, model
from speed.turns import Contestant, Seat, serve

FEW, MANY = 1024, 4096  # rows of a rank's batch that its rates are taken from
CHECKED = ((2, 4096), (2, 8192), (4, 4096))  # ranks, and rows of all of them together
TABLES, ROWS = len(IDS), 100_000  # of the bare lookup
LARGE = 1 << 20  # numbers that a rank sends in the bare exchange
_ROOM = 1 << 34  # bytes for tables


def simulation_beside_ranks(bench: Bench) -> None:
    """The time of a step on one rank gives the rates; on 2 and 4 ranks `simulate` is held against real ones."""
    lookup, exchange = _bare_rates(bench)
    for shape in map(bench.sized, (deepfm(), model("DCNv2"))):
        _check(bench, shape, lookup, exchange)
    bench.note(
        "Rates of a rank: the network's and what every step costs follow from one rank with batches of "
        f"{FEW:,} and {MANY:,} rows, the tables' from a bare lookup with its update, the exchange's from bare "
        "all-to-alls. Four ranks share the cores, so that each has half of them. Nothing is hidden behind computing."
    )


def _check(bench: Bench, shape: Shape, lookup: float, exchange: dict[int, tuple[float, float]]) -> None:
    def ours(ranks: int, rows: int) -> Contestant:
        return bench.ours(replace(shape, batch=rows), _name(ranks, rows), ranks=ranks)

    cases = [(1, FEW), (1, MANY), *CHECKED]
    found = bench.contest(f"{shape.name}, measured", [ours(*case) for case in cases])
    config = _config(bench, shape)
    hardware = [
        _fitted(config, lookup, few, many)
        for few, many in zip(*(found[_name(1, rows)].rates for rows in (FEW, MANY)), strict=True)
    ]
    for ranks, rows in CHECKED:
        rate, latency = exchange[ranks]
        share = min(1.0, (os.cpu_count() or 1) / ranks)
        name, said = _name(ranks, rows), []
        for one in hardware:
            own = replace(
                one,
                tflops=one.tflops * share,
                memory=one.memory * share,
                fixed=one.fixed / share,
                in_host=rate,
                latency=latency,
            )
            said.append(_step(config, ranks, rows, own).samples_per_second)
        group = f"{shape.name}, modelled"
        bench.add(Figure(group, name, "samples/s", said))
        ratios = [model / real for model, real in zip(said, found[name].rates, strict=True)]
        bench.add(Figure(group, f"{name}: modelled / measured", "ratio", ratios))


def _name(ranks: int, rows: int) -> str:
    return f"{ranks} rank(s), {rows:,} rows a step"


def _config(bench: Bench, shape: Shape) -> RunConfig:
    file = bench.folder() / "run.yaml"
    file.write_text(yaml.safe_dump(shape.run(bench.cache, file.parent / "run")), encoding="utf-8")
    return load_run(file)


def _step(config: RunConfig, ranks: int, rows: int, hardware: Hardware) -> Step:
    config = changed(config, {"data.batch_size": rows}, "rows")
    (found,) = simulate(config, [Cluster(ranks, ranks, "cpu", _ROOM)], hardware, per_rank=False)
    return found


def _fitted(config: RunConfig, lookup: float, few: float, many: float) -> Hardware:
    """The rates with which one rank's steps take the time that they do: `few` and `many` samples/s."""
    flat = Hardware(tflops=1.0, memory=lookup, fixed=0.0, overlap=False)
    steps = [_step(config, 1, rows, flat) for rows in (FEW, MANY)]
    left = [1000 * rows / rate - step.lookup for rows, rate, step in zip((FEW, MANY), (few, many), steps, strict=True)]
    tflops = (steps[1].dense - steps[0].dense) / (left[1] - left[0])
    if not tflops > 0:
        raise RuntimeError(f"{MANY} rows take no longer than {FEW}, but for the lookup: is the machine idle?")
    return replace(flat, tflops=tflops, fixed=max(0.0, left[0] - steps[0].dense / tflops))


def _bare_rates(bench: Bench) -> tuple[float, dict[int, tuple[float, float]]]:
    """Gigabytes a second of a lookup and its update; by ranks those of an exchange, and microseconds of a small one."""
    pace = bench.pace(0.5)
    # as `simulate` counts them: read, the gradient read, the row read and written
    moved = 4 * TABLES * MANY * WIDTH * 4
    found = bench.contest(None, [Contestant("lookup", looking_up, moved, 1)], pace)
    lookup = Figure("rates", "lookup and update of a rank", "GB/s", [rate / 1e9 for rate in found["lookup"].rates])
    bench.add(lookup)
    exchange = {}
    for ranks in sorted({ranks for ranks, _ in CHECKED}):
        away = LARGE * 4 * (ranks - 1) // ranks
        large = Contestant("large", partial(exchanging, numbers=LARGE), away, ranks)
        small = Contestant("small", partial(exchanging, numbers=ranks), 1, ranks)
        found = bench.contest(None, [large, small], pace)
        speed = Figure("rates", f"exchange of {ranks} ranks", "GB/s", [rate / 1e9 for rate in found["large"].rates])
        wait = Figure("rates", f"a small exchange of {ranks} ranks", "us", [1e6 / r for r in found["small"].rates])
        bench.add(speed, wait)
        exchange[ranks] = (speed.median, wait.median)
    return lookup.median, exchange


def looking_up(pipe: Connection, seat: Seat) -> None:
    """A contestant that looks rows up and updates them, as FBGEMM does for a rank's tables."""
    torch.set_num_threads(seat.threads)
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, WIDTH, EmbeddingLocation.HOST, ComputeDevice.CPU)] * TABLES,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=TABLE_LR,
    )
    tables.init_embedding_weights_uniform(-0.1, 0.1)
    ids = (ROWS * torch.rand(TABLES * MANY) ** 3).long()  # as spread as the data sets' are
    offsets = torch.arange(TABLES * MANY + 1)
    gradient = torch.rand(MANY, TABLES * WIDTH)

    def steps(count: int) -> None:
        for _ in range(count):
            tables(ids, offsets).backward(gradient)

    serve(pipe, steps)


def exchanging(pipe: Connection, seat: Seat, numbers: int) -> None:
    """A contestant whose ranks send `numbers` float32 each, an equal part to each rank, and wait for theirs."""
    torch.set_num_threads(seat.threads)
    seat.join()
    dist.init_process_group("gloo")
    sent, received = torch.rand(numbers), torch.empty(numbers)

    def steps(count: int) -> None:
        for _ in range(count):
            dist.all_to_all_single(received, sent)

    serve(pipe, steps)
