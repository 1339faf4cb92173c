"""How good a dictionary is, by the definitions of SAEBench's core evaluation (Karvonen et al. 2025)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from hookmap.activations import Activation, Key, Sample
from hookmap.analysis.dictionaries.dictionary import Dictionary
from hookmap.analysis.gathering import Gathering
from hookmap.analysis.metrics import losses
from hookmap.capture.interventions.documents import Ablate
from hookmap.errors import SelectionError
from hookmap.loading.generation import check_count
from hookmap.stores.ledger import tensor_name
from hookmap.stores.number_set import NumberSet

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

log = logging.getLogger("hookmap")


@dataclass(frozen=True)
class Evaluation:
    """SAEBench's core metrics, under its names. Rows are of all tokens, losses of all tokens but the first.

    With `skip`, as SAEBench does with special tokens on request (exclude_special_tokens_from_reconstruction): the first
    tokens of each text keep their rows, and neither these nor the losses of what they predict are counted.
    """

    ce_loss_score: float
    """loss recovered: (with ablation − with the dictionary) / (with ablation − without); 1 is all of it"""
    ce_loss_without_sae: float
    """mean cross-entropy of the model, in nats"""
    ce_loss_with_sae: float
    """with the reconstruction spliced in"""
    ce_loss_with_ablation: float
    """with the point set to 0"""
    explained_variance: float
    """1 − the sum of squares of the error / the sum of squares around the mean"""
    mse: float
    """mean of the squared errors, of each number"""
    cossim: float
    """mean cosine of a row to its reconstruction"""
    l2_ratio: float
    """mean of the reconstruction's norm / the row's norm"""
    l0: float
    """mean number of active features of a token"""
    l1: float
    """mean sum of the features' sizes"""
    frac_alive: float
    """share of the features that are active at some token; the others are dead in these texts"""
    tokens: int
    skip: int = 0
    """tokens at the start of each text that keep their rows"""

    @property
    def dead(self) -> float:
        """Share of the features that are active nowhere in these texts."""
        return 1 - self.frac_alive

    def as_json(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}


def evaluate(hm: Hooked, texts: Any, dictionary: Dictionary, *, skip: int | None = None, **options: Any) -> Evaluation:
    """Evaluate a dictionary on texts, by SAEBench's core metrics. options: as of `HookedModel.loss`.

    skip: tokens at the start of each text that keep their rows, and are not counted; unless given, those that the
    dictionary's files say it was not trained on (`about.skip`). 0 splices every token.
    Warns where the dictionary was made for another model, or for texts that begin otherwise. Raises SelectionError
    where it does not fit the model.
    """
    skip = dictionary.about.skip if skip is None else skip
    check_count("skip", skip, least=0)
    prepared = _prepared(hm, texts, dictionary, options)
    if all(len(prompt.token_ids) < skip + 2 for prompt in prepared.run.prompts):
        but = f", of which the first {skip} are left out" if skip else ""
        raise SelectionError(f"no evaluation: expected a text of {skip + 2} tokens or more{but}.")
    say_what_differs(hm, dictionary, prepared.run.prompts)
    sink = _Measuring(dictionary, tuple(s.key for s in prepared.run.selectors), skip)
    prepared.into(sink)
    found = sink.measured()
    point, layer = dictionary.writes[:2]
    zero = Ablate(point=point, layers="all" if layer is None else (layer,), to="zero")
    where = {"positions": f"{skip}:"} if skip else {}
    clean, spliced, ablated = (
        float(torch.cat([each[skip:] for each in losses(hm, texts, edits, **options)]).double().mean())
        for edits in ((), dictionary.splice(**where), [zero])
    )
    lost = ablated - clean
    score = (ablated - spliced) / lost if lost else float("nan")
    return Evaluation(score, clean, spliced, ablated, **found, skip=skip)


