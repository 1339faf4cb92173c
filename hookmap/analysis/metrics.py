"""What a run is measured by: one number for each prompt, from the logits of a forward pass over it.

A metric is one of the objects made here, or any function of (logits, at). The same ones measure runs, gradients and
sweeps. All are computed in float32, or in float64 where the logits are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from hookmap.analysis.tokens import token_id
from hookmap.capture.interventions.documents import read_interventions
from hookmap.capture.interventions.edits import EditedTokens
from hookmap.capture.interventions.functions import At, Called, watch
from hookmap.capture.interventions.plan import EditPlan
from hookmap.capture.interventions.watching import Watch
from hookmap.capture.options import BatchOptions, MeasureOptions, TemplateOptions, of_kind, with_defaults
from hookmap.capture.result import Capture
from hookmap.capture.rows import row_selection
from hookmap.errors import InterventionError, SelectionError
from hookmap.loading.prompts import Prompt, records
from hookmap.wording import counted, did_you_mean, sentence

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

Token = str | int
Answer = str | int | Sequence[int]
"""a text, or token ids"""


@dataclass(frozen=True)
class Reading:
    """Where the logits are that a metric gets: of one prompt."""

    sample: int
    """the number of the prompt"""
    positions: tuple[int, ...]
    """of each row of logits: row i is what follows the token at positions[i]"""
    tokens: tuple[int, ...]
    """the token ids that the model read: the prompt, and the answer without its last token where the metric has one"""
    prompt_tokens: int
    """how many of them are the prompt"""


Measure = Callable[[torch.Tensor, Reading], torch.Tensor]
"""logits [n, d_vocab] and where they are -> a number, a tensor without axes"""


@dataclass(frozen=True)
class Bound:
    """A metric of certain prompts of one model."""

    name: str
    """in words"""
    prompts: tuple[Prompt, ...]
    """as the model reads them: with the answer behind, where the metric has one"""
    measure: Measure
    lengths: tuple[int, ...]
    """tokens of each prompt itself"""
    last: int | None = None
    """how many of the last rows of logits it reads; None for all"""

    def __call__(self, logits: torch.Tensor, sample: int) -> torch.Tensor:
        """The metric of one prompt, without axes. `logits`: the last rows of it, [n, d_vocab].

        Raises SelectionError where the metric gives something else than a number.
        """
        tokens = self.prompts[sample].token_ids
        where = range(len(tokens))[-len(logits) :]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        at = Reading(sample, tuple(where), tokens, self.lengths[sample])
        try:
            found = self.measure(wide, at)
        except Exception as error:  # the user's own code may raise anything
            raise SelectionError(
                f"the metric {self.name} of prompt {sample} raised {type(error).__name__}: {error}"
            ) from error
        if not isinstance(found, torch.Tensor) or found.numel() != 1 or not found.is_floating_point():
            got = f"{found.dtype} {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
            raise SelectionError(
                f"the metric {self.name} of prompt {sample}: expected a tensor of one number, got {got}"
            )
        return found.reshape(())

    def of(self, numbers: Sequence[int]) -> Bound:
        """The same metric of these prompts alone, in this order."""

        def measure(logits: torch.Tensor, at: Reading) -> torch.Tensor:
            return self.measure(logits, replace(at, sample=numbers[at.sample]))

        prompts = tuple(self.prompts[number] for number in numbers)
        lengths = tuple(self.lengths[number] for number in numbers)
        return replace(self, prompts=prompts, measure=measure, lengths=lengths)

    @property
    def positions(self) -> str:
        """Whose logits it reads, in the words of a capture."""
        return "all" if self.last is None else f"-{self.last}:"


class Metric(ABC):
    """A metric that is an object: it says what it needs of the model."""

    @abstractmethod
    def bind(self, hm: Hooked, prompts: Sequence[Prompt]) -> Bound:
        """This metric of these prompts. Raises SelectionError and TokenizerError."""


def bind(hm: Hooked, metric: Metric | Measure, prompts: Sequence[Prompt]) -> Bound:
    """A metric, or a function of (logits, at), of these prompts. Raises SelectionError for something else."""
    if isinstance(metric, Metric):
        return metric.bind(hm, prompts)
    if not callable(metric):
        raise SelectionError(
            f"metric: expected one of hookmap.metrics, or a function of (logits, at), got {type(metric).__name__}."
        )
    name = str(getattr(metric, "__name__", type(metric).__name__))
    return Bound(name, tuple(prompts), metric, tuple(len(prompt.token_ids) for prompt in prompts))


def logit_difference(right: Token | Sequence[Token], wrong: Token | Sequence[Token]) -> Metric:
    """The logit of the next token `right` minus that of `wrong`: texts of one token, or ids; or lists, one a prompt."""
    return _Difference(right, wrong)


def probability(answer: Answer | Sequence[Answer]) -> Metric:
    """The probability of `answer` after the prompt: the product over its tokens. See `log_probability`."""
    return _Answer(answer, exponential=True)


def log_probability(answer: Answer | Sequence[Answer]) -> Metric:
    """The log-probability of `answer` after the prompt, the sum over its tokens: the model reads those before each.

    answer: a text, a token id, or a tuple of ids; or a list of such, one a prompt.
    """
    return _Answer(answer, exponential=False)


def kl_divergence(clean: Any = None) -> Metric:
    """How far the next token's distribution is from the clean run's: sum of clean * log(clean / found), in nats.

    clean: prompts, one for each; unless given, the same prompts without interventions.
    """
    return _Divergence(clean)


def loss() -> Metric:
    """The mean cross-entropy of each text's own tokens, in nats: each predicted from those before it."""
    return _Loss()


