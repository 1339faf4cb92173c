"""The settings with which a capture generates. One row for each prompt, no beams."""

import copy
import functools
import inspect
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from hookmap.errors import CaptureError
from hookmap.wording import did_you_mean

OF_ONE_ROW = frozenset(
    "do_sample temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff eos_token_id".split()
)
"""settings that look at nothing but a row's next scores; others may count pads as tokens of the row"""
_NO_MATTER = frozenset(
    "max_new_tokens max_length bos_token_id pad_token_id decoder_start_token_id disable_compile use_cache "
    "_from_model_config output_attentions output_hidden_states return_dict_in_generate".split()
)
_BY_COLUMNS = frozenset(
    "min_new_tokens suppress_tokens begin_suppress_tokens renormalize_logits remove_invalid_values max_time num_beams "
    "num_return_sequences cache_implementation cache_config prefill_chunk_size output_scores output_logits".split()
)
"""settings that count from the end of the prompts, which is one column for all, or look at no token"""
_SAMPLING = ("temperature", "top_k", "top_p")
_NOT_HERE = {
    "stop_strings": "give it as stop=, which also cuts the rows behind it",
    "max_length": "give max_new_tokens=, which does not count the prompt",
    "return_dict_in_generate": "a capture returns what points= names",
    "output_hidden_states": "name resid_pre among points=",
    "output_attentions": "name pattern among points=",
    "output_scores": "name logits among points=",
    "output_logits": "name logits among points=",
}
_WHICH_LOGITS = re.compile(r"logits?_to_(keep|compute)|(keep|last)_(n_)?logits")
HALF = re.compile("[\ud800-\udfff]")
"""half a surrogate pair: what JSON and a command line may hold, and no text does"""


class _StopStringsElsewhere(GenerationConfig):  # type: ignore[misc]  # transformers' base is not typed
    """Settings without stop strings, also where the model's own have some, which `generate` puts in place of None."""

    @property
    def stop_strings(self) -> None:
        return None

    @stop_strings.setter
    def stop_strings(self, value: Any) -> None:
        pass


def without_stop_strings(config: GenerationConfig) -> GenerationConfig:
    """A copy for `generate`, whose caller looks for stop strings itself: see `hookmap.loading.stopping.Ending`.

    transformers needs a tokenizer to look for them, and drops it beside a custom_generate.
    """
    found = copy.copy(config)
    if found.stop_strings:  # else it stays transformers' own class, which a remote server has, too
        found.__dict__.pop("stop_strings")
        found.__class__ = _StopStringsElsewhere
    return found


