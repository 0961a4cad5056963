"""rechub_dist: Torch-RecHub's recommender models, trained at large scale.

`prepare(out, log=...)` makes a data set of your own tables, `train(run)` trains, `load(output_dir)` returns a trained
run for prediction, `Bundle(folder)` scores with an exported one; they are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rechub_dist.data.importing.frames import prepare
    from rechub_dist.inference.bundle.bundle import Bundle
    from rechub_dist.inference.run import Run, load
    from rechub_dist.notebook import train

__version__ = "0.1.0"
__all__ = ["Bundle", "Run", "__version__", "load", "prepare", "train"]

_HOMES = {
    "Bundle": "rechub_dist.inference.bundle.bundle",
    "Run": "rechub_dist.inference.run",
    "load": "rechub_dist.inference.run",
    "prepare": "rechub_dist.data.importing.frames",
    "train": "rechub_dist.notebook",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
