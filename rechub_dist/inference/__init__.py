"""What becomes of a trained run: predictions, bundles. `Bundle` is imported on first use, and without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rechub_dist.inference.bundle.bundle import Bundle

__all__ = ["Bundle"]


def __getattr__(name: str) -> Any:
    if name != "Bundle":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rechub_dist.inference.bundle.bundle import Bundle  # noqa: PLC0415

    return Bundle
