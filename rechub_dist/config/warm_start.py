"""Configuration of warm starts: initial weights from another run or from files."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rechub_dist.config.section import MAX_COUNT, Section


class PretrainedConfig(Section):
    """Pretrained vectors for the rows of a table; rows without a vector keep their initial weights."""

    table: str = Field(description="table name")
    file: str = Field(
        description="path or address: .parquet with a column of ids and one of vectors, or .npy [rows, width]"
    )
    id: str = Field("id", description="Parquet column with the table's row numbers, integers")
    vector: str = Field("vector", description="Parquet column with lists of floats, of the table's width")


class WarmStartConfig(Section):
    """Initial weights from another run or from files, applied at step 0; a resumed run ignores it.

    All patterns are globs over this run's names.
    """

    from_: str | None = Field(
        None, alias="from", description="another run's output folder, checkpoint folder or a single checkpoint"
    )
    step: Literal["best", "newest"] | Annotated[int, Field(ge=0, le=MAX_COUNT)] = Field(
        "best", description="which checkpoint; best: the newest if none is marked best"
    )
    tables: tuple[str, ...] = Field(("*",), description="patterns of tables to load, such as *.linear")
    dense: tuple[str, ...] = Field(("*",), description="patterns of dense parameters and buffers to load")
    exclude: tuple[str, ...] = Field((), description="patterns of tables and parameters not to load")
    rename: dict[str, str] = Field(
        default_factory=dict,
        description="name in the other run: name in this run, of tables or parameters; old.*: new.* renames many",
    )
    embeddings: tuple[PretrainedConfig, ...] = Field(
        (), description="files of pretrained vectors, loaded in order after the other run's weights"
    )

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if self.from_ is None and not self.embeddings:
            raise ValueError("set another run (from) or files of vectors (embeddings)")
        if self.from_ is None and {"step", "tables", "dense", "exclude", "rename"} & self.model_fields_set:
            raise ValueError("step, tables, dense, exclude and rename select weights of another run: set from")
        for old, new in self.rename.items():
            if old.endswith("*") != new.endswith("*"):
                raise ValueError(f"rename: {old} -> {new}: both must end with *, or neither")
        return self
