"""Turns a request into a job for the scheduler, or refuses it: its settings and its limits. Nothing runs here."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import GenerationConfig

from hookmap.capture.interventions.documents import fingerprint
from hookmap.loading import generation as gen
from hookmap.loading.prompts import Prompt
from hookmap.loading.wrappers import generation_config_of
from hookmap.model import HookedModel
from hookmap.services.server.echo import check_room
from hookmap.services.server.editing import Documents, read
from hookmap.services.server.errors import bad
from hookmap.services.server.grammar import grammar_of
from hookmap.services.server.jobs import Job
from hookmap.services.server.models import Loaded
from hookmap.services.server.recording import InlineRecorder, RecordingPlan, SessionRecorder, plan
from hookmap.services.server.requests import Recording, Sampling
from hookmap.services.server.scores import ScoreChanges
from hookmap.services.server.sessions import SERVED, Sessions
from hookmap.services.server.settings import Settings
from hookmap.services.server.summaries import summary_of

LEAST_TEMPERATURE = 0.01
"""a smaller one overflows; vLLM's limit"""
_SHOWN = 200
"""characters of what was asked that a list of sessions shows"""


def admit(
    asked: Sampling,
    id: str,
    model: Loaded,
    prompts: Sequence[Prompt],
    settings: Settings,
    sessions: Sessions,
    defaults: Documents = (),
) -> Job:
    """The job of a request: `n` rows of each prompt. `defaults`: interventions for a request that gives none.

    Raises ApiError, 400 or 413 with the figures, and SelectionError.
    """
    asked.refused()
    choices, hm = asked.n or 1, model.hm
    check_choices(choices * len(prompts), settings.max_choices)
    check_tokens(prompts, hm.vocabulary)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    limit = tokens_to_generate(asked, longest, model.context, settings.max_new_tokens)
    if asked.reads_prompt:
        check_room(hm, choices * longest, settings.request_bytes)
    config = generation_config(asked, hm, limit)
    field = asked.hookmap or Recording.model_validate({})
    given = defaults if field.interventions is None else field.interventions
    interventions = read(given, hm, sessions, settings.functions)
    job = Job(
        id=id,
        prompts=tuple(prompt for prompt in prompts for _ in range(choices)),
        choices=choices,
        config=config,
        max_new_tokens=limit,
        stop=asked.stops,
        seed=asked.seed,
        interventions=interventions,
        changes=score_changes(asked, hm, gen.end_tokens(config), limit),
        top_logprobs=asked.logprob_count,
        prompt_logprobs=max(asked.logprob_count or 0, asked.prompt_logprobs or 0) if asked.reads_prompt else None,
        summary=summary_of(field.summary, hm.map) if field.summary else None,
        reads_only=asked.reads_only,
    )
    if (what := plan(asked, hm, settings, job.prompts, limit, sessions)) is not None:
        inline = what.inline
        job.recorder = (
            InlineRecorder(what, hm.tokenizer) if inline else session_recorder(what, asked, job, model, sessions)
        )
    if job.echo and any(change.point == "logits" for change in interventions):
        raise bad(
            "echo: logprobs of a prompt are told before an intervention on logits; leave one of them out.", "echo"
        )
    return job


def session_recorder(
    what: RecordingPlan, asked: Sampling, job: Job, model: Loaded, sessions: Sessions
) -> SessionRecorder:
    """A recorder whose session says how the request was answered, and what its client calls it."""
    label = asked.hookmap.label if asked.hookmap else None
    own = {"label": label, "metadata": asked.metadata, "prompt": asked.title[:_SHOWN]}
    answered: dict[str, Any] = {
        "generation": gen.as_json(job.config),
        "seed": job.seed,
        "stop": list(job.stop),
        "batch_size": job.choices,
        "request": job.id,
        "prompts": len(job.prompts),
        SERVED: {name: value for name, value in own.items() if value},
    }
    if job.interventions:
        answered["interventions"] = fingerprint(job.interventions)
    return SessionRecorder(what, sessions, model.hm, model.name, answered, bool(asked.return_token_ids))