NAMES = ("logit_difference", "probability", "log_probability", "kl_divergence", "loss")
"""what metrics of pairs are called wherever a name is given"""


def named(name: str, answers: Sequence[Any], wrong: Sequence[Any], clean: Any) -> Metric:
    """The metric of this name, of prompts that have these answers. Raises SelectionError.

    wrong: the wrong answers, None where there is none. clean: the prompts that a divergence is from.
    """
    if name not in NAMES:
        near = sentence(did_you_mean(name, NAMES, n=1))
        raise SelectionError(f"metric {name!r}: expected one of {', '.join(NAMES)}, or a function.{near}")
    if name == "kl_divergence":
        return kl_divergence(clean)
    if name == "loss":
        return loss()
    right, other = ([_single(each) for each in side] for side in (answers, wrong))
    _refuse_lacking(name, "answer", "target", right)
    if name == "logit_difference":
        _refuse_lacking(name, "wrong", "against", other)
        return logit_difference(right, other)
    return (probability if name == "probability" else log_probability)(right)


def _refuse_lacking(name: str, column: str, argument: str, given: Sequence[Any]) -> None:
    if lacking := [number for number, each in enumerate(given) if each is None]:
        raise SelectionError(
            f"{name} needs {argument}=, or the column {column!r} of pairs: {counted(len(lacking), 'pair')} of "
            f"{len(given)} {'has' if len(lacking) == 1 else 'have'} none, the first is pair {lacking[0]}."
        )


def _single(answer: Any) -> Any:
    """An id in place of a tuple of one."""
    return answer[0] if isinstance(answer, tuple) and len(answer) == 1 else answer


@dataclass(frozen=True)
class _Difference(Metric):
    right: Any
    wrong: Any

    def bind(self, hm: Hooked, prompts: Sequence[Prompt]) -> Bound:
        sides = {"right": self.right, "wrong": self.wrong}
        (right, first), (wrong, second) = (_tokens(hm, given, name, len(prompts)) for name, given in sides.items())

        def difference(logits: torch.Tensor, at: Reading) -> torch.Tensor:
            return logits[-1, right[at.sample]] - logits[-1, wrong[at.sample]]

        return Bound(f"logit of {first} minus logit of {second}", tuple(prompts), difference, _lengths(prompts), 1)


