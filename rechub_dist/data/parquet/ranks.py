"""How work on a data set is divided among ranks: whoever knows nothing of ranks does it alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

T = TypeVar("T")
Item = TypeVar("Item")


class Ranks(Protocol):
    """The ranks that do something together, each of them calling the same methods in the same order."""

    @property
    def rank(self) -> int:
        """This one's number."""

    @property
    def world_size(self) -> int:
        """How many they are."""

    def together(self, work: Callable[[], T]) -> T:
        """Do local work; where it fails on one rank, all raise its error."""

    def from_main(self, work: Callable[[], T]) -> T:
        """Do work on one rank, and give its result, or its error, to all."""

    def gather_list(self, items: Sequence[T]) -> list[T]:
        """All ranks' items, in rank order."""


class Alone:
    """A process by itself."""

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
    """The result of `work` for each item, on every rank; each rank works on its share, some items at a time.

    Raises:
        UserError: on every rank, where `work` raises it on one.
    """
    shares = [items[rank :: ranks.world_size] for rank in range(ranks.world_size)]

    def share() -> list[T]:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, shares[ranks.rank]))

    results = iter(ranks.gather_list(ranks.together(share)))
    found: list[list[T]] = [[next(results) for _ in share] for share in shares]
    return [found[place % ranks.world_size][place // ranks.world_size] for place in range(len(items))]
