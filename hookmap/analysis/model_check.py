"""Is hookmap right on this model, as it was opened: its weights, dtype, attention, engines, batches and generation?

Each question is answered by a run: of the model's own `generate` with plain PyTorch hooks, of the same texts alone and
together, in float64, and with each engine. What must be equal is compared bit by bit; what rounding may change is told
as a number.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
import transformers

from hookmap.capture.hooked import Hooked
from hookmap.capture.result import Capture
from hookmap.capture.run import device_of
from hookmap.errors import CaptureError, HookmapError
from hookmap.loading.float64 import in_float64
from hookmap.loading.modules import eager
from hookmap.loading.wrappers import generate_of, runner_of
from hookmap.maps.selectors import Selector
from hookmap.verification.verify import verify
from hookmap.wording import counted

POINTS = ("resid_pre", "resid_mid", "resid_post", "mixer_out", "mlp_out")
"""what is captured, of these that the model has"""
ROUNDS = 5
SMALL = 1e-4
"""a relative distance of rows that needs no word"""


@dataclass(frozen=True)
class Finding:
    """The answer to one question."""

    about: str
    state: Literal["right", "note", "wrong"]
    """note: nothing is wrong, and a reader should know; wrong: do not use what it is about"""
    found: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelCheck:
    """All answers about one opened model. `passed` where none is wrong."""

    model: str
    setting: str
    """dtype, device, attention, versions"""
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return not any(finding.state == "wrong" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"passed": self.passed, **asdict(self)}

    def __repr__(self) -> str:
        marks = {"right": "ok", "note": "--", "wrong": "NO"}
        lines = [f"{marks[each.state]} {each.about}: {each.found}" for each in self.findings]
        return "\n".join((f"{self.model} ({self.setting})", *lines))


def setting_of(hm: Hooked) -> str:
    """How a model was opened, in a few words: what the answers hold for."""
    config = hm.root.config
    attention = getattr(config, "_attn_implementation", None) or "its own"
    dtype = str(next(hm.root.parameters()).dtype).removeprefix("torch.")
    return f"{dtype} on {device_of(hm.hooks)}, {attention} attention, transformers {transformers.__version__}"


def check_model(hm: Hooked, texts: Sequence[Any], max_new_tokens: int = 16, batch_size: int = 4) -> Iterator[Finding]:
    """Answer each question in turn; see the findings' `about`. An error in one becomes its finding.

    texts: prompts as for `capture`, at least two, of different lengths; that many are run together at most.
    """
    run = _Check(hm, texts[:batch_size], max_new_tokens)
    questions = (run.map, run.hooks, run.dtype, run.cache, run.attention, run.batch, run.nnsight, run.writes, run.cost)
    for ask in questions:
        try:
            yield ask()
        except HookmapError as error:
            yield Finding(str(ask.__name__), "note", f"not answered: {str(error).splitlines()[0]}")


class _Check:
    """The runs that several questions share."""

    def __init__(self, hm: Hooked, texts: Sequence[Any], new: int) -> None:
        self.hm, self.texts, self.new = hm, list(texts), new
        layers = sorted({0, hm.map.num_layers // 2, hm.map.num_layers - 1})
        chosen = [p for p in POINTS if all(hm.map.unavailable(p, layer) is None for layer in layers)]
        if not chosen:
            raise CaptureError(f"{hm.map.architecture} has none of {', '.join(POINTS)} on layers {layers}.")
        self.points, self.layers = chosen, layers
        self.rounding: float | None = None
        """the distance from float64, once it is known"""

    def capture(self, texts: Sequence[Any], new: int | None = None, **options: Any) -> Capture:
        options = {"batch_size": 1, **options}
        return self.hm.capture(
            list(texts), self.points, self.layers, self.new if new is None else new, do_sample=False, **options
        )

    @cached_property
    def alone(self) -> list[Capture]:
        """Each text by itself."""
        return [self.capture([text]) for text in self.texts]

    @cached_property
    def read(self) -> list[tuple[int, ...]]:
        """Of each text, all tokens that were fed: the last one that was generated is not."""
        return [run.tokens[0][: run.samples[0].rows] for run in self.alone]

    def map(self) -> Finding:
        """Is the map true of these weights?"""
        result = verify(self.hm.model, architecture_map=self.hm.map)
        failed = [check.name for check in result.checks if not check.passed]
        selectors = self.hm.selectors("all", "all")
        told = f"{counted(len({each.point for each in selectors}), 'point')}, {counted(len(selectors), 'tensor')}; "
        if failed:
            return Finding("map", "wrong", f"{told}these checks fail: {', '.join(failed[:5])}", {"failed": failed})
        return Finding("map", "right", f"{told}all {len(result.checks)} checks pass", {"checks": len(result.checks)})

    def hooks(self) -> Finding:
        """Are the rows and tokens those of plain PyTorch hooks around the model's own `generate`?"""
        run = self.alone[0]
        selectors = [each for each in run.selectors if _is_bare(each)]
        ids = torch.tensor([run.tokens[0][: run.samples[0].prompt_tokens]], device=device_of(self.hm.hooks))
        tokens, kept = _by_plain_hooks(self.hm, selectors, ids, self.new)
        if tokens != run.tokens[0]:
            return Finding("hooks", "wrong", "a capture generates other tokens than `generate` does without it")
        unlike = [str(each) for each in selectors if not torch.equal(run[each.key][0], kept[each])]
        if unlike:
            return Finding("hooks", "wrong", f"other rows than plain hooks: {unlike[0]}", {"unlike": unlike})
        told = f"{counted(len(selectors), 'tensor')} x {run.samples[0].rows} rows equal plain PyTorch hooks bit for bit"
        return Finding("hooks", "right", told, {"tensors": len(selectors)})

    def cache(self) -> Finding:
        """How far are the rows of a generation, with its cache, from one pass over the whole text?"""
        whole = [self.capture([list(tokens)], 0) for tokens in self.read]
        return self._distance("cache", "one pass over the whole text", self.alone, whole)

    def batch(self) -> Finding:
        """What does a batch of texts of different lengths change?"""
        if (why := self.hm.why_no_pads) is not None:
            return Finding("batch", "note", f"texts of different lengths run apart: {why}")
        run = self.capture(self.texts, batch_size=len(self.texts))
        other = sum(run.tokens[n] != each.tokens[0] for n, each in enumerate(self.alone))
        count = len(self.texts)
        told = f"{other} of {counted(count, 'answer')} have other tokens than alone" if other else ""
        if other:
            return Finding(
                "batch", "note", f"{told}; batch_size=1 gives the same whatever runs beside it", {"other": other}
            )
        rows = [torch.cat([_rows(run, key, n) for key in run.keys]) for n in range(count)]
        distance = max(
            _far(mine, torch.cat([_rows(each, key) for key in each.keys]))
            for mine, each in zip(rows, self.alone, strict=True)
        )
        told = f"{counted(count, 'text')} together: the same tokens; rows differ by {distance:.1e}"
        return Finding("batch", "right", told, {"texts": count, "other": 0, "distance": distance})

    def dtype(self) -> Finding:
        """How far do rows and predictions in the model's dtype lie from float64 on the same weights?"""
        chosen = [list(tokens) for tokens in self.read]
        with torch.no_grad():
            own = [_logits(self.hm, tokens) for tokens in chosen]
            with in_float64(self.hm.root):
                exact = [_logits(self.hm, tokens) for tokens in chosen]
                rows = [self.capture([tokens], 0) for tokens in chosen]
        mine = [self.capture([tokens], 0) for tokens in chosen]
        total = sum(map(len, own))
        other = sum(int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in zip(own, exact, strict=True))
        found = self._distance("dtype", "float64", mine, rows)
        self.rounding = found.figures["distance"]
        told = f"{found.found}; {other} of {counted(total, 'prediction')} are another token"
        return Finding("dtype", found.state, told, {**found.figures, "predictions": total, "other": other})

    def attention(self) -> Finding:
        """What does eager attention change, which `pattern` needs?"""
        kind = getattr(self.hm.root.config, "_attn_implementation", None)
        if kind == "eager":
            return Finding("attention", "right", "the model runs with eager attention, as `pattern` needs")
        chosen = [self.capture([list(tokens)], 0) for tokens in self.read]
        with eager(self.hm.model):
            other = [self.capture([list(tokens)], 0) for tokens in self.read]
        return self._distance("attention", f"eager attention (it runs {kind})", chosen, other)

    def nnsight(self) -> Finding:
        """Are the rows of the nnsight engine the same?"""
        run, other = self.alone[0], self.capture(self.texts[:1], engine="nnsight")
        unlike = [str(key) for key in run.keys if not torch.equal(run[key][0], other[key][0])]
        if unlike or run.tokens != other.tokens:
            return Finding("nnsight", "wrong", f"the nnsight engine gives other rows: {', '.join(unlike[:3])}")
        return Finding("nnsight", "right", "the nnsight engine gives the same tokens and rows bit for bit")

    def writes(self) -> Finding:
        """Which points may be written, so that what must change does and nothing else?"""
        kinds: dict[tuple[str, str, int | None], Selector] = {}
        for selector in self.hm.selectors("all", "all"):
            kind = "" if selector.layer is None else self.hm.map.kind_of(selector.layer).name
            kinds.setdefault((selector.point, kind, selector.call), selector)
        reasons = {key[0]: self.hm.proofs.of(selector).reason for key, selector in kinds.items()}
        refused = {point: reason for point, reason in reasons.items() if reason is not None}
        told = f"{len(reasons) - len(refused)} of {counted(len(reasons), 'point')} may be written"
        if refused:
            told += f"; not {', '.join(sorted(refused))}"
        state: Literal["right", "wrong"] = "right" if len(refused) < len(reasons) else "wrong"
        return Finding("writes", state, told, {"refused": refused})

    def cost(self) -> Finding:
        """How much longer does generation with a capture take than without?"""
        text, ratios = self.texts[:1], []
        ids = torch.tensor([self.read[0][: self.alone[0].samples[0].prompt_tokens]], device=device_of(self.hm.hooks))
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            _generate(self.hm, ids, self.new)
            between = time.perf_counter()
            self.capture(text)
            ratios.append((time.perf_counter() - between) / (between - begun))
        ratio, count = statistics.median(ratios), len(self.points) * len(self.layers)
        told = f"{counted(count, 'tensor')} of {counted(self.new, 'token')}: {ratio:.2f} x plain `generate`"
        return Finding("cost", "right" if ratio < 1.5 else "note", told, {"ratio": ratio, "tensors": count})

    def _distance(self, about: str, other: str, mine: Sequence[Capture], theirs: Sequence[Capture]) -> Finding:
        """The largest distance of a tensor's rows from those of other runs, relative to their size."""
        far = {
            key: max(_far(_rows(a, key), _rows(b, key)) for a, b in zip(mine, theirs, strict=True))
            for key in mine[0].keys
        }
        worst = max(far, key=lambda key: far[key])
        told = f"rows differ by {far[worst]:.1e} at most ({' '.join(map(str, worst))}) from {other}"
        is_rounding = far[worst] < (SMALL if self.rounding is None else max(SMALL, 2 * self.rounding))
        if self.rounding is not None and is_rounding:
            told += ": rounding"
        state: Literal["right", "note"] = "right" if is_rounding else "note"
        return Finding(about, state, told, {"distance": far[worst], "tensor": list(worst)})


