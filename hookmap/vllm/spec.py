"""What a request asks of hookmap: `SamplingParams.extra_args["hookmap"]`, which is `vllm_xargs` of a server. Strict."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hookmap.capture.options import field_of
from hookmap.capture.rows import RowSelection, row_selection
from hookmap.errors import CaptureError

NAME = "hookmap"
"""the key in `extra_args`"""


class RowsKept(BaseModel):
    """Which rows are kept, as the options of a capture name them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    positions: str | list[int] = field_of("positions")
    every: int = field_of("every", ge=1)
    mean: bool = field_of("mean")

    def selection(self) -> RowSelection:
        """Raises SelectionError."""
        return row_selection(**self.model_dump())


class PlannedEdits(BaseModel):
    """Interventions that were registered with the workers before, and what they need to know of this request."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    plan: str = Field(min_length=1, description="the name that `hookmap_plan` gave")
    sample: int = Field(default=0, ge=0, description="number of the sample in its run: it decides what is drawn")
    only: dict[str, dict[str, int]] = Field(
        default_factory=dict, description="of a patch: its number in the plan -> position -> row of its source"
    )
    images: list[int] = Field(default_factory=list, description="positions of tokens that stand for an image")


def _as_layers(value: Any) -> Any:
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


class RequestSpec(BaseModel):
    """All that a request may ask for."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    points: dict[str, Annotated[Literal["all"] | list[int] | None, BeforeValidator(_as_layers)]] = Field(
        default_factory=dict, description="points to capture, each with its layers; null for points of the whole model"
    )
    rows: RowsKept = Field(default_factory=RowsKept)
    matching: list[int] = Field(default_factory=list, description='token ids that positions "text=…" selects')
    images: list[int] = Field(default_factory=list, description="positions of tokens that stand for an image")
    edits: PlannedEdits | None = None

    def salt(self, prompt_tokens: int) -> str | None:
        """What keeps the cached keys and values of an edited request apart; None where nothing is edited.

        Which tokens are edited may depend on where the prompt ends, and so on its length.
        """
        if self.edits is None:
            return None
        plain = json.dumps([self.edits.model_dump(mode="json"), prompt_tokens], sort_keys=True)
        return f"hookmap-{hashlib.sha256(plain.encode()).hexdigest()}"


def spec_of(arguments: Mapping[str, Any] | None) -> RequestSpec | None:
    """What a request asks for; None where it asks for nothing. `arguments`: its `extra_args`.

    Accepts the document, or JSON of it. Raises CaptureError that names every problem.
    """
    given = (arguments or {}).get(NAME)
    if given is None:
        return None
    try:
        return RequestSpec.model_validate_json(given if isinstance(given, str) else json.dumps(given))
    except (ValidationError, TypeError, ValueError) as error:
        problems = error.errors() if isinstance(error, ValidationError) else []
        told = [f"{'.'.join(map(str, each['loc'])) or 'it'}: {each['msg']}" for each in problems] or [str(error)]
        raise CaptureError(f"{NAME}: this is no request of hookmap's: {'; '.join(told)}") from error
