"""How a capture generates: its settings, when a row is finished, what it draws. One row for each prompt, no beams."""

import contextlib
import copy
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, StopStringCriteria

from hookmap.errors import CaptureError
from hookmap.loading.prompts import text_of
from hookmap.wording import did_you_mean

_OF_ONE_ROW = frozenset(
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

Told = Callable[[int, list[bool]], None]
"""(columns of the batch now, whether each row got its last token with this one)"""

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
    """What decides the samples: a run with other settings cannot go on with a folder."""
    found = {k: v for k, v in config.to_diff_dict().items() if k != "transformers_version"}
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def counts_pads(config: GenerationConfig) -> bool:
    """Whether a setting may take pads for tokens of the row, as transformers' repetition_penalty does."""
    return bool(as_json(config).keys() - _OF_ONE_ROW - _NO_MATTER - _BY_COLUMNS)


def of_one_row(config: GenerationConfig) -> dict[str, Any] | None:
    """The settings that decide a row's next token, where it does not matter what else is in the batch, or when."""
    found = as_json(config)
    if found.keys() - _OF_ONE_ROW - _NO_MATTER:
        return None
    return {name: value for name, value in found.items() if name in _OF_ONE_ROW}


def end_tokens(config: GenerationConfig) -> tuple[int, ...]:
    """The tokens that end a sequence; none is possible."""
    ends = config.eos_token_id
    if ends is None:
        return ()
    return (ends,) if isinstance(ends, int) else tuple(ends)


def takes(root: nn.Module, argument: str) -> bool:
    """Whether the model's forward has this argument."""
    return argument in inspect.signature(type(root).forward).parameters


def logits_parameter(root: nn.Module) -> inspect.Parameter | None:
    """The argument of the model's forward that says which logits it computes: `logits_to_keep`, or a sibling of it."""
    parameters = inspect.signature(type(root).forward).parameters.values()
    return next((each for each in parameters if _WHICH_LOGITS.search(each.name)), None)


def which_logits(columns: Sequence[int] | None, width: int) -> int | torch.Tensor:
    """The value of that argument for these columns of `width`, ascending, or for all (None)."""
    if columns is None:
        return 0
    behind = width - columns[0]
    return behind if len(columns) == behind else torch.tensor(columns)


class Ending:
    """When a row is finished: at an end of sequence or a stop string, the run's or the model's own."""

    def __init__(self, config: GenerationConfig, stop: Sequence[str], tokenizer: Any) -> None:
        """Raises CaptureError for stop strings without a tokenizer."""
        if stop and tokenizer is None:
            raise CaptureError("stop strings need a tokenizer: hookmap.open(model, tokenizer=...)")
        self._ends = frozenset(end_tokens(config))
        self._stop = tuple(stop)
        self._tokenizer = tokenizer
        self._own = _stopping(tokenizer, config.stop_strings)
        # A token is a byte at least, so that a stop string that has just ended is inside this many tokens.
        self.reach = max((len(text.encode()) for text in stop), default=0) + 4
        """newest tokens that matter"""

    def own(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Which rows of token ids, [batch, columns], end with a stop string of the model's, as transformers tells."""
        if self._own is None:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        found: torch.Tensor = self._own(input_ids, None)
        return found

    def at(self, newest: Sequence[int]) -> bool:
        """Whether the last of a row's newest generated tokens, `reach` of them or all, is its last."""
        if newest[-1] in self._ends:
            return True
        if not self._stop:
            return False
        return any(stop in text for text in self._texts(list(newest)) for stop in self._stop)

    def _texts(self, newest: list[int]) -> Iterator[str]:
        """Of the newest tokens; more than one where they may begin inside a character, which has four bytes at most.

        A tokenizer that writes bytes as tokens (Llama 2's) decodes none of the bytes behind half a character.
        """
        for first in range(4):
            text = text_of(self._tokenizer, newest[first:])
            yield text
            if "\ufffd" not in text:
                return


def _stopping(tokenizer: Any, strings: Any) -> StopStringCriteria | None:
    if not strings:
        return None
    try:
        return StopStringCriteria(tokenizer, strings)
    except Exception as error:  # it takes tokenizers apart, not each of which can be
        raise CaptureError(
            f"the model's own generation settings have stop_strings={strings!r}, and transformers cannot look for them "
            f"with this {type(tokenizer).__name__}: {type(error).__name__}: {error}"
        ) from error


class Finished(StoppingCriteria):  # type: ignore[misc]  # transformers' base is not typed
    """Ends rows at an end of sequence or a stop string, and tells which ended, after each token."""

    def __init__(self, config: GenerationConfig, stop: Sequence[str], tokenizer: Any, tell: Told) -> None:
        self._ending = Ending(config, stop, tokenizer)
        self._tell = tell
        self._prompt: int | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        columns = input_ids.shape[1]
        if self._prompt is None:
            self._prompt = columns - 1
        newest = input_ids[:, max(self._prompt, columns - self._ending.reach) :].tolist()
        own = self._ending.own(input_ids).tolist()
        done = [its or self._ending.at(row) for its, row in zip(own, newest, strict=True)]
        self._tell(columns, done)
        return torch.tensor(done, device=input_ids.device)


def own_seed(seed: int, of: int | str) -> int:
    """The seed, of 62 bits, that one sample of a run draws with, or one request; the first sample's is the run's own.

    `of`: the sample's number, 0-based, or a request's name. Nothing else decides it: no batch, and not what ran before.
    """
    if of == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{of}".encode()).digest()[:8], "big") >> 2


def own_generator(seed: int, number: int, device: torch.device) -> torch.Generator:
    """What sample `number` draws from: the numbers of torch's own generator after `torch.manual_seed(own_seed)`."""
    return torch.Generator(device).manual_seed(own_seed(seed, number))


class OwnDraws:
    """A way of generating for `generate(custom_generate=...)`: each row draws from a generator of its own.

    So a row draws what it draws alone, whatever is in the batch, and torch's generators are not touched.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        """One generator for each row, on the device of the token ids."""
        self._generators = generators
        self._ran = False

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> torch.Tensor:
        """transformers' own loop, in which the drawn token is the only one that is left to take."""
        self._ran = True
        logits_processor.append(_Drawn(self._generators))  # behind temperature and the like
        generation_config.do_sample = False  # `generate`'s own copy
        sequences: torch.Tensor = model._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, **inputs
        )
        return sequences

    @contextlib.contextmanager
    def expected(self, module: Any) -> Iterator[None]:
        """Raises CaptureError where the `generate` of `module` that runs inside has a loop of its own."""
        why = (
            f"{type(module).__name__}.generate has a loop of its own, and takes no custom_generate: it cannot draw "
            "with a seed. Leave seed= out, generate greedily, or open the transformers model in it."
        )
        try:
            yield
        except TypeError as error:
            if "custom_generate" in str(error):
                raise CaptureError(why) from error
            raise
        if not self._ran:
            raise CaptureError(why)


class _Drawn(LogitsProcessor):  # type: ignore[misc]  # transformers' base is not typed
    """0 for the token that a row draws, -inf for all others."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = generators

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        rows = zip(scores.softmax(-1), self._generators, strict=True)
        drawn = torch.stack([torch.multinomial(row, 1, generator=own) for row, own in rows])
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """No dropout inside; every module's training flag as before outside."""
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def _pad_token(config: GenerationConfig, tokenizer: Any) -> int:
    """What fills the left of shorter prompts. The attention mask hides it, so any token serves."""
    own = getattr(tokenizer, "pad_token_id", None)
    return own if own is not None else (*end_tokens(config), 0)[0]
