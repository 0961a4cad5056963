"""Divides work on a data set among ranks, or does it alone; independent of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

T = TypeVar("T")
Item = TypeVar("Item")


class Ranks(Protocol):
    """Ranks that work together; all call the same collective methods in the same order (`Runtime` is one)."""

    @property
    def rank(self) -> int:
        """This rank's number."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""

    def together(self, work: Callable[[], T]) -> T:
        """The result of local work; a UserError on any rank is raised on all. Collective."""

    def from_main(self, work: Callable[[], T]) -> T:
        """The result of work on one rank, on all of them; so is its UserError. Collective."""

    def gather_list(self, items: Sequence[T]) -> list[T]:
        """All ranks' items, in rank order, on every rank. Collective."""


class Alone:
    """A single process."""

    rank, world_size = 0, 1

    def together(self, work: Callable[[], T]) -> T:
        """The result of `work`."""
        return work()

    def from_main(self, work: Callable[[], T]) -> T:
        """The result of `work`."""
        return work()

    def gather_list(self, items: Sequence[T]) -> list[T]:
        """The items."""
        return list(items)


def divided(ranks: Ranks, items: Sequence[Item], work: Callable[[Item], T], threads: int) -> list[T]:
    """The result of `work` for each item, in order, on every rank; ranks divide the items. Collective.

    Each rank works on its share in `threads` threads.

    Raises:
        UserError: on every rank, if `work` raises it on one.
    """
    shares = [items[rank :: ranks.world_size] for rank in range(ranks.world_size)]

    def share() -> list[T]:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, shares[ranks.rank]))

    results = iter(ranks.gather_list(ranks.together(share)))
    found: list[list[T]] = [[next(results) for _ in share] for share in shares]
    return [found[place % ranks.world_size][place // ranks.world_size] for place in range(len(items))]