@dataclass(frozen=True)
class _Answer(Metric):
    answer: Any
    exponential: bool

    def bind(self, hm: Hooked, prompts: Sequence[Prompt]) -> Bound:
        given = _each(self.answer, "answer", len(prompts))
        answers = [_ids(hm, each) for each in given]
        read = tuple(replace(p, token_ids=(*p.token_ids, *ids[:-1])) for p, ids in zip(prompts, answers, strict=True))

        def log_probability(logits: torch.Tensor, at: Reading) -> torch.Tensor:
            ids = answers[at.sample]
            rows = logits[-len(ids) :].log_softmax(-1)
            found = rows[range(len(ids)), ids].sum()
            return found.exp() if self.exponential else found

        what = repr(given[0]) if len(set(answers)) == 1 else "the answer"
        name = f"{'probability' if self.exponential else 'log-probability'} of {what}"
        return Bound(name, read, log_probability, _lengths(prompts), max(map(len, answers)))


@dataclass(frozen=True)
class _Divergence(Metric):
    clean: Any

    def bind(self, hm: Hooked, prompts: Sequence[Prompt]) -> Bound:
        source = tuple(prompts) if self.clean is None else hm.encode(self.clean)
        if len(source) != len(prompts):
            raise SelectionError(f"clean: expected {len(prompts)} prompts, one for each, got {len(source)}.")
        run = hm.capture(list(source), ["logits"], max_new_tokens=0, positions="last_prompt", engine="hooks")

        def divergence(logits: torch.Tensor, at: Reading) -> torch.Tensor:
            clean = run.read(at.sample, "logits")[-1].to(logits.device, logits.dtype).log_softmax(-1)
            return (clean.exp() * (clean - logits[-1].log_softmax(-1))).sum()

        return Bound("KL divergence from the clean run", tuple(prompts), divergence, _lengths(prompts), 1)


@dataclass(frozen=True)
class _Loss(Metric):
    def bind(self, hm: Hooked, prompts: Sequence[Prompt]) -> Bound:
        _refuse_short(prompts)
        return Bound("loss", tuple(prompts), lambda logits, at: _losses(logits, at).mean(), _lengths(prompts))


def measure(hm: Hooked, prompts: Any, metric: Any, interventions: Any = (), **options: Any) -> torch.Tensor:
    """See `HookedModel.measure`. `metric` may be bound already; `prompts` are not read then."""
    bound = metric if isinstance(metric, Bound) else bind(hm, metric, encoded(hm, prompts, options))
    return measure_and_capture(hm, bound, (), interventions=interventions, **options)[0]


def measure_and_capture(
    hm: Hooked,
    bound: Bound,
    points: Any,
    layers: Any = "all",
    calls: Any = "all",
    interventions: Any = (),
    **options: Any,
) -> tuple[torch.Tensor, Capture]:
    """The metric of each prompt, and points of the same pass."""
    values: dict[int, torch.Tensor] = {}

    def take(logits: torch.Tensor, at: At) -> None:
        values[at.sample] = bound(logits, at.sample).cpu()

    how = {**batches_of(options), "points": points, "layers": layers, "calls": calls}
    run = read_logits(hm, bound.prompts, bound.positions, take, interventions, how)
    return torch.stack([values[number] for number in range(len(bound.prompts))]), run


def losses(hm: Hooked, texts: Any, interventions: Any = (), **options: Any) -> list[torch.Tensor]:
    """See `HookedModel.loss`."""
    prompts = encoded(hm, texts, options)
    _refuse_short(prompts)
    found: dict[int, torch.Tensor] = {}

    def take(logits: torch.Tensor, at: At) -> None:
        tokens = prompts[at.sample].token_ids
        wide = logits if logits.dtype == torch.float64 else logits.float()
        found[at.sample] = _losses(wide, Reading(at.sample, at.positions, tokens, len(tokens))).cpu()

    read_logits(hm, prompts, "all", take, interventions, batches_of(options))
    return [found[number] for number in range(len(prompts))]


