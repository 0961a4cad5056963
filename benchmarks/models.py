"""What a training step of each model costs beside the same mathematics written by hand in plain torch.

    python benchmarks/models.py [--rounds 15] [--seconds 0.2] [--only DIN --only DIEN ...] [--threads 1]

A step is the forward and the backward pass in float32, of the model's dense part alone: both read the same `Embedded`,
vectors that require gradients as if tables had been looked up. `handwritten/` holds what we compare with and the sizes:
26 fields of width 16 and 13 dense values, hidden layers of 256 and 128, batches of 2048 rows. Models with a history
have 8 fields and histories of 0 to 50 behaviours (uniform) with two attributes; DIEN's batches are of 512 rows.
Multi-task models have 3 tasks, and 4 experts of 256 and 128 a gate.

Before it is timed the hand-written model takes our model's weights, and both must give the same outputs and the same
gradients of all vectors, in float64 to a relative 1e-9.

The two then take turns of about `--seconds`, and who begins changes from round to round. A ratio is ours / by hand of
one round; the table has the medians over rounds, by the clock and by this process's CPU time, and the ratios' range.
Where other programs run, trust CPU time. Like the trainer, the script has the C library keep the memory that is freed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table as Sheet
from torch import Tensor, nn

from handwritten import multitask, ranking, recall, sequence
from handwritten.common import (
    ATTENTION,
    BLOCKS,
    CROSS_EXPERTS,
    CROSSES,
    DENSE,
    EXPERTS,
    FLAT,
    HEADS,
    HIDDEN,
    HISTORY,
    IDS,
    INTEREST,
    LENGTH,
    LEVELS,
    OTHERS,
    RANK,
    REDUCTION,
    STATE,
    TARGET,
    TASKS,
    TEMPERATURE,
    TOWER,
    UNITS,
    VECTOR,
    WIDTH,
    Written,
)
from rechub_dist.distributed.runtime import keep_freed_memory
from rechub_dist.embedded import Embedded, Sequence
from rechub_dist.features import DenseFeature, Feature, SequenceFeature, SparseFeature, Table
from rechub_dist.models import Model, catalogue
from rechub_dist.models.multitask.esmm import ESMM
from rechub_dist.models.multitask.mmoe import MMoE
from rechub_dist.models.multitask.ple import PLE
from rechub_dist.models.multitask.sharedbottom import SharedBottom
from rechub_dist.models.ranking.afm import AFM
from rechub_dist.models.ranking.bst import BST
from rechub_dist.models.ranking.dcn import DCN
from rechub_dist.models.ranking.dcnv2 import DCNv2
from rechub_dist.models.ranking.deepfm import DeepFM
from rechub_dist.models.ranking.dien import DIEN
from rechub_dist.models.ranking.din import DIN
from rechub_dist.models.ranking.edcn import EDCN
from rechub_dist.models.ranking.fibinet import FiBiNET
from rechub_dist.models.ranking.widedeep import WideDeep
from rechub_dist.models.recall.dssm import DSSM
from rechub_dist.models.recall.sasrec import SASRec

ROWS = 1000  # of every table, which only its feature's declaration needs
GOAL = 1.15


def _sparse(name: str, table: str | None = None) -> SparseFeature:
    return SparseFeature(name, Table(table or name, ROWS, WIDTH))


FEATURES: list[Feature] = [*map(_sparse, IDS), *map(DenseFeature, DENSE)]
FEW: list[Feature] = [*map(_sparse, OTHERS)]
CANDIDATE = [_sparse(name) for name in TARGET]
BEHAVIORS = [
    SequenceFeature(name, Table(of, ROWS, WIDTH), max_length=LENGTH) for name, of in zip(HISTORY, TARGET, strict=True)
]
KINDS = ["classification"] * TASKS


def _history(width: int) -> SequenceFeature:
    return SequenceFeature(HISTORY[0], Table(TARGET[0], ROWS, width), max_length=LENGTH)


def _of_item(width: int) -> SparseFeature:
    return SparseFeature(TARGET[0], Table(TARGET[0], ROWS, width))


@dataclass(frozen=True)
class Case:
    """A model, the same by hand, and how many rows a batch has."""

    ours: Callable[[], Model]
    by_hand: Callable[[], Written]
    rows: int = 2048


CASES = {
    "WideDeep": Case(lambda: WideDeep(FEATURES, FEATURES, HIDDEN, 0.0), ranking.WideDeep),
    "DeepFM": Case(lambda: DeepFM(FEATURES, HIDDEN, 0.0, WIDTH), ranking.DeepFM),
    "DCN": Case(lambda: DCN(FEATURES, CROSSES, HIDDEN), ranking.DCN),
    "DCNv2": Case(lambda: DCNv2(FEATURES, CROSSES, HIDDEN), ranking.DCNv2),
    "DCNv2 mixture": Case(
        lambda: DCNv2(FEATURES, CROSSES, HIDDEN, low_rank=RANK, num_experts=CROSS_EXPERTS), ranking.DCNv2Mixture
    ),
    "AFM": Case(lambda: AFM(FEATURES, [ATTENTION], WIDTH, 0.0), ranking.AFM),
    "FiBiNET field_all": Case(lambda: FiBiNET(FEATURES, "field_all", HIDDEN, REDUCTION), ranking.FiBiNETAll),
    "FiBiNET field_each": Case(lambda: FiBiNET(FEATURES, "field_each", HIDDEN, REDUCTION), ranking.FiBiNETEach),
    "FiBiNET field_interaction": Case(
        lambda: FiBiNET(FEATURES, "field_interaction", HIDDEN, REDUCTION), ranking.FiBiNET
    ),
    "DIN": Case(lambda: DIN(FEW, BEHAVIORS, UNITS, HIDDEN, target_features=CANDIDATE), sequence.DIN),
    "DIEN AUGRU": Case(
        lambda: DIEN(FEW, BEHAVIORS, [INTEREST], "AUGRU", HIDDEN, target_features=CANDIDATE), sequence.DIEN, 512
    ),
    "DIEN AIGRU": Case(
        lambda: DIEN(FEW, BEHAVIORS, [INTEREST], "AIGRU", HIDDEN, target_features=CANDIDATE),
        sequence.DIENWithAIGRU,
        512,
    ),
    "BST": Case(
        lambda: BST(FEW, BEHAVIORS, HEADS, 1, WIDTH, 0.0, target_features=CANDIDATE, hidden_units=HIDDEN), sequence.BST
    ),
    "EDCN": Case(lambda: EDCN(FEATURES, CROSSES, [FLAT] * CROSSES, "FGU"), ranking.EDCN),
    "SharedBottom": Case(lambda: SharedBottom(FEATURES, HIDDEN, TOWER, TASKS, KINDS), multitask.SharedBottom),
    "ESMM": Case(lambda: ESMM(FEATURES, HIDDEN, TOWER, WIDTH, num_conversions=TASKS - 1), multitask.ESMM),
    "MMoE": Case(lambda: MMoE(FEATURES, HIDDEN, EXPERTS, TASKS, tower_units=TOWER), multitask.MMoE),
    "PLE": Case(
        lambda: PLE(FEATURES, HIDDEN, EXPERTS // 2, LEVELS, EXPERTS // 2, KINDS, tower_units=TOWER), multitask.PLE
    ),
    "SASRec": Case(
        lambda: SASRec(ROWS, LENGTH, HEADS, BLOCKS, STATE, 0.0, history=_history(STATE), item=_of_item(STATE)),
        recall.SASRec,
        512,
    ),
    "DSSM": Case(
        lambda: DSSM([*FEW, _history(WIDTH)], [_of_item(WIDTH)], HIDDEN, 0.0, VECTOR, temperature=TEMPERATURE),
        recall.DSSM,
    ),
}


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long a turn lasts, roughly.")] = 0.2,
    only: Annotated[list[str] | None, typer.Option(help="A model; may be given several times.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
) -> None:
    """Measure, and print the table."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    torch.set_num_threads(threads)
    keep_freed_memory()
    if unknown := [name for name in only or [] if not _chosen(name)]:
        raise typer.BadParameter(f"{unknown} are none of {', '.join(CASES)}", param_hint="--only")
    results = {}
    for title in [title for name in only or [""] for title in _chosen(name)]:
        results[title] = measure(CASES[title], rounds, seconds)
        ratios = [a / b for a, b in zip(results[title].ours.cpu, results[title].by_hand.cpu, strict=True)]
        console.print(f"{title}: {_spread(ratios)}", highlight=False)
    _show(console, results, rounds)
    if without := [name for name in catalogue() if not only and not _chosen(name)]:
        console.print(f"Not compared, as nothing is written by hand for them: {', '.join(without)}", highlight=False)


