"""What all sections of a configuration have in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)
