"""POST /v1/embeddings: of each text one row of a named point, the mean over its tokens or its last token's."""

import base64
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import BaseModel, Field

from hookmap.loading.prompts import Prompt, encode
from hookmap.model import HookedModel
from hookmap.services.server.errors import ApiError, bad, blaming
from hookmap.services.server.jobs import Job, Result
from hookmap.services.server.requests import CompletionRequest, Recording, Strict
from hookmap.services.server.streaming import Nameless
from hookmap.services.server.tokens import Token

MOST = 2048
"""texts of one request; OpenAI's limit"""


class Embedding(BaseModel):
    """The vector of one text."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """The answer; openai's own type has no base64."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class EmbeddingRequest(Strict):
    """POST /v1/embeddings. `point`, `layer` and `pooling` are hookmap's."""

    input: str | list[str] | list[int] | list[list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, description="the point's own width, or left out: rows are not cut")
    user: Any = None
    point: str = Field("resid_post", description="a point's name")
    layer: int | None = Field(None, description="negative from the end; the last one where left out")
    pooling: Literal["mean", "last"] = Field("mean", description="over the text's tokens, or the last one's row")

    @property
    def texts(self) -> Sequence[str | list[int]]:
        """Each text, or its token ids. Raises ApiError."""
        given: Any = self.input
        found = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
        if not found or not all(found):
            raise bad("input: expected texts or lists of token ids, none of them empty.", "input")
        if len(found) > MOST:
            raise bad(f"input: {len(found)} texts, and {MOST} is the most.", "input")
        return found

    @property
    def characters(self) -> int:
        """Of the longest text."""
        return max((len(text) for text in self.texts if isinstance(text, str)), default=0)

    def reading(self, hm: HookedModel) -> CompletionRequest:
        """A completion that generates nothing and keeps the rows. Raises ApiError."""
        found = blaming("point", lambda: hm.selectors(points=[self.point], layers="all"))
        of_layers = any(selector.layer is not None for selector in found)
        if not of_layers and self.layer is not None:
            raise bad(f"layer: {self.point} is a point of the whole model; leave layer out.", "layer")
        layers = [-1 if self.layer is None else self.layer] if of_layers else "all"
        pooled: dict[str, Any] = {"mean": True} if self.pooling == "mean" else {"positions": "last"}
        kept = {"points": [self.point], "layers": layers, "calls": "last", **pooled, "return": "inline"}
        record = Recording.model_validate(kept)
        return CompletionRequest.model_construct(prompt="", echo=True, max_tokens=0, hookmap=record)

    def blamed(self, error: ApiError) -> ApiError:
        """An error about that completion, in the words of this request."""
        message, param = str(error), error.param or ""
        own = {"prompt": "input", "hookmap.layers": "layer"}.get(param, "point" if param[:7] == "hookmap" else param)
        message = message.replace("prompt:", "input:", 1) if message.startswith("prompt:") else message
        return ApiError(error.status, message, param=own or None, code=error.code, headers=error.headers)


def prompts_of(asked: EmbeddingRequest, tokenizer: Any) -> tuple[Prompt, ...]:
    """The texts as tokens, with the tokenizer's own special ones. Raises TokenizerError, ApiError."""
    return blaming("input", lambda: encode(list(asked.texts), tokenizer, chat=False))


class EmbeddingWire(Nameless):
    """Writes embeddings. See `streaming.Wire`; they come in one piece only."""

    def __init__(self, asked: EmbeddingRequest, job: Job, model: str) -> None:
        self._asked, self._job, self._model = asked, job, model

    def opening(self) -> Iterator[BaseModel]:
        """See `Wire`."""
        yield from ()

    def piece(self, token: Token) -> Sequence[BaseModel]:
        """See `Wire`."""
        return ()

    def closing(self, result: Result) -> Iterator[BaseModel]:
        """See `Wire`."""
        yield from ()

    def whole(self, result: Result, tokens: list[Token]) -> Embeddings:
        """The vectors, in the order of the texts. Raises ApiError where another dimension was asked for."""
        assert result.meta is not None
        rows = [_row(sample, self._asked.point) for sample in result.meta["samples"]]
        asked = self._asked.dimensions
        if asked not in (None, len(rows[0])):
            raise bad(f"dimensions: {self._asked.point} has {len(rows[0])}, and rows are not cut.", "dimensions")
        data = [
            Embedding(object="embedding", index=number, embedding=self._written(row)) for number, row in enumerate(rows)
        ]
        read = sum(len(prompt.token_ids) for prompt in self._job.prompts)
        return Embeddings(
            object="list", data=data, model=self._model, usage=Usage(prompt_tokens=read, total_tokens=read)
        )

    def _written(self, row: torch.Tensor) -> list[float] | str:
        if self._asked.encoding_format == "base64":
            return base64.b64encode(row.numpy().astype("<f4").tobytes()).decode("ascii")
        return row.tolist()


def _row(sample: dict[str, Any], point: str) -> torch.Tensor:
    """The one row of a text in float32, heads joined. Raises ApiError for a point whose rows are no vectors."""
    rows, *others = safetensors.torch.load(base64.b64decode(sample["safetensors"])).values()
    if others or len(rows) != 1 or rows.ndim < 2:
        raise bad(f"point: {point} has no vector for each token.", "point")
    if not rows.isfinite().all():
        raise ApiError(500, f"{point} of this text is not all numbers.", code="not_finite")
    vector: torch.Tensor = rows[0].flatten().float()
    return vector
