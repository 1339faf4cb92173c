"""/tokenize and /detokenize, as vLLM has them."""

from typing import Any

from fastapi import FastAPI
from pydantic import Field

from hookmap.loading.prompts import encode_text, text_of
from hookmap.services.server.admission import check_ids
from hookmap.services.server.chat import prompt_of
from hookmap.services.server.errors import bad
from hookmap.services.server.models import Loaded, Models
from hookmap.services.server.requests import ChatRequest, Message, Strict, Tool
from hookmap.services.server.settings import Settings


class TokenizeRequest(Strict):
    """POST /tokenize: a text, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = Field(None, description="of a text; unless given, they are added")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def install(app: FastAPI, settings: Settings, models: Models) -> None:
    """Add the routes."""

    @app.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> dict[str, Any]:
        """The token ids of a text, or of messages behind the chat template."""
        model = models.get(asked.model)
        _refuse(asked)
        length = len(asked.prompt or "") or _chat(asked).characters
        field = "messages" if asked.prompt is None else "prompt"

        def read(tokenizer: Any) -> list[int]:
            return _ids(asked, model, tokenizer, settings.image_pixels)

        ids = await model.encoding.run(length, read, field)
        names = model.hm.tokenizer.convert_ids_to_tokens(ids) if asked.return_token_strs else None
        return {"count": len(ids), "max_model_len": model.context, "tokens": ids, "token_strs": names}

    @app.post("/detokenize")
    async def detokenize(asked: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids, special tokens included."""
        model = models.get(asked.model)
        check_ids("tokens", asked.tokens, model.hm.vocabulary)
        return {"prompt": await model.encoding.run(0, lambda tokenizer: text_of(tokenizer, asked.tokens), "tokens")}


def _refuse(asked: TokenizeRequest) -> None:
    """Raises ApiError where not one of a text and messages is given, or a field is of the other one."""
    if (asked.prompt is None) == (asked.messages is None):
        raise bad("expected prompt or messages, one of them.", "prompt")
    of_chat = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")
    given = [name for name in of_chat if getattr(asked, name) is not None]
    if asked.prompt is not None and given:
        raise bad(f"{', '.join(given)}: for messages, and prompt is a text.", given[0])
    if asked.messages is not None and asked.add_special_tokens:
        raise bad("add_special_tokens: the chat template writes them itself.", "add_special_tokens")


def _chat(asked: TokenizeRequest) -> ChatRequest:
    shared = {name: getattr(asked, name) for name in TokenizeRequest.model_fields if name in ChatRequest.model_fields}
    return ChatRequest.model_construct(**{**shared, "messages": asked.messages or []})


def _ids(asked: TokenizeRequest, model: Loaded, tokenizer: Any, pixels: int) -> list[int]:
    if tokenizer is None:
        raise bad("this model has no tokenizer.", "model")
    if asked.prompt is None:
        return list(prompt_of(_chat(asked), model.hm, pixels, tokenizer).token_ids)
    return list(encode_text(asked.prompt, tokenizer, special=asked.add_special_tokens is not False))
