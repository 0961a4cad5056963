"""The base class of all sections of the configuration."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base class of all sections: immutable; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)