def _chosen(name: str) -> list[str]:
    """The cases of a model, or the one of that title; all where there is no name."""
    return [title for title in CASES if not name or name.lower() in (title.lower(), title.split()[0].lower())]


@dataclass
class Times:
    """Seconds a step, round by round."""

    clock: list[float]
    cpu: list[float]


@dataclass
class Result:
    ours: Times
    by_hand: Times


def measure(case: Case, rounds: int, seconds: float) -> Result:
    """Check that both compute the same, and let them take turns."""
    torch.manual_seed(0)
    ours, by_hand = case.ours().train(), case.by_hand().train()
    with torch.no_grad():
        for parameter in ours.parameters():
            if not parameter.any():  # what starts at zero could hide a difference
                nn.init.normal_(parameter, std=0.1)
    by_hand.take(ours)
    check_same(ours.double(), by_hand.double(), make_batch(ours, 64, torch.float64))

    batch = make_batch(ours.float(), case.rows, torch.float32)
    by_hand.float()
    steps = [Step(ours, batch), Step(by_hand, batch)]
    began = time.perf_counter()
    for _ in range(2):
        for step in steps:
            step.run()
    count = max(1, math.ceil(seconds / ((time.perf_counter() - began) / 4)))
    result = Result(Times([], []), Times([], []))
    turns = list(zip(steps, (result.ours, result.by_hand), strict=True))
    for _ in range(rounds):
        for step, times in turns:
            clock, cpu = time.perf_counter(), time.process_time()
            for _ in range(count):
                step.run()
            times.cpu.append((time.process_time() - cpu) / count)
            times.clock.append((time.perf_counter() - clock) / count)
        turns.reverse()
    return result


