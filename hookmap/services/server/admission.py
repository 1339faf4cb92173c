"""May this request run? Its settings, its budgets and the job that the model's thread gets. Nothing runs here."""

from collections.abc import Sequence
from typing import Any

from hookmap.capture.interventions.documents import fingerprint
from hookmap.loading import generation as gen
from hookmap.loading.prompts import Prompt
from hookmap.loading.wrappers import generation_config_of
from hookmap.services.server.echo import check_room
from hookmap.services.server.editing import Documents, read
from hookmap.services.server.errors import ApiError, bad
from hookmap.services.server.jobs import Job, Keeper
from hookmap.services.server.models import Loaded
from hookmap.services.server.recording import ToAnswer, ToStore, plan
from hookmap.services.server.requests import Sampling
from hookmap.services.server.sessions import Sessions
from hookmap.services.server.settings import Settings
from hookmap.services.server.summaries import summary_of

LEAST_TEMPERATURE = 0.01
"""as in vLLM: a smaller one overflows"""


def admit(
    asked: Sampling,
    id: str,
    model: Loaded,
    prompts: Sequence[Prompt],
    max_tokens: int | None,
    top_logprobs: int | None,
    settings: Settings,
    sessions: Sessions,
    defaults: Documents = (),
) -> Job:
    """The job of a request for `n` rows of each prompt. `defaults`: interventions, where it brings none.

    Raises ApiError: 400 and 413 with the figures.
    """
    asked.refused()
    n = asked.n or 1
    if (rows := n * len(prompts)) > settings.max_choices:
        raise bad(f"{rows} choices (n × prompts) were asked for, and {settings.max_choices} is the most.", "n")
    _check_tokens(prompts, model.hm.vocabulary)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    new = 1 if asked.reads_only else new_tokens(longest, max_tokens, model.context, settings)
    if asked.reads_only:
        _check_context(longest, 0, model.context)
    if asked.reads_prompt:
        check_room(model.hm, n * longest, settings.request_bytes)
    settled = generation_config_of(model.hm.hooks.runner, model.hm.root)
    options = sampling_options(asked, settled)
    config = gen.settings(
        settled,
        model.hm.tokenizer,
        max_new_tokens=new,
        do_sample="temperature" in options,
        options=options,
    )
    each = tuple(prompt for prompt in prompts for _ in range(n))
    own = asked.hookmap.interventions if asked.hookmap is not None else None
    changes = read(defaults if own is None else own, model.hm, sessions)
    summary = None
    if asked.hookmap is not None and asked.hookmap.summary is not None:
        summary = summary_of(asked.hookmap.summary, model.hm.map)
    what = plan(asked, model.hm, settings, each, new)
    keeper: Keeper | None = None
    if what is not None and what.inline:
        keeper = ToAnswer(what)
    elif what is not None:
        told: dict[str, Any] = {
            "generation": gen.as_json(config),
            "seed": asked.seed,
            "stop": list(asked.stops),
            "batch_size": n,
        }
        told |= {"request": id, "prompts": rows}
        told |= {"interventions": fingerprint(changes)} if changes else {}
        keeper = ToStore(what, sessions, model.hm, model.name, told)
    if asked.reads_prompt and any(change.point == "logits" for change in changes):
        raise bad(
            "echo: logprobs of a prompt are told before an intervention on logits; leave one of them out.", "echo"
        )
    return Job(
        id,
        each,
        n,
        config,
        new,
        asked.stops,
        asked.seed,
        keeper,
        changes,
        top_logprobs,
        summary,
        asked.reads_prompt,
        asked.reads_only,
    )


def new_tokens(prompt: int, asked: int | None, context: int | None, settings: Settings) -> int:
    """How many tokens may be generated after a prompt of so many. Raises ApiError."""
    most = settings.max_new_tokens
    if asked == 0:
        raise bad(
            "max_tokens: expected at least 1, got 0; only completions with echo read without writing.", "max_tokens"
        )
    if asked is not None and asked > most:
        raise bad(f"max_tokens: {asked} were asked for, and this server generates at most {most}.", "max_tokens")
    _check_context(prompt, asked or 1, context)
    if asked is not None:
        return asked
    return most if context is None else min(most, context - prompt)


def _check_context(prompt: int, new: int, context: int | None) -> None:
    if context is not None and prompt + new > context:
        raise bad(
            f"This model's maximum context length is {context} tokens. However, you requested {prompt + new} "
            f"tokens ({prompt} in the prompt, {new} in the completion). Shorten the prompt or max_tokens.",
            "messages",
            "context_length_exceeded",
        )


def sampling_options(asked: Sampling, own: Any) -> dict[str, Any]:
    """Fields of GenerationConfig, as vLLM fills them: the request's, else the model's own, else no restriction.

    Temperature 0 is greedy. `own`: the model's generation settings.
    """
    found: dict[str, Any] = {}
    if asked.repetition_penalty is not None:
        found["repetition_penalty"] = asked.repetition_penalty
    temperature = _first(asked.temperature, own.temperature, 1.0)
    if temperature == 0:
        return found
    found["temperature"] = max(float(temperature), LEAST_TEMPERATURE)
    found["top_p"] = float(_first(asked.top_p, own.top_p, 1.0))
    found["top_k"] = max(0, int(_first(asked.top_k, own.top_k, 0)))
    if (least := _first(asked.min_p, own.min_p, 0.0)) > 0:
        found["min_p"] = least
    return found


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _check_tokens(prompts: Sequence[Prompt], size: int) -> None:
    for prompt in prompts:
        if wrong := [token for token in prompt.token_ids if not 0 <= token < size]:
            raise ApiError(400, f"token ids {wrong[:5]}: the model's vocabulary is 0 to {size - 1}.", param="prompt")
