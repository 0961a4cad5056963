"""The base class of all sections of the configuration, and the bounds that several of them share.

Bounds are far above what anybody needs and below what breaks: a number within them overflows nothing that it is handed
to.
"""

from typing import Final

from pydantic import BaseModel, ConfigDict

MAX_COUNT: Final = 1 << 53  # steps, epochs: exact as floats
MAX_ROWS: Final = 1 << 40  # of tables and of what is read
ROW_WISE_ABOVE: Final = 1_000_000  # rows from which a table is sharded by rows, unless a run says otherwise
MAX_BATCH: Final = (1 << 31) - 1  # what a batch counts by 32-bit integers
MAX_SECONDS: Final = 1e9  # 31 years; as nanoseconds they fit 64 bits
MAX_FLOAT: Final = 1e38  # below the largest fp32


class Section(BaseModel):
    """Base class of all sections: immutable; unknown keys are errors, and so are numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)
