"""The best items of a bundle's catalogue for rows of users, as Parquet; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rechub_dist.data.given import windows
from rechub_dist.data.parquet.outputs import claim
from rechub_dist.data.parquet.overlap import refuse_overlap
from rechub_dist.inference.bundle.bundle import BATCH, Bundle
from rechub_dist.inference.written import SOURCE_FILE, FileRows, PartFile, finish, part_name

KIND: Final = "retrieved items"
MADE: Final = ("predicted_items", "predicted_scores")


@dataclass(frozen=True)
class Wanted:
    """What to retrieve.

    Attributes:
        bundle: its folder.
        data: rows of users: Parquet file, folder, glob or address.
        out: folder or address for `part-00000.parquet` and, when all is written, `_SUCCESS`; as for predictions.
        top_k: items a row.
        index: a folder that `rechub-dist index` has written; None: exact search.
        where: an SQL expression that must be true of an item.
        keep: columns of `data` to copy.
        encoded: whether the rows hold ids as the data set's own files do, rather than values.
    """

    bundle: str
    data: str
    out: str
    top_k: int = 100
    index: str | None = None
    where: str | None = None
    keep: tuple[str, ...] = ()
    encoded: bool = True


def write_retrieved(wanted: Wanted) -> int:
    """Write the best items of each row, as `predict` does: `predicted_items`, best first, and `predicted_scores`.

    Rows also have `source_file`, `source_row` and the columns to keep. Returns their number.

    Raises:
        UserError: the bundle's model is no recall model, rows, index or filter do not fit, or the output cannot be
            written.
    """
    bundle = Bundle(wanted.bundle, index=wanted.index)
    if wanted.where is not None:
        bundle.catalogue.where(wanted.where)
    rows = FileRows.of(wanted.data, bundle.user_spec(encoded=wanted.encoded), wanted.keep, MADE)
    inputs = [wanted.bundle, wanted.data, *(file.path for file in rows.manifest.files)]
    refuse_overlap(wanted.out, [*inputs, *([wanted.index] if wanted.index else [])])
    claim(wanted.out, KIND, [part_name(0)])
    part, count = PartFile(wanted.out, 0, "retrieve"), 0
    for table, own in rows.groups():
        first = 0
        for window in windows(table, rows.spec, BATCH, own[SOURCE_FILE][0].as_py()):
            found, named = bundle.best(window, wanted.top_k, wanted.where), own.slice(first, window.rows)
            for name in MADE:
                named = named.append_column(name, found[name])
            part.write(named)
            first += window.rows
        count += first
    part.close()
    finish(wanted.out, "retrieve")
    return count
