"""Unusable files, the rows that are skipped because of them, and the accounting of an epoch's rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from rechub_dist.errors import UserError

Reason = Literal["missing", "unreadable", "corrupt", "changed", "schema"]


class BadFileError(UserError):
    """The file itself is bad, so retrying would not help; not for a store that fails."""

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadFileError], tuple[str, Reason]]:
        return type(self), (str(self), self.reason)  # to pickle it for another process


class Skipped(NamedTuple):
    """Rows that were skipped for one reason.

    Attributes:
        file: its path.
        row_group: index of the row group in the file; None for a whole file whose row groups are unknown.
        first_row: index of the first skipped row in the row group; None for a whole file.
        rows: number of rows; None for a whole file, whose rows no epoch has planned.
        reason: one word.
        message: one line.
    """

    file: str
    row_group: int | None
    first_row: int | None
    rows: int | None
    reason: Reason
    message: str


class Tally:
    """Counts the rows of some steps over all ranks: those read, and those skipped by reason."""

    def __init__(self) -> None:
        self.read = 0
        self.skipped = 0
        self._pieces: set[tuple[str, int | None, int | None]] = set()
        self._reasons: dict[Reason, int] = {}

    def add(self, read: int, skipped: int) -> None:
        """Count a step's rows."""
        self.read += read
        self.skipped += skipped

    def note(self, notices: Iterable[Skipped]) -> list[Skipped]:
        """Record what the ranks have skipped; returns the new notices, as several ranks may report the same piece."""
        new = []
        for notice in notices:
            piece = notice[:3]
            if piece not in self._pieces:
                self._pieces.add(piece)
                self._reasons[notice.reason] = self._reasons.get(notice.reason, 0) + (notice.rows or 0)
                new.append(notice)
        return new

    def check(self, planned: int, *, whole: bool, what: str) -> None:
        """Check that every row is accounted for.

        Args:
            planned: rows of these steps according to the manifest.
            whole: whether the steps are a whole epoch, so that every skipped piece was counted in full.
            what: names the steps in the error.

        Raises:
            RuntimeError: the counts do not add up, which is a bug, not a fault of the data.
        """
        reasons = sum(self._reasons.values())
        if self.read + self.skipped != planned or (whole and reasons != self.skipped):
            raise RuntimeError(
                f"{what}: {planned} rows were planned, but {self.read} were read and {self.skipped} skipped "
                f"({reasons} by reason); this is a bug in rechub_dist"
            )

    def values(self) -> dict[str, float]:
        """The counts as metrics: `rows_read`, `rows_skipped`, and `rows_skipped_<reason>` for each reason."""
        reasons = {f"rows_skipped_{reason}": rows for reason, rows in sorted(self._reasons.items())}
        return {"rows_read": self.read, "rows_skipped": self.skipped, **reasons}

    def __str__(self) -> str:
        reasons = ", ".join(f"{rows:,} {reason}" for reason, rows in sorted(self._reasons.items()))
        return f"{self.read:,} rows read, {self.skipped:,} skipped{f' ({reasons})' if reasons else ''}"