def _is_bare(selector: Selector) -> bool:
    """Whether a plain hook sees the point as it is: one tensor, of a module that runs once, times no parameter."""
    (term, *others) = selector.terms
    return not others and term.call is None and term.operation is None and term.weight is None


def _rows(run: Capture, key: Any, sample: int = 0) -> torch.Tensor:
    return run[key][sample].flatten(1)


def _far(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The distance of two tensors of rows, relative to the size of the second."""
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30))


def _logits(hm: Hooked, tokens: Sequence[int]) -> torch.Tensor:
    """[pos, vocabulary]"""
    found: Any = hm.root(torch.tensor([tokens], device=device_of(hm.hooks)), use_cache=False)
    return found.logits[0]  # type: ignore[no-any-return]


def _generate(hm: Hooked, ids: torch.Tensor, new: int) -> torch.Tensor:
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False}
    with torch.no_grad():
        return generate_of(runner_of(hm.model), hm.root)(ids, **given)


def _by_plain_hooks(
    hm: Hooked, selectors: Sequence[Selector], ids: torch.Tensor, new: int
) -> tuple[tuple[int, ...], dict[Selector, torch.Tensor]]:
    """The tokens of plain `generate`, and what PyTorch's own hooks see at these places: [rows, ...]."""
    kept: dict[Selector, list[torch.Tensor]] = {each: [] for each in selectors}
    handles = []
    for each in selectors:
        (term,) = each.terms
        module = hm.model.get_submodule(term.module)

        def keep(args: Any, kwargs: Any, output: Any, each: Selector = each) -> None:
            term = each.terms[0]
            width = int(ids.shape[1]) if not kept[each] else 1
            kept[each].append(term.times(term.arrange(term.resolve(args, kwargs, output), 1, width))[0].clone())

        if term.side == "input":
            hook = lambda _, args, kwargs, keep=keep: keep(args, kwargs, None)  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(lambda _, args, output, keep=keep: keep((), {}, output)))
    try:
        tokens = _generate(hm, ids, new)[0].tolist()
    finally:
        for handle in handles:
            handle.remove()
    return tuple(tokens), {each: torch.cat(rows).cpu() for each, rows in kept.items()}
