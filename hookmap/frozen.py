"""What every document of hookmap is, where JSON enters or leaves."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A document, or a part of one: immutable, and without fields that it does not name."""

    model_config = ConfigDict(frozen=True, extra="forbid")