class Step:
    """Forward and backward, from the same gradient of the outputs each time."""

    def __init__(self, model: nn.Module, batch: Embedded) -> None:
        self.model, self.batch = model, batch
        self.leaves = [*model.parameters(), *vectors_of(batch).values()]
        rng = torch.Generator().manual_seed(1)
        self.gradients = [
            torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x.dtype) / len(x) for x in self.outputs()
        ]

    def outputs(self) -> tuple[Tensor, ...]:
        """The logits and further losses; of a recall model users and items, without what is padding."""
        output = self.model(self.batch)
        if isinstance(output, tuple):
            return output
        if output.logits is not None:
            return (output.logits, *output.aux.values())
        mask = output.user_mask[..., None]
        sides = (output.user * mask, output.item * mask)
        return sides if mask.shape[1] > 1 else tuple(side.flatten(0, 1) for side in sides)

    def run(self) -> tuple[Tensor, ...]:
        """One step; gradients of the one before go first, as an optimizer lets them go."""
        for leaf in self.leaves:
            leaf.grad = None
        outputs = self.outputs()
        torch.autograd.backward(outputs, self.gradients)
        return outputs


def check_same(ours: Model, by_hand: Written, batch: Embedded) -> None:
    """Both give the same outputs and the same gradients of all vectors.

    Raises:
        RuntimeError: they do not.
    """
    found = []
    for model in (ours, by_hand):
        outputs = Step(model, batch).run()
        found.append([*outputs, *(leaf.grad for leaf in vectors_of(batch).values())])
    names = [*(f"output {i}" for i in range(len(outputs))), *(f"gradient of {name}" for name in vectors_of(batch))]
    for name, a, b in zip(names, *found, strict=True):
        if a is None or b is None or a.shape != b.shape:
            raise RuntimeError(f"{type(ours).__name__}: {name} is missing, or of two shapes")
        scale, error = float(a.detach().abs().max()), float((a - b).detach().abs().max())
        if not (scale > 0 and error <= 1e-9 * scale):
            raise RuntimeError(f"{type(ours).__name__}: {name} differs by {error:.1e} of {scale:.1e}")


def make_batch(model: Model, rows: int, dtype: torch.dtype) -> Embedded:
    """Random vectors for all that the model reads, with zeros under the padding."""
    rng = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=dtype)

    lengths = torch.randint(0, LENGTH + 1, (rows,), generator=rng)
    lengths[:2] = torch.tensor([0, LENGTH])
    batch = Embedded(dense={feature.name: random(rows, feature.dim) for feature in model.dense_features()})
    for lookup in model.lookups():
        if lookup.pooling is not None:
            batch.vectors[lookup.name] = random(rows, lookup.dim).requires_grad_()
        else:
            values = random(rows, LENGTH, lookup.dim)
            values[torch.arange(LENGTH) >= lengths[:, None]] = 0
            batch.sequences[lookup.name] = Sequence(values.requires_grad_(), lengths)
    return batch


def vectors_of(batch: Embedded) -> dict[str, Tensor]:
    """The leaves of a batch, by lookup name."""
    return batch.vectors | {name: sequence.values for name, sequence in batch.sequences.items()}


def _show(console: Console, results: dict[str, Result], rounds: int) -> None:
    table = Sheet(title="A training step in ms", title_justify="left")
    table.add_column("model")
    for heading in ("ours", "by hand", "ratio", "ours, CPU", "by hand, CPU", "ratio, CPU"):
        table.add_column(heading, justify="right")
    for title, result in results.items():
        cells = []
        above = False
        for ours, by_hand in (
            (result.ours.clock, result.by_hand.clock),
            (result.ours.cpu, result.by_hand.cpu),
        ):
            ratios = [a / b for a, b in zip(ours, by_hand, strict=True)]
            above = statistics.median(ratios) > GOAL
            cells += [f"{1e3 * statistics.median(times):.1f}" for times in (ours, by_hand)] + [_spread(ratios)]
        table.add_row(title, *cells, style="bold" if above else "")
    console.print(table)
    console.print(
        f"medians of {rounds} rounds, ratios ours / by hand (min-max); bold: above {GOAL} by CPU time\n"
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)",
        highlight=False,
    )


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    typer.run(main)
