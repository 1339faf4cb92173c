"""Activation patching: which layer and position carry the difference between two prompts.

The clean prompt's tensor at one token is written into the run of the corrupted prompt, and a metric of the next token
says how far the clean answer returns. This is done for each layer and position, many of them in one batch.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch

from hookmap.analysis.grid import Grid
from hookmap.analysis.tokens import token_id, token_text, token_texts
from hookmap.capture.finiteness import not_finite
from hookmap.capture.interventions.edits import Edit, why_not_heads
from hookmap.capture.interventions.operations import Patched
from hookmap.capture.interventions.plan import EditPlan
from hookmap.capture.interventions.sources import key_in_source
from hookmap.capture.options import TemplateOptions
from hookmap.capture.rows import row_selection
from hookmap.errors import InterventionError, SelectionError
from hookmap.loading.prompts import Prompt
from hookmap.maps.describe import layers_text
from hookmap.maps.selectors import Selector

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

Metric = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""logits of the next token [n, d_vocab] -> its values, float32 [n], and their sensitivity [n]: how much a value changes
at most for a given relative change of the logits, so that sensitivity * rounding is the metric's own rounding"""


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep."""

    grid: Grid
    """the metric of the corrupted prompt with one tensor patched, [layers, positions]"""
    clean: float
    """the metric of the clean prompt"""
    corrupted: float
    """the metric of the corrupted prompt without a patch"""
    noise: float = 0.0
    """how far the metric may differ between equal runs: by the rounding of the logits, and by the batch size"""

    def __repr__(self) -> str:
        found = f"clean {self.clean:.4g}, corrupted {self.corrupted:.4g}, noise {self.noise:.1g}"
        return f"<Sweep: {repr(self.grid)[1:-1]}; {found}>"

    @property
    def above_noise(self) -> torch.Tensor:
        """[layers, positions], bool: whether the patch moves the metric from `corrupted` by more than the noise.

        Where it is False, the effect cannot be told from 0. It is False too where the metric is nan.
        """
        return (self.grid.values - self.corrupted).abs() > self.noise

    @property
    def effect(self) -> Grid:
        """How far the patch moves the metric from corrupted (0) to clean (1)."""
        values = (self.grid.values - self.corrupted) / (self.clean - self.corrupted)
        return replace(self.grid, values=values, metric=f"effect on the {self.grid.metric}: 0 corrupted, 1 clean")

    def save(self, path: str | Path) -> Path:
        """Writes the effect as PATH.safetensors and PATH.csv (see `Grid.save`), and the metrics as PATH.json."""
        written = self.effect.save(path)
        found = {"metric": self.grid.metric, "clean": self.clean, "corrupted": self.corrupted, "noise": self.noise}
        found["above_noise"] = self.above_noise.tolist()
        written.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        return written


def sweep(
    hm: "Hooked",
    clean: Any,
    corrupted: Any,
    target: str | int,
    against: str | int | None = None,
    *,
    point: str = "resid_pre",
    layers: Any = "all",
    calls: Any = "all",
    source_calls: Any = None,
    positions: Any = "all",
    heads: Sequence[int] | None = None,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
    **template: Unpack[TemplateOptions],
) -> Sweep:
    """Patch `point` from `clean` into `corrupted`, each layer and position in turn.

    A layer that runs several times in one forward pass is patched in each of its runs in turn, or in those of `calls`,
    each from the same run of the clean prompt, or from those of `source_calls`, in order; one of these serves all.

    clean, corrupted: one prompt each, with the same number of tokens. target: the next token of the clean prompt, as a
    token id or a text of one token; against: that of the corrupted prompt. With both, the metric is the difference of
    their logits, target - against; with a target alone, its probability. positions: as for a capture; the columns of
    the grid, in the order given. heads: of a point with heads, such as z, patch only these, together. batch_size:
    patches that run together. progress: called with the number of patches done and of all patches.

    Raises SelectionError, TokenizerError, CaptureError where a prompt's stream is not finite, and InterventionError
    where the prompts do not pair or the metric of both is the same within its noise.
    """
    prompts = [_one(hm.encode(given, **template)) for given in (clean, corrupted)]
    _check_pair(prompts, hm.tokenizer)
    metric, name = _metric(hm, target, against)
    selectors = hm.selectors([point], layers, calls)
    _check_written(hm, selectors)
    chosen = None if heads is None else _chosen_heads(hm, selectors, heads)
    columns = _columns(hm, prompts[1], positions)
    sources = [key_in_source(hm.map, selector, calls, source_calls) for selector in selectors]
    rows = hm.capture(prompts[0], [point], layers, max_new_tokens=0, engine="hooks")
    base, noise = _base(hm, prompts, metric, min(batch_size, len(columns)), name)
    values = []
    for number, (selector, source) in enumerate(zip(selectors, sources, strict=True)):
        plan = _patches(selector, rows.read(0, *source), columns, chosen)
        values.append(metric(_logits(hm, [prompts[1]] * len(columns), plan, batch_size))[0])
        if progress is not None:
            progress((number + 1) * len(columns), len(selectors) * len(columns))
    tokens = token_texts(hm, prompts[1].token_ids, columns, prompts[1].image_positions)
    numbers = tuple(-1 if s.layer is None else s.layer for s in selectors)
    runs = tuple(s.call for s in selectors) if any(s.call is not None for s in selectors) else ()
    grid = Grid(torch.stack(values), numbers, tuple(columns), tokens, name, selectors[0].point, runs)
    return Sweep(grid, *base, noise)


def _patches(
    selector: Selector, clean: torch.Tensor, positions: Sequence[int], heads: tuple[int, ...] | None
) -> EditPlan:
    """Sample n of a batch gets the clean row at the n-th of these positions. `clean`: [tokens, ...]."""
    row_of = {sample: {position: position} for sample, position in enumerate(positions)}
    patched = Patched(clean if heads is None else clean[:, list(heads)], row_of.__getitem__)
    return EditPlan((Edit(selector, patched, heads=heads, only=patched),), [])


def _chosen_heads(hm: "Hooked", selectors: Sequence[Selector], heads: Sequence[int]) -> tuple[int, ...]:
    """Raises InterventionError where a layer does not have these heads."""
    chosen = tuple(heads)
    for selector in selectors:
        if wrong := why_not_heads(chosen, selector.point, hm.proofs.of(selector).row):
            raise InterventionError(wrong)
    return chosen


def _check_written(hm: "Hooked", selectors: Sequence[Selector]) -> None:
    """Raises InterventionError where the point must not be written in some layers, with each reason once."""
    refused: dict[str, list[int]] = {}
    for selector in selectors:
        if (reason := hm.proofs.of(selector).reason) is not None:
            refused.setdefault(reason, []).append(-1 if selector.layer is None else selector.layer)
    if refused:
        lines = [f"  - {layers_text(layers)}: {reason}" for reason, layers in refused.items()]
        raise InterventionError(f"{selectors[0].point} is not written:\n" + "\n".join(lines))


def _base(
    hm: "Hooked", prompts: Sequence[Prompt], metric: Metric, together: int, name: str
) -> tuple[tuple[float, float], float]:
    """The metrics of clean and corrupted, and their noise. `together`: prompts of a batch. Raises CaptureError and
    InterventionError.
    """
    alone = [_logits(hm, [prompt], None, 1) for prompt in prompts]
    for prompt, logits in zip(prompts, alone, strict=True):
        if not bool(metric(logits)[0].isfinite().all()):
            raise not_finite(hm, prompt, "sweep")
    eps = _eps(hm, alone[0])
    (clean, clean_moves), (corrupted, corrupted_moves) = ([float(part) for part in metric(each)] for each in alone)
    batched = metric(_logits(hm, [prompts[1]] * together, None, together))[0]
    noise = float((batched - corrupted).abs().max()) + eps / 2 * (clean_moves + corrupted_moves)
    if not abs(clean - corrupted) > noise:
        rounded = eps > torch.finfo(torch.float32).eps
        raise InterventionError(
            f"the {name} is {clean:.6g} for the clean and {corrupted:.6g} for the corrupted prompt, and its noise is "
            f"{noise:.2g}: a patch has nothing to bring back. Take prompts "
            "whose answers differ more"
            + (
                ', or open the model in float32, which rounds less: dtype="float32" (--dtype float32).'
                if rounded
                else "."
            )
        )
    return (clean, corrupted), noise


def _one(found: Sequence[Prompt]) -> Prompt:
    if len(found) != 1:
        raise InterventionError(f"a sweep is over one clean and one corrupted prompt, got {len(found)}.")
    return found[0]


def _check_pair(prompts: Sequence[Prompt], tokenizer: Any) -> None:
    lengths = [len(prompt.token_ids) for prompt in prompts]
    if lengths[0] != lengths[1]:
        raise InterventionError(
            f"the clean prompt has {lengths[0]} tokens and the corrupted one {lengths[1]}: a position must mean the "
            "same in both. Change the prompts so that they are equally long."
        )
    if prompts[0].token_ids == prompts[1].token_ids and prompts[0].inputs == prompts[1].inputs:
        raise InterventionError("the clean and the corrupted prompt are the same.")


def _columns(hm: "Hooked", prompt: Prompt, positions: Any) -> list[int]:
    """The positions of the prompt that are patched, in the order given. Raises SelectionError where there are none."""
    chosen, length = row_selection(positions=positions), len(prompt.token_ids)
    chosen.refuse_beyond([length], 0)
    chosen.refuse_no_image([prompt.image_positions])
    found = chosen.places(prompt.token_ids, length, hm.matching(chosen), prompt.image_positions)
    if not found:
        raise SelectionError(f"positions {positions!r}: none of the {length} tokens of the prompt is one of them.")
    return found[-1:] if chosen.positions == "last" else found


def _logits(hm: "Hooked", prompts: Sequence[Prompt], plan: EditPlan | None, batch_size: int) -> torch.Tensor:
    """The logits of the token after each prompt, [n, d_vocab], in the dtype that they were computed in."""
    run = hm.capture(
        list(prompts),
        ["logits"],
        max_new_tokens=0,
        positions="last_prompt",
        batch_size=batch_size,
        batch_tokens=batch_size * len(prompts[0].token_ids),
        engine="hooks",
        interventions=plan or (),
    )
    found = run["logits"]
    assert isinstance(found, torch.Tensor)  # every prompt has one row
    return found[:, 0]


def _eps(hm: "Hooked", logits: torch.Tensor) -> float:
    """The machine epsilon of the dtype that the logits were computed in: models may cast them to a wider one later."""
    head = hm.root.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(head, "weight", logits)
    dtypes = {logits.dtype, weight.dtype if weight.is_floating_point() else logits.dtype}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _metric(hm: "Hooked", target: str | int, against: str | int | None) -> tuple[Metric, str]:
    right, right_name = token_id(hm, target), _name(hm, target)
    if against is None:

        def probability(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = logits.float().softmax(-1)[:, right]
            most = torch.maximum(logits[:, right].float().abs(), logits.float().amax(-1).abs())
            return found, 2 * found * (1 - found) * most

        return probability, f"probability of {right_name}"
    other, other_name = token_id(hm, against, "against"), _name(hm, against)

    def difference(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        one, two = logits[:, right].float(), logits[:, other].float()
        return one - two, one.abs() + two.abs()

    return difference, f"logit of {right_name} minus logit of {other_name}"


def _name(hm: "Hooked", token: str | int) -> str:
    """A token for people: its text in quotes; its id where it has none."""
    if isinstance(token, int):
        token = ("" if hm.tokenizer is None else token_text(hm, token)) or token
    return repr(token)
