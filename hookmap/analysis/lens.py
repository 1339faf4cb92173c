"""The logit lens: what the model would predict if the stream of a layer went through its final norm and unembedding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Unpack, get_args

import torch

from hookmap.activations import Key, Sample, call_of, key_of
from hookmap.analysis.grid import Grid
from hookmap.analysis.jacobian_lens import JacobianLens
from hookmap.analysis.tokens import row_positions, token_id, token_text, token_texts
from hookmap.analysis.unembedding import Unembeds, unembedding_of
from hookmap.capture.engines.model_lock import lock_of
from hookmap.capture.finiteness import check_rows, not_finite
from hookmap.capture.options import TemplateOptions
from hookmap.capture.result import Capture
from hookmap.errors import SelectionError
from hookmap.loading.prompts import Prompt
from hookmap.maps.calls import last_run, listed
from hookmap.maps.points import PointName, parse_point
from hookmap.maps.selectors import layers_of
from hookmap.stores.interface import Store
from hookmap.wording import counted

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

Metric = Literal["probability", "rank", "worst_rank", "top_probability", "entropy", "kl"]
METRICS: tuple[str, ...] = get_args(Metric)
STREAM_POINTS = ("resid_pre", "resid_mid_sum", "resid_mid", "resid_post", "mixer_out", "attn_out", "mlp_out")
"""points whose tensor is the stream or is added to it"""

CHUNK = 64
"""positions whose distributions are computed at once: each is as large as the vocabulary"""
_MEANING = {
    "probability": "probability of {}",
    "rank": "rank of {}, 1 is the likeliest",
    "worst_rank": "rank of {} behind all that tie with it",
    "top_probability": "probability of the likeliest token",
    "entropy": "entropy (nats)",
    "kl": "KL divergence of the model's output from the lens (nats)",
}


@dataclass(frozen=True)
class Lens:
    """The lens's predictions for one sample. Tensors are on the CPU, [layers, positions, ..] unless stated."""

    point: str
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    """the token index of each column"""
    tokens: tuple[str, ...]
    """the text of each column's token"""
    top_ids: torch.Tensor
    """[layers, positions, top]: the likeliest token ids, in descending order of probability"""
    top_probabilities: torch.Tensor
    """[layers, positions, top]"""
    top_tokens: tuple[tuple[tuple[str, ...], ...], ...]
    """their texts, nested in the same way"""
    target_ids: torch.Tensor
    """[positions]: the token that `probability` and `rank` are of; the model's prediction unless one was named"""
    target_tokens: tuple[str, ...]
    predicted: bool
    """whether the target is the model's own prediction"""
    probability: torch.Tensor
    """of the target"""
    rank: torch.Tensor
    """of the target, int64: 1 plus the number of tokens with a larger logit; 1 is the likeliest"""
    worst_rank: torch.Tensor
    """of the target, int64: the number of tokens with a logit at least as large; above `rank` at a tie"""
    entropy: torch.Tensor
    """of the lens's distribution, in nats"""
    kl: torch.Tensor
    """KL(model's output ‖ lens), in nats; nan where the last layer's resid_post was not captured"""
    calls: tuple[int | None, ...] = ()
    """which run of its layer each row is of, None where it runs once; empty where all do"""

    def __repr__(self) -> str:
        sizes = f"{counted(len(self.layers), 'row')} × {counted(len(self.positions), 'position')}"
        return f"<Lens of {self.point}: {sizes}>"

    def grid(self, metric: Metric = "probability") -> Grid:
        """One number for each layer and position. Raises SelectionError for an unknown metric."""
        if metric not in METRICS:
            raise SelectionError(f"lens metric {metric!r}: expected one of {', '.join(METRICS)}.")
        values = self.top_probabilities[..., 0] if metric == "top_probability" else getattr(self, metric)
        aim = "the model's prediction" if self.predicted else f"{self.target_tokens[0]!r}"
        meaning = _MEANING[metric].format(aim)
        return Grid(values.float(), self.layers, self.positions, self.tokens, meaning, self.point, self.calls)

    @property
    def words(self) -> tuple[tuple[str, ...], ...]:
        """The likeliest token at each layer and position, for the cells of a heat map."""
        return tuple(tuple(top[0] for top in row) for row in self.top_tokens)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data; `null` for nan."""
        lists = {name: getattr(self, name).tolist() for name in ("top_ids", "top_probabilities", "target_ids")}
        lists |= {name: getattr(self, name).tolist() for name in ("probability", "rank", "worst_rank", "entropy")}
        kl = [[None if value != value else value for value in row] for row in self.kl.tolist()]
        names = ("point", "layers", "positions", "tokens", "top_tokens", "target_tokens", "predicted")
        calls = {"calls": self.calls} if self.calls else {}
        return {**{name: getattr(self, name) for name in names}, **calls, **lists, "kl": kl}


def lens(
    hm: Hooked,
    source: Any,
    point: str = "resid_post",
    layers: Any = "all",
    *,
    calls: Any = "all",
    top: int = 5,
    positions: Any = "all",
    target: int | str | None = None,
    sample: int = 0,
    jacobian: JacobianLens | None = None,
    unembedding: Unembeds | None = None,
    **template: Unpack[TemplateOptions],
) -> Lens:
    """See `HookedModel.lens`. `unembedding`: of a model whose weights are elsewhere; else it is read from the model."""
    name = _stream_point(point)
    if jacobian is not None:
        layers = _of_jacobian(hm, jacobian, name, layers)
    unembeds: Unembeds = unembedding_of(hm) if unembedding is None else unembedding
    run, prompt = source, None
    if not isinstance(source, (Capture, Store)):
        last = f"blocks.{last_run(hm.map)[0]}.hook_resid_post"
        encoded = hm.encode(source, **template)
        if len(encoded) != 1:
            raise SelectionError(
                f"a lens is of one prompt, got {len(encoded)}: capture them, run = hm.capture(prompts, 'resid_post', "
                "max_new_tokens=0), and give the run: hm.lens(run, sample=3)."
            )
        prompt = encoded[0] if unembedding is None else None
        runs = calls if isinstance(calls, str) else [*listed(calls), -1]  # the last run says what is predicted
        run, sample = hm.capture(encoded[0], [name, last], layers, 0, calls=runs, positions=positions), 0
    found = next((each for each in run.samples if each.sample == sample), None)
    chosen = _chosen(hm, run, name, layers, calls)
    if found is None:
        raise SelectionError(f"the capture has no sample {sample}: it has {len(run.samples)}.")
    with lock_of(hm.model).shared():
        aim = None if target is None else token_id(hm, target)
        return _Reading(hm, unembeds, run, found, name, chosen, prompt, jacobian).lens(top, aim)


def _of_jacobian(hm: Hooked, jacobian: JacobianLens, point: str, layers: Any) -> Any:
    """The layers to read with a Jacobian lens: unless named, those that it has and the last. Raises SelectionError."""
    last = hm.map.num_layers - 1
    if point != "resid_post" or jacobian.d_model != hm.map.d_model or last_run(hm.map) != (last, None):
        raise SelectionError(
            f"the Jacobian lens is of resid_post of a model of width {jacobian.d_model} whose layers run once; this is "
            f"{point}, width {hm.map.d_model}."
        )
    if beyond := [layer for layer in jacobian.layers if layer >= last]:
        raise SelectionError(f"the Jacobian lens has layers {beyond}, and this model's last is {last}.")
    if isinstance(layers, str):
        return [*jacobian.layers, last]
    chosen = layers_of(hm.map, layers)
    if lacking := [layer for layer in chosen if layer != last and layer not in jacobian.matrices]:
        raise SelectionError(f"the Jacobian lens has no layers {lacking}: it has {list(jacobian.layers)}.")
    return list(chosen)


def _chosen(hm: Hooked, run: Capture | Store, point: str, layers: Any, calls: Any) -> tuple[Key, ...]:
    """The tensors of a point to read. Raises SelectionError where the capture does not hold one."""
    held = [key for key in run.keys if key[0] == point and key[1] is not None]
    whole = isinstance(layers, str) and isinstance(calls, str) and calls == "all"
    wanted = held if whole else [selector.key for selector in hm.map.selectors(point, layers, calls)]
    chosen = [key for key in wanted if key in held] if isinstance(layers, str) else wanted
    if (missing := [key for key in chosen if key not in held]) or not chosen:
        lacking = _places(missing or wanted) if held else "any"
        raise SelectionError(f"the capture holds no {point} of layers {lacking}: it holds {_places(held)}.")
    return tuple(sorted(chosen, key=list(run.keys).index))


def _places(keys: Iterable[Key]) -> list[Any]:
    """The layers, with the call of those that run several times."""
    return [key[1:] if len(key) == 3 else key[1] for key in keys]


def _stream_point(point: str) -> str:
    parsed = parse_point(point)
    if isinstance(parsed, str):
        raise SelectionError(parsed)
    if PointName.of(parsed.point).base not in STREAM_POINTS:
        raise SelectionError(
            f"no lens on {parsed.point}: it is not in the space of the residual stream. Use {', '.join(STREAM_POINTS)}."
        )
    return parsed.point


@dataclass(frozen=True)
class _Reading:
    """A lens on the rows of one sample."""

    hm: Hooked
    unembedding: Unembeds
    run: Capture | Store
    sample: Sample
    point: str
    keys: tuple[Key, ...]
    """what is read, a row of the lens each"""
    prompt: Prompt | None
    """of the sample, where it was captured for this lens just now, and can run again"""
    jacobian: JacobianLens | None = None

    def lens(self, top: int, target: int | None) -> Lens:
        """`target`: a token id, or None for the model's own prediction at each position."""
        positions, targets = row_positions(self.sample), []
        figures: list[dict[str, torch.Tensor]] = []
        for chunk in _chunks(positions):
            final = self._final_logits(chunk)
            aim = self._aim(chunk, target, final)
            targets.append(aim.cpu())
            for key in self.keys:
                logits = self._logits(key, chunk)
                figures.append(figures_of(logits, final, aim, min(top, logits.shape[-1])))
        ids = torch.cat(targets)
        stacked = {name: _stack([each[name] for each in figures], len(self.keys)) for name in figures[0]}
        return Lens(
            self.point,
            tuple(key[1] for key in self.keys if key[1] is not None),
            positions,
            token_texts(self.hm, self.sample.token_ids, positions, self.sample.image_positions or ()),
            top_tokens=tuple(tuple(map(self._texts, row)) for row in stacked["top_ids"].tolist()),
            target_ids=ids,
            target_tokens=self._texts(ids.tolist()),
            predicted=target is None,
            calls=tuple(map(call_of, self.keys)) if any(len(key) == 3 for key in self.keys) else (),
            **stacked,
        )

    def _final_logits(self, positions: tuple[int, ...]) -> torch.Tensor | None:
        """The model's own logits; None where the capture does not hold the last layer's stream."""
        last = key_of("resid_post", *last_run(self.hm.map))
        return self._logits(last, positions) if last in self.run.keys else None

    def _aim(self, positions: tuple[int, ...], target: int | None, final: torch.Tensor | None) -> torch.Tensor:
        """The target of each position, [positions]."""
        if target is not None:
            return torch.full((len(positions),), target)
        if final is not None:
            return final.argmax(-1)
        raise SelectionError(
            "the capture has no resid_post of the last layer, which says what the model predicts: "
            "name a target, or capture it too."
        )

    def _logits(self, key: Key, positions: tuple[int, ...]) -> torch.Tensor:
        """float32 [positions, d_vocab]. Raises CaptureError or SelectionError where the rows are not finite."""
        rows = self.run.read(self.sample.sample, key[0], key[1], call_of(key), positions)
        if not bool(rows.isfinite().all()):
            self._refuse_not_finite(key)
        if self.jacobian is not None and key[1] is not None and key[1] in self.jacobian.matrices:
            rows = self.jacobian.transport(rows, key[1])
        return self.unembedding(rows[None].to(self.unembedding.dtype))[0].float()

    def _refuse_not_finite(self, key: Key) -> None:
        """Raises the error that names the first tensor of the lens that is not finite."""
        if self.prompt is not None:
            raise not_finite(self.hm, self.prompt, "lens")
        positions = row_positions(self.sample)
        for each in dict.fromkeys([*self.keys, key]):
            rows = self.run.read(self.sample.sample, each[0], each[1], call_of(each), positions)
            check_rows(rows, self.run, self.sample, each, positions, "lens")

    def _texts(self, ids: Iterable[int]) -> tuple[str, ...]:
        return tuple(token_text(self.hm, token) for token in ids)


