"""What a checkpoint costs: its save beside a plain sequential write of as many bytes to the same disk, in turns.

```sh
python benchmarks/checkpoint.py --folder /data/bench --megabytes 1024
torchrun --nproc-per-node 2 benchmarks/checkpoint.py --folder /data/bench
```

Both are written through to the disk (fsync), which is told to begin at once rather than with fsync, and a save's time
has in it the copy to host memory. The state is a sharded table and a replicated vector. Printed are the ratio of
bandwidths, round by round and of the best ones, for how long training would have waited, and the memory that a save
takes at its peak besides the state, on this rank. Loading (verify and read) is measured too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from rechub_dist.checkpoint import Checkpoints, Position
from rechub_dist.checkpoint.folder import Folder
from rechub_dist.checkpoint.tensors import Entry, Piece
from rechub_dist.config import CheckpointConfig, StorageConfig
from rechub_dist.distributed.runtime import Runtime, runtime

WIDTH = 64
# The least that a checkpoint has to record of its run.
RECORD = {"identity": {"seed": 0, "model": {"name": "none"}, "data": {}}, "config": "{}", "tables": {}}


class Peak:
    """The largest resident size of this process while it is open, over that at its beginning, in bytes."""

    def __enter__(self) -> Peak:
        self._done = threading.Event()
        self.first = self.most = _resident()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, _resident())

    @property
    def bytes(self) -> int:
        """What came on top."""
        return self.most - self.first


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def plain(folder: Path, data: torch.Tensor, rt: Runtime) -> float:
    """Seconds to write this rank's bytes, as all ranks do at once."""
    path = folder / f"plain-{rt.rank}"
    dist.barrier()
    began = time.monotonic()
    with path.open("wb") as file:
        for start in range(0, len(data), 32 << 20):
            file.write(data[start : start + (32 << 20)].numpy().data)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # as saves do: the disk begins at once
        file.flush()
        os.fsync(file.fileno())
    dist.barrier()
    seconds = time.monotonic() - began
    path.unlink()
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a folder on the disk in question")
    parser.add_argument("--megabytes", type=int, default=512, help="of state, over all ranks")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--synchronous", action="store_true", help="write from the live tensors")
    arguments = parser.parse_args()
    with runtime("cpu", 300, 1) as rt:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        rows = arguments.megabytes * 1_000_000 // (4 * WIDTH * rt.world_size)
        table = torch.randn(rows, WIDTH)
        entry = Entry((rows * rt.world_size, WIDTH), table.dtype, (Piece(rt.rank * rows, 0, table),), replicated=False)
        state = {"tables/t/weight": entry, "dense/b": Entry.whole(torch.zeros(1000))}
        body = torch.randn(rows * WIDTH).view(torch.uint8)
        folder = Folder(str(arguments.folder / "saves"), StorageConfig())
        config = CheckpointConfig(keep_last=1, asynchronous=not arguments.synchronous)
        ratios, saves, plains = [], [], []
        checkpoints = Checkpoints(folder, rt, config)
        for step in range(1, arguments.rounds + 2):
            # The first after the other: neither always meets the disk as the other has left it.
            before = plain(arguments.folder, body, rt) if step % 2 else None
            with Peak() as peak:
                checkpoints.save(state, Position(step=step), RECORD)
                checkpoints.check_last()
            [save] = checkpoints.news()
            seconds = before if before is not None else plain(arguments.folder, body, rt)
            if step == 1:
                first = peak.bytes  # the copy's memory is kept for the saves to come
                continue  # and the first of all is slower on any disk
            ratios.append((save.bytes / save.seconds) / (len(body) * rt.world_size / seconds))
            saves.append(save)
            plains.append(len(body) * rt.world_size / seconds)
        with Peak() as peak:
            began = time.monotonic()
            checkpoints.load_weights(state, step)
            loading = time.monotonic() - began
        if rt.is_main:
            median = statistics.median
            found = {
                "ranks": rt.world_size,
                "megabytes": round(saves[0].bytes / 1e6),
                "save over plain write": round(median(ratios), 3),
                "lowest and highest": [round(min(ratios), 3), round(max(ratios), 3)],
                "best save over best plain write": round(
                    max(save.bytes / save.seconds for save in saves) / max(plains), 3
                ),
                "plain write, MB/s": round(median(plains) / 1e6),
                "save, MB/s": round(median(save.bytes / save.seconds for save in saves) / 1e6),
                "training waits, seconds": round(median(save.blocked_seconds for save in saves), 3),
                "peak memory of a save over this rank's state": round(first * rt.world_size / saves[0].bytes, 2),
                "load, MB/s": round(saves[0].bytes / loading / 1e6),
                "peak memory of a load, MB": round(peak.bytes / 1e6),
                "rounds": {
                    "ratio": ratios,
                    "save, MB/s": [save.bytes / save.seconds / 1e6 for save in saves],
                    "plain write, MB/s": [speed / 1e6 for speed in plains],
                    "training waits, s": [save.blocked_seconds for save in saves],
                },
            }
            print(json.dumps(found, indent=1))
        dist.barrier()
        if rt.is_main:
            shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
