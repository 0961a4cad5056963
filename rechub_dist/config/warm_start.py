"""What a run begins with besides its own initial weights."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from rechub_dist.config.section import Section


class PretrainedConfig(Section):
    """Vectors from a file for the rows of a table; rows that it does not have keep their initial weights."""

    table: str
    file: str = Field(description=".parquet with a column of ids and one of vectors, or .npy [rows, width]; or address")
    id: str = Field("id", description="Parquet column of row numbers of the table, integers")
    vector: str = Field("vector", description="Parquet column of lists of floats, as long as the table is wide")


class WarmStartConfig(Section):
    """Weights of another run and vectors from files, at step 0; a run that is taken up again ignores it.

    All patterns are globs over this run's names.
    """

    from_: str | None = Field(
        None, alias="from", description="another run's output folder, its folder of checkpoints, or one checkpoint"
    )
    step: Literal["best", "newest"] | int = Field("best", description="best: the newest where none is best")
    tables: tuple[str, ...] = Field(("*",), description="patterns of tables, `*.linear` for instance")
    dense: tuple[str, ...] = Field(("*",), description="patterns of the model's other parameters and buffers")
    exclude: tuple[str, ...] = Field((), description="patterns of tables and parameters to leave as they are")
    rename: dict[str, str] = Field(
        default_factory=dict, description="names there: names here, of tables or parameters; `old.*: new.*` for many"
    )
    embeddings: tuple[PretrainedConfig, ...] = Field((), description="files of pretrained vectors, one after another")

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if self.from_ is None and not self.embeddings:
            raise ValueError("name another run (from) or files of vectors (embeddings)")
        if self.from_ is None and {"step", "tables", "dense", "exclude", "rename"} & self.model_fields_set:
            raise ValueError("step, tables, dense, exclude and rename say what is taken of another run: name it (from)")
        for old, new in self.rename.items():
            if old.endswith("*") != new.endswith("*"):
                raise ValueError(f"rename: {old} -> {new}: let both end with * or neither")
        return self
