"""The batches of a pass that trains nothing, agreed on by all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from rechub_dist.batch import Batch
from rechub_dist.data.reader import ParquetReader
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.errors import UserError
from rechub_dist.skips import Skipped, Tally


def agreed_batches(
    reader: ParquetReader,
    runtime: Runtime,
    advance: Callable[[int], None] | None,
    stop: Callable[[], bool],
    tally: Tally,
    skips: list[Skipped],
    fault: Callable[[], str | None] = lambda: None,
) -> Iterator[Batch]:
    """The batches, in host memory; a rank that cannot read stops all. In the end, the rows have to add up.

    What `fault` says of the batches so far, where it says anything, stops all ranks as well.
    """
    batches = reader.batches(epoch=0)
    read = skipped = 0
    notices: list[Skipped] = []
    for done in range(1, reader.steps + 2):
        batch, message = None, fault()
        try:
            batch = next(batches, None)
        except UserError as error:
            message = message or str(error)
        runtime.raise_together(message, stop=stop())
        if batch is None:
            tally.add(*runtime.all_reduce_sum(torch.tensor([read, skipped])).tolist())
            skips += tally.note(runtime.gather_list(notices))
            tally.check(reader.rows, whole=True, what=reader.manifest.path)
            return
        read, skipped = read + batch.rows, skipped + batch.skipped
        notices += batch.notices
        yield batch
        if advance is not None:
            advance(done)


def on_device(batches: Iterator[Batch], runtime: Runtime) -> Iterator[Batch]:
    """The batches, on this rank's device; on a GPU the next one is copied while the one before is computed."""
    if runtime.device.type == "cpu":
        yield from batches
        return
    side = torch.cuda.Stream(runtime.device)
    ahead: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            copied = batch.to(runtime.device, non_blocking=True)
        if ahead is not None:
            yield ahead
        here = torch.cuda.current_stream(runtime.device)
        here.wait_stream(side)
        copied.record_stream(here)
        ahead = copied
    if ahead is not None:
        yield ahead