def settings(
    own: GenerationConfig, tokenizer: Any, *, max_new_tokens: int, do_sample: bool, options: Mapping[str, Any]
) -> GenerationConfig:
    """The model's own generation settings with these over them; the model's stay as they are.

    `options`: any field of transformers' GenerationConfig. Raises CaptureError for a field it does not have, for
    sampling fields without `do_sample`, and for ways of generating in which a row is not a prompt.
    """
    check_count("max_new_tokens", max_new_tokens)
    given = {name: value for name, value in options.items() if value is not None}
    check_names(given)
    config: GenerationConfig = copy.deepcopy(own)
    if config.stop_strings and tokenizer is None:
        raise CaptureError(
            f"the model's own generation settings have stop_strings={config.stop_strings!r}, which need a tokenizer: "
            "hookmap.open(model, tokenizer=...)"
        )
    if not do_sample:
        if unused := [name for name in _SAMPLING if name in given]:
            raise CaptureError(f"{', '.join(unused)} needs do_sample=True: greedy decoding does not use it.")
        given |= {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # transformers' defaults: it warns of others
    ours = {"return_dict_in_generate": False, "output_hidden_states": False, "output_attentions": False}
    ours["disable_compile"] = True  # compiled code passes no hooks
    try:
        config.update(**given, **ours, max_new_tokens=max_new_tokens, do_sample=do_sample)
        config.validate()
    except ValueError as error:
        raise CaptureError(f"transformers refuses these generation settings: {error}") from error
    if config.pad_token_id is None:
        config.pad_token_id = _pad_token(config, tokenizer)
    mode = config.get_generation_mode()
    if mode not in ("greedy_search", "sample") or (config.num_return_sequences or 1) > 1:
        raise CaptureError(
            f"this way of generating ({mode.value}, num_return_sequences={config.num_return_sequences}) has no row for "
            "each prompt. Give num_beams=1, num_return_sequences=1."
        )
    return config


def check_names(given: Iterable[str], of_capture: Iterable[str] = ()) -> None:
    """Raises CaptureError for names that are no generation settings. `of_capture`: arguments that may be meant."""
    known = set(GenerationConfig().to_dict())
    for name in given:
        if name in _NOT_HERE:
            raise CaptureError(f"{name}: {_NOT_HERE[name]}.")
        if name not in known:
            hint = did_you_mean(name, [*of_capture, *known]) or "it is no field of transformers' GenerationConfig."
            raise CaptureError(f"unknown generation setting {name!r}: {hint}")


def check_count(name: str, count: Any, least: int = 1) -> None:
    """Raises CaptureError where `count` is not a whole number of at least `least`."""
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise CaptureError(f"{name}: expected a whole number, at least {least}, got {count!r}.")


def check_seed(seed: Any) -> None:
    """Raises CaptureError where torch could not be seeded with it."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63):
        raise CaptureError(f"seed: expected None or a whole number of 64 bits, got {seed!r}.")


def check_stop(stop: Sequence[Any]) -> None:
    """Raises CaptureError for what is no text, and for the empty text, which every row ends with at once."""
    if wrong := [text for text in stop if not isinstance(text, str) or not text or HALF.search(text)]:
        raise CaptureError(f"stop: expected texts of at least one whole character, got {wrong[0]!r}.")


def as_json(config: GenerationConfig) -> dict[str, Any]:
    """The settings that decide the samples: a run with others cannot resume a folder."""
    found = {k: v for k, v in config.to_diff_dict().items() if k != "transformers_version"}
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def counts_pads(config: GenerationConfig) -> bool:
    """Whether a setting may take pads for tokens of the row, as transformers' repetition_penalty does."""
    return bool(as_json(config).keys() - OF_ONE_ROW - _NO_MATTER - _BY_COLUMNS)


def of_one_row(config: GenerationConfig) -> dict[str, Any] | None:
    """The settings that decide a row's next token, where it does not matter what else is in the batch, or when."""
    found = as_json(config)
    if found.keys() - OF_ONE_ROW - _NO_MATTER:
        return None
    return {name: value for name, value in found.items() if name in OF_ONE_ROW}


def unserved(config: GenerationConfig, served: Collection[str]) -> list[str]:
    """Settings that decide the samples and are not among those that an engine has."""
    return sorted(as_json(config).keys() - {*served} - _NO_MATTER)


def end_tokens(config: GenerationConfig) -> tuple[int, ...]:
    """The tokens that end a sequence; may be empty."""
    ends = config.eos_token_id
    if ends is None:
        return ()
    return (ends,) if isinstance(ends, int) else tuple(ends)


def takes(root: nn.Module, argument: str) -> bool:
    """Whether the model's forward has this argument."""
    return argument in inspect.signature(type(root).forward).parameters


def logits_parameter(root: nn.Module) -> inspect.Parameter | None:
    """The argument of the model's forward that says which logits it computes: `logits_to_keep`, or a sibling of it."""
    return _logits_parameter_of(type(root).forward)


@functools.lru_cache(maxsize=64)
def _logits_parameter_of(forward: Callable[..., Any]) -> inspect.Parameter | None:
    """Asked on every forward pass."""
    parameters = inspect.signature(forward).parameters.values()
    return next((each for each in parameters if _WHICH_LOGITS.search(each.name)), None)


def which_logits(columns: Sequence[int] | None, width: int) -> int | torch.Tensor:
    """The value of that argument for these columns of `width`, ascending, or for all (None)."""
    if columns is None:
        return 0
    behind = width - columns[0]
    return behind if len(columns) == behind else torch.tensor(columns)


def _pad_token(config: GenerationConfig, tokenizer: Any) -> int:
    """What fills the left of shorter prompts. The attention mask hides it, so any token serves."""
    own = getattr(tokenizer, "pad_token_id", None)
    return own if own is not None else (*end_tokens(config), 0)[0]