def encoded(hm: Hooked, prompts: Any, options: Mapping[str, Any]) -> tuple[Prompt, ...]:
    """The prompts as a harvest reads them; `options`: some of `MeasureOptions`."""
    chosen = with_defaults(MeasureOptions, options)
    return hm.encode(records(prompts, chosen["prompt_column"]), **of_kind(TemplateOptions, chosen))


def batches_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """How many prompts run together, of `MeasureOptions`. Raises TypeError for another name."""
    return of_kind(BatchOptions, with_defaults(MeasureOptions, options))


def read_logits(
    hm: Hooked, prompts: Sequence[Prompt], positions: str, take: Any, interventions: Any, how: Mapping[str, Any]
) -> Capture:
    """Show `take` the logits of each prompt at these positions, in one forward pass over it.

    how: further arguments of `capture`, such as `batch_size`, and what it stores: nothing unless given.
    """
    given = watch(take, "logits", positions=positions)
    edits: Any
    if isinstance(interventions, EditPlan):
        [selector] = hm.map.selectors(["logits"])
        tokens = EditedTokens(row_selection(positions=positions))
        edits = interventions.then(EditPlan((), [], (Watch(Called(given, selector), tokens),)))
    else:
        edits = (*read_interventions(interventions), given)
    try:
        chosen = {"points": (), **how}
        return hm.capture(list(prompts), max_new_tokens=0, interventions=edits, engine="hooks", **chosen)
    except InterventionError as error:
        if isinstance(error.__cause__, SelectionError):
            raise error.__cause__ from error.__cause__.__cause__
        raise


def _losses(logits: torch.Tensor, at: Reading) -> torch.Tensor:
    """Of each token but the first, [pos - 1]."""
    following = torch.tensor(at.tokens[1:], device=logits.device)
    return torch.nn.functional.cross_entropy(logits[:-1], following, reduction="none")


def _refuse_short(prompts: Sequence[Prompt]) -> None:
    if short := [number for number, prompt in enumerate(prompts) if len(prompt.token_ids) < 2]:
        raise SelectionError(f"texts {short[:5]} are one token: a loss is of the tokens after the first.")


def _lengths(prompts: Sequence[Prompt]) -> tuple[int, ...]:
    return tuple(len(prompt.token_ids) for prompt in prompts)


def _each(given: Any, name: str, count: int) -> list[Any]:
    """What is given for each prompt. Raises SelectionError where a list has another length."""
    if not isinstance(given, list):
        return [given] * count
    if len(given) != count:
        raise SelectionError(f"{name}: expected one, or a list of {count}, one for each prompt, got {len(given)}.")
    return given


def _tokens(hm: Hooked, given: Any, name: str, count: int) -> tuple[list[int], str]:
    """The id of one token for each prompt, and what to call it."""
    each = _each(given, name, count)
    return [token_id(hm, token, name) for token in each], repr(each[0]) if len(set(each)) == 1 else f"the {name} token"


def _ids(hm: Hooked, answer: Any) -> tuple[int, ...]:
    """The token ids of an answer. Raises SelectionError where it has none, or one that the model does not have."""
    if isinstance(answer, str) and hm.tokenizer is not None:
        answer = tuple(hm.tokenizer(answer, add_special_tokens=False)["input_ids"])
    ids = (answer,) if isinstance(answer, int) else answer
    if not isinstance(ids, tuple) or not ids or not all(isinstance(i, int) for i in ids):
        raise SelectionError(
            f"answer {answer!r}: expected a text (with a tokenizer), a token id, a tuple of ids, or a list of such, "
            "one for each prompt."
        )
    if wrong := [token for token in ids if not 0 <= token < hm.vocabulary]:
        raise SelectionError(f"answer: token ids {wrong[:5]} are not in the model's vocabulary of {hm.vocabulary}.")
    return ids
