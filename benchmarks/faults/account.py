"""What a run with `train.trace_rows` was trained on, and whether it is what a run without faults is trained on."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

Row = tuple[str, int, int]  # file, row group, row


@dataclass(frozen=True)
class Account:
    """What the weights in the end are made of.

    Attributes:
        batches: by step, the rows of the global batch in order.
        repeated: steps that were done more than once, counted each time but the last.
    """

    batches: dict[int, list[Row]]
    repeated: int

    def compare(self, wanted: Account) -> tuple[int, int, int]:
        """Rows that are lost and rows that are doubled, over the whole run; and steps whose batch is another one."""
        found, all_rows = self._count(), wanted._count()
        other = sum(self.batches.get(step) != batch for step, batch in wanted.batches.items())
        return (all_rows - found).total(), (found - all_rows).total(), other

    def _count(self) -> Counter[Row]:
        return Counter(row for batch in self.batches.values() for row in batch)


def account(output: Path) -> Account:
    """Read the traces. Of each step the last attempt counts: a run that goes back to a checkpoint undoes the others."""
    attempts: dict[str, dict[int, dict[int, list[Row]]]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted((output / "rows").glob("*.jsonl")):
        attempt, rank = path.stem.split("-rank-")
        for line in path.read_text().splitlines():
            if not line.endswith("}"):
                continue  # cut short by a kill
            entry = json.loads(line)
            rows = [(name, group, row) for name, group, rows in entry["stored"] for row in rows]
            attempts[attempt][entry["step"]][int(rank)] = rows
    batches: dict[int, list[Row]] = {}
    done: Counter[int] = Counter()
    for attempt in sorted(attempts):
        for step, ranks in attempts[attempt].items():
            done[step] += 1
            batches[step] = [row for rank in sorted(ranks) for row in ranks[rank]]
    return Account(batches, done.total() - len(done))


def losses(output: Path) -> dict[int, float]:
    """The training loss by step."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["split"] == "train"}