def generation_config(asked: Sampling, hm: HookedModel, limit: int) -> GenerationConfig:
    """The settings of this generation of at most `limit` tokens. Raises CaptureError."""
    own = generation_config_of(hm.hooks.runner, hm.root)
    options = sampling_options(asked, own)
    drawn = "temperature" in options
    config = gen.settings(own, hm.tokenizer, max_new_tokens=limit, do_sample=drawn, options=options)
    if asked.ignore_eos or asked.stop_token_ids:
        check_ids("stop_token_ids", asked.stop_token_ids or (), hm.vocabulary)
        own_ends = () if asked.ignore_eos else gen.end_tokens(config)
        # Where there is none, transformers would take the model's own again: a token that never comes stands for it.
        config.eos_token_id = list(dict.fromkeys((*own_ends, *(asked.stop_token_ids or ())))) or [hm.vocabulary]
    return config


def score_changes(asked: Sampling, hm: HookedModel, ends: Sequence[int], limit: int) -> ScoreChanges:
    """What the request changes of the scores. Raises ApiError."""
    vocabulary = hm.vocabulary
    if (least := asked.min_tokens or 0) > limit:
        raise bad(f"min_tokens: {least} are more than the {limit} that may be generated.", "min_tokens")
    if wrong := [key for key in asked.logit_bias or {} if not key.isascii() or not key.isdecimal()]:
        raise bad(f"logit_bias: expected token ids, got {wrong[0]!r:.40}.", "logit_bias")
    bias = {int(key[:12]): value for key, value in (asked.logit_bias or {}).items()}
    check_ids("logit_bias", bias, vocabulary)
    ends = tuple(end for end in ends if end < vocabulary)
    grammar = grammar_of(asked.format, hm, ends)
    return ScoreChanges(asked.presence_penalty or 0.0, asked.frequency_penalty or 0.0, bias, least, ends, grammar)


def check_ids(name: str, ids: Iterable[int], size: int) -> None:
    """Raises ApiError for token ids outside of the vocabulary."""
    if wrong := [token for token in ids if not 0 <= token < size]:
        raise bad(f"{name}: token ids {wrong[:5]}: the model's vocabulary is 0 to {size - 1}.", name)


def check_choices(rows: int, most: int) -> None:
    """Raises ApiError for too many rows."""
    if rows > most:
        raise bad(f"{rows} choices (n × prompts) were asked for, and {most} is the most.", "n")


def check_tokens(prompts: Sequence[Prompt], size: int) -> None:
    """Raises ApiError for token ids outside of the vocabulary."""
    for prompt in prompts:
        check_ids("prompt", prompt.token_ids, size)


def check_context(prompt: int, new: int, context: int | None, field: str) -> None:
    """Raises ApiError where so many tokens do not fit into the model. `field`: that of the prompt."""
    if context is not None and prompt + new > context:
        raise bad(
            f"This model's maximum context length is {context} tokens. However, you requested {prompt + new} "
            f"tokens ({prompt} in the prompt, {new} in the completion). Shorten the prompt or max_tokens.",
            field,
            "context_length_exceeded",
        )


def tokens_to_generate(asked: Sampling, prompt: int, context: int | None, most: int) -> int:
    """How many tokens may be generated after a prompt of so many. `most`: the server's limit. Raises ApiError."""
    if asked.reads_only:
        check_context(prompt, 0, context, asked.reads)
        return 1
    limit, name = asked.token_limit, asked.limits
    if limit == 0:
        raise bad(f"{name}: expected at least 1, got 0; only completions with echo read without writing.", name)
    if limit is not None and limit > most:
        raise bad(f"{name}: {limit} were asked for, and this server generates at most {most}.", name)
    check_context(prompt, limit or 1, context, asked.reads)
    if limit is not None:
        return limit
    return most if context is None else min(most, context - prompt)


def sampling_options(asked: Sampling, own: Any) -> dict[str, Any]:
    """Fields of GenerationConfig, filled as vLLM does: from the request, else from the model, else no restriction.

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
