"""Files that cannot be used, what is left out because of them, and the account of an epoch's rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from rechub_dist.errors import UserError

Reason = Literal["missing", "unreadable", "corrupt", "changed", "schema"]


class BadFileError(UserError):
    """A file that is at fault itself, so that reading it again is of no use; a failing store is not meant."""

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadFileError], tuple[str, Reason]]:
        return type(self), (str(self), self.reason)  # for another process


class Skipped(NamedTuple):
    """Rows that are left out, all of them for one reason.

    Attributes:
        file: its path.
        row_group: its index in the file; None for a whole file whose row groups are unknown.
        first_row: of the skipped rows within the row group; None for a whole file.
        rows: how many; None for a whole file, which is no part of the plan of an epoch.
        reason: in one word.
        message: in one line.
    """

    file: str
    row_group: int | None
    first_row: int | None
    rows: int | None
    reason: Reason
    message: str


class Tally:
    """The rows of some steps, over all ranks: read, or skipped for a reason."""

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
        """Take in what the ranks have skipped; returns what is new, as several ranks may share a piece."""
        new = []
        for notice in notices:
            piece = notice[:3]
            if piece not in self._pieces:
                self._pieces.add(piece)
                self._reasons[notice.reason] = self._reasons.get(notice.reason, 0) + (notice.rows or 0)
                new.append(notice)
        return new

    def check(self, planned: int, *, whole: bool, what: str) -> None:
        """Make sure that no row is unaccounted for.

        Args:
            planned: rows of these steps by the manifest.
            whole: the steps are a whole epoch, so that every skipped piece has passed in full.
            what: for the error.

        Raises:
            RuntimeError: it does not add up; this is a fault of the program, not of the data.
        """
        reasons = sum(self._reasons.values())
        if self.read + self.skipped != planned or (whole and reasons != self.skipped):
            raise RuntimeError(
                f"{what}: {planned} rows were planned, but {self.read} were read and {self.skipped} skipped "
                f"({reasons} by reason); this is an error in rechub_dist"
            )

    def values(self) -> dict[str, float]:
        """The account for a record: `rows_read`, `rows_skipped`, and for each reason `rows_skipped_<reason>`."""
        reasons = {f"rows_skipped_{reason}": rows for reason, rows in sorted(self._reasons.items())}
        return {"rows_read": self.read, "rows_skipped": self.skipped, **reasons}

    def __str__(self) -> str:
        reasons = ", ".join(f"{rows:,} {reason}" for reason, rows in sorted(self._reasons.items()))
        return f"{self.read:,} rows read, {self.skipped:,} skipped{f' ({reasons})' if reasons else ''}"