def _chunks(positions: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Positions that go through the unembedding together; few, as its output is as wide as the vocabulary."""
    for start in range(0, len(positions), CHUNK):
        yield positions[start : start + CHUNK]


def _stack(parts: Sequence[torch.Tensor], layers: int) -> torch.Tensor:
    """Concatenate chunks, which come layer after layer within a chunk, to [layers, positions, ..]."""
    return torch.stack([torch.cat(list(parts[layer::layers])) for layer in range(layers)])


def figures_of(
    logits: torch.Tensor, final: torch.Tensor | None, aim: torch.Tensor, top: int
) -> dict[str, torch.Tensor]:
    """What a lens tells of logits [pos, d_vocab], float32. `final`: the model's own logits."""
    found, aims = logits.log_softmax(-1), aim.to(logits.device)[:, None]
    kl = torch.full((len(found),), float("nan"))
    if final is not None:
        output = final.log_softmax(-1)
        kl = (output.exp() * (output - found)).sum(-1)
    best, at = found.topk(top), logits.gather(-1, aims)
    figures = {
        "top_ids": best.indices,
        "top_probabilities": best.values.exp(),
        "probability": found.gather(-1, aims)[:, 0].exp(),
        # Compared as logits: the log of the softmax would round small differences away.
        "rank": (logits > at).sum(-1) + 1,
        "worst_rank": (logits >= at).sum(-1),
        "entropy": -(found.exp() * found).nan_to_num(0).sum(-1),
        "kl": kl,
    }
    return {name: value.cpu() for name, value in figures.items()}