def say_what_differs(hm: Hooked, dictionary: Dictionary, prompts: Any) -> None:
    """Warn of a dictionary that was trained on another model, or on texts with or without a first special token."""
    about, own = dictionary.about, getattr(hm, "name", None) or ""
    if about.model and own and _short(about.model) != _short(own):
        log.warning("the dictionary was trained on %s, and this model is %s.", about.model, own)
    bos = getattr(hm.tokenizer, "bos_token_id", None)
    if about.prepend_bos is None or bos is None:
        return
    begin = sum(prompt.token_ids[0] == bos for prompt in prompts)
    if about.prepend_bos and begin < len(prompts):
        log.warning(
            "the dictionary's texts began with the token %d (prepend_bos), and %d of %d texts here do not.",
            bos,
            len(prompts) - begin,
            len(prompts),
        )
    if not about.prepend_bos and begin:
        log.warning("the dictionary's texts did not begin with the token %d, and %d texts here do.", bos, begin)


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _prepared(hm: Hooked, texts: Any, dictionary: Dictionary, options: Mapping[str, Any]) -> Any:
    """A harvest of the points that it reads and writes."""
    points: dict[str, Any] = {}
    for point, layer in dict.fromkeys((dictionary.reads[:2], dictionary.writes[:2])):
        points.setdefault(point, [])
        if layer is not None:
            points[point].append(layer)
    named = {point: own or "all" for point, own in points.items()}
    return hm.prepare(texts, named, max_new_tokens=0, **options)


class _Measuring(Gathering):
    """Sums of what a dictionary makes of rows, in float64."""

    def __init__(self, dictionary: Dictionary, keys: tuple[Key, ...], skip: int) -> None:
        if {dictionary.reads, dictionary.writes} != {*keys}:
            raise SelectionError(
                f"the dictionary is of {tensor_name(dictionary.reads)}, and the model has there "
                f"{', '.join(map(tensor_name, keys))}."
            )
        super().__init__(keys, NumberSet(), None, lambda: None)
        self._given, self._dictionary, self._skip = dictionary, dictionary, skip
        self._batch: dict[Key, torch.Tensor] = {}
        self._sums: dict[str, float] = dict.fromkeys(("error", "cossim", "ratio", "l0", "l1"), 0.0)
        self._mean: torch.Tensor | None = None
        self._around = 0.0
        self._tokens = self._numbers = 0
        self._active = torch.zeros(dictionary.features, dtype=torch.bool)

    def take(self, key: Key, rows: torch.Tensor, pieces: list[Activation]) -> None:
        places = torch.cat([torch.arange(piece.start, piece.start + len(piece.tensor)) for piece in pieces])
        self._batch[key] = rows.flatten(1)[(places >= self._skip).to(rows.device)]

    def forget(self) -> None:
        self._batch = {}

    @torch.no_grad()
    def commit(self, samples: Mapping[int, Sample]) -> None:
        read, written = (self._batch[key] for key in (self._given.reads, self._given.writes))
        if not len(read):
            self.forget()
            return
        self._dictionary = self._dictionary.to(read.device)
        features = self._dictionary.encode(read)
        made, rows = self._dictionary.decode(features, read).double().cpu(), written.double().cpu()
        if made.shape != rows.shape:
            raise SelectionError(
                f"the dictionary writes rows of {made.shape[1]} numbers, the model has {rows.shape[1]}."
            )
        error, norms, own = made - rows, rows.norm(dim=1), made.norm(dim=1)
        for name, value in (
            ("error", (error**2).sum()),
            ("cossim", ((made * rows).sum(1) / (norms * own).clamp(min=1e-300)).sum()),
            ("ratio", (own / norms.clamp(min=1e-300)).sum()),
            ("l0", (features != 0).double().sum()),
            ("l1", features.double().abs().sum()),
        ):
            self._sums[name] += float(value)
        self._active |= (features != 0).any(0).cpu()
        self._spread(rows)
        self._numbers += rows.numel()
        self.forget()

    def _spread(self, rows: torch.Tensor) -> None:
        """Add to the sum of squares around the mean."""
        mean, count = rows.mean(0), len(rows)
        around = float(((rows - mean) ** 2).sum())
        if self._mean is None:
            self._mean, self._around, self._tokens = mean, around, count
            return
        total, delta = self._tokens + count, mean - self._mean
        self._around += around + float((delta**2).sum()) * self._tokens * count / total
        self._mean, self._tokens = self._mean + delta * (count / total), total

    def measured(self) -> dict[str, Any]:
        count = self._tokens
        return {
            "explained_variance": 1 - self._sums["error"] / self._around if self._around else float("nan"),
            "mse": self._sums["error"] / self._numbers,
            "cossim": self._sums["cossim"] / count,
            "l2_ratio": self._sums["ratio"] / count,
            "l0": self._sums["l0"] / count,
            "l1": self._sums["l1"] / count,
            "frac_alive": float(self._active.double().mean()),
            "tokens": count,
        }
