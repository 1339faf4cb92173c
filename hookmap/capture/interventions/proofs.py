"""A point is written only where a test on this very model showed that writing it does what it says, and nothing more.

The stream is changed where the block reads it (run B), and what a point holds there is patched into a run without that
change (A). What reads only this point must then come out as in B, bit for bit; what comes before it, or beside it, must
come out as in A; and the block's own sums must hold. Once for each point and kind of block, on a few random tokens.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hookmap.activations import Activation
from hookmap.capture.engines import Engine
from hookmap.capture.engines.observation import Observer
from hookmap.capture.engines.pass_rows import BatchLayout
from hookmap.capture.finiteness import why_not_finite
from hookmap.capture.interventions.edits import Changing, Edit, Editor, Where
from hookmap.capture.interventions.writable import refusal
from hookmap.capture.run import device_of, running
from hookmap.loading.finiteness import is_stream
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.points import PointName
from hookmap.maps.relations import Relation
from hookmap.maps.selectors import Selector, select
from hookmap.maps.templates import BlockKind

TOKENS = 6
Values = dict[tuple[str, int | None], torch.Tensor]

_READER = {"mixer_in": "mixer_out_raw", "mlp_in": "mlp_out_raw", "z": "mixer_out_raw", "mlp_post": "mlp_out_raw"}
"""point -> what is computed from it and from nothing else that changes"""
_INSIDE = {
    "mixer": ("mixer_in", "q", "k", "v", "z", "mixer_out_raw", "mixer_out"),
    "mlp": ("mlp_in", "mlp_post", "router_logits", "router_indices", "router_weights", "mlp_out_raw", "mlp_out"),
}
_OUTS = ("mixer_out_raw", "mixer_out", "mlp_out_raw", "mlp_out")


@dataclass(frozen=True)
class Proof:
    """What was found about writing a point of one kind of block."""

    reason: str | None
    """why it is refused; None where writing it is proved"""
    row: tuple[int, ...] = ()
    """shape of one row"""
    dtype: torch.dtype = torch.float32


class Proofs:
    """The proofs of one opened model, made when they are first asked for."""

    def __init__(self, engine: Engine, architecture_map: ArchitectureMap) -> None:
        self._engine, self._map = engine, architecture_map
        self._found: dict[tuple[str, str], Proof] = {}
        self._runs: dict[tuple[str, str], Values] = {}
        self._repeat: dict[str, bool] = {}
        self._lock = threading.RLock()

    def of(self, selector: Selector) -> Proof:
        """Whether this point is written right in this kind of block."""
        kind = None if selector.layer is None else self._map.kind_of(selector.layer)
        with self._lock, running(self._engine):
            return self._proof(PointName.of(selector.point).as_mixer(), kind)

    def _proof(self, point: str, kind: BlockKind | None) -> Proof:
        key = (point, "" if kind is None else kind.name)
        if key not in self._found:
            selector = self._selector(point, kind)
            reason = refusal(selector)
            try:
                proof = Proof(reason) if reason else self._tried(point, kind, selector)
            except Exception as error:  # a model's own code raises what it likes
                proof = Proof(f"writing it failed when it was tried ({type(error).__name__}: {error})")
            self._found[key] = proof
        return self._found[key]

    def _tried(self, point: str, kind: BlockKind | None, selector: Selector) -> Proof:
        plain = self._run("plain", kind)
        if any(is_stream(name) and not bool(rows.isfinite().all()) for (name, _), rows in plain.items()):
            return Proof(why_not_finite(self._engine, self._map, _tokens(self._engine)[0].tolist()))
        where = (selector.point, selector.layer)
        row = tuple(plain[where].shape[1:])
        if kind is None:
            written = plain[where] + _noise(plain[where], 1)
            after = self._pass(kind, [_put(selector, written)])
            wrong = _read_back(selector, after[where], written)
            moved = {"embed": ("resid_pre", 0), "final_norm": ("logits", None)}.get(point)
            if moved is not None and moved in plain and torch.equal(after[moved], plain[moved]):
                wrong = f"nothing behind it changed ({moved[0]})"
            return Proof(wrong, row, plain[where].dtype)
        source = self._source(point, kind)
        other = self._run(source, kind)
        after = self._pass(kind, [_put(selector, other[where])])
        self._runs[point, kind.name] = after
        wrong = _Compared(kind, selector, plain, other, after, source, self._repeats(kind)).wrong()
        return Proof(wrong or self._leaks(point, kind, selector), row, plain[where].dtype)

    def _leaks(self, point: str, kind: BlockKind, selector: Selector) -> str | None:
        """With the branch's output put back, what was written inside the branch must not be seen behind it."""
        name = PointName.of(point)
        inside = [branch for branch, points in _INSIDE.items() if name.base in points and name.base not in _OUTS]
        branch = next(iter(inside), None)
        if branch is None:
            return None
        out = name.numbered(f"{branch}_out")
        if out not in kind.points or refusal(back := self._selector(out, kind)):
            return None  # a sum of terms: the relations of the block were held against it
        plain, other = self._run("plain", kind), self._run("changed", kind)
        where = (selector.point, selector.layer)
        edits = [_put(selector, other[where]), _put(back, plain[back.point, back.layer])]
        after, key = self._pass(kind, edits), ("resid_post", selector.layer)
        exact = self._repeats(kind) and back.terms[0].scale == 1.0
        if torch.equal(after[key], plain[key]):
            return None
        if not exact and _difference(after[key].float(), plain[key].float()) < _tolerance(plain[key]):
            return None
        return f"it is read outside of the branch too: resid_post changes even with {out} put back"

    def _repeats(self, kind: BlockKind) -> bool:
        """Whether a run comes out to the bit again: some kernels of GPUs add in another order each time."""
        if kind.name not in self._repeat:
            again, plain = self._pass(kind, []), self._run("plain", kind)
            self._repeat[kind.name] = all(torch.equal(again[key], plain[key]) for key in plain)
        return self._repeat[kind.name]

    def _source(self, point: str, kind: BlockKind) -> str:
        """Where the other run is changed: where the branch reads, if it is proved that nothing else changes then."""
        name = PointName.of(point)
        for branch, inside in _INSIDE.items():
            reads = name.numbered(f"{branch}_in")
            if name.base in inside[1:] and reads in kind.points:
                return reads if self._proof(reads, kind).reason is None else "changed"
        return "changed"

    def _run(self, name: str, kind: BlockKind | None) -> Values:
        """`plain`; `changed`: the stream that enters the block; or a point's name: patched there from `changed`."""
        key = (name, "" if kind is None else kind.name)
        if key not in self._runs:
            edits = []
            if name == "changed" and kind is not None:
                stream = self._selector("resid_pre", kind)
                old = self._run("plain", kind)[stream.point, stream.layer]
                edits = [_put(stream, old + _noise(old, 0))]
            self._runs[key] = self._pass(kind, edits)
        return self._runs[key]

    def _selector(self, point: str, kind: BlockKind | None) -> Selector:
        return select(self._map, [point], "all" if kind is None else [_layer(kind, self._map.num_layers)])[0]

    def _pass(self, kind: BlockKind | None, edits: Sequence[Edit]) -> Values:
        selectors = self._watched(kind)
        ids = _tokens(self._engine)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        rows: dict[tuple[str, int | None], list[torch.Tensor]] = {}

        def take(activation: Activation) -> None:
            rows.setdefault((activation.point, activation.layer), []).append(activation.tensor)

        observer = Observer(selectors, BatchLayout((0,), (TOKENS,), right=True), take)
        self._engine.forward(observer, inputs, Editor(edits, observer) if edits else None)
        observer.finish(TOKENS)
        return {key: torch.cat(parts) for key, parts in rows.items()}

    def _watched(self, kind: BlockKind | None) -> tuple[Selector, ...]:
        names = list(self._map.model_points)
        if kind is None:
            return select(self._map, [*names, "resid_pre"], [0])
        layer = _layer(kind, self._map.num_layers)
        found = select(self._map, [p for p in kind.points if not p.startswith("pattern")], [layer])
        after = self._map.num_layers - 1 == layer
        behind = select(self._map, ["final_norm"]) if after and "final_norm" in names else ()
        return (*found, *(select(self._map, ["resid_pre", "resid_post"], [layer + 1]) if not after else behind))


@dataclass(frozen=True)
class _Compared:
    """Three runs: without a change (A), with one upstream (B), and A with one point as it is in B."""

    kind: BlockKind
    selector: Selector
    plain: Values
    other: Values
    after: Values
    source: str
    repeats: bool
    """whether the model's runs come out to the bit again"""

    def wrong(self) -> str | None:
        """What is not as it has to be, in words."""
        point, where = self.selector.point, (self.selector.point, self.selector.layer)
        if torch.equal(self.other[where], self.plain[where]):
            return "a change of the stream that the block reads does not reach it"
        return (
            _read_back(self.selector, self.after[where], self.other[where])
            or self._untouched(point)
            or self._effect(PointName.of(point).base)
        )

    def _untouched(self, point: str) -> str | None:
        """What stands before the point, or in the other of two parallel branches, is as it was."""
        base, order = PointName.of(point).base, self.kind.points[point].order
        if base.startswith("resid_"):
            return None
        own = next(inside for inside in _INSIDE.values() if base in inside)
        for name, template in self.kind.points.items():
            other = PointName.of(PointName.of(name).as_mixer()).base
            beside = self.kind.branch_order == "parallel" and not other.startswith("resid_") and other not in own
            same = other == base or (other in _OUTS and base in _OUTS and other in own)
            sums_it = len(template.terms) > 1 and set(template.terms) & set(self.kind.points[point].terms)
            before = template.order <= order and not same and not sums_it
            if (before or beside) and not name.startswith("pattern") and self._moved(name):
                shared = template.terms == self.kind.points[point].terms
                why = "they are one tensor" if shared else "it holds the same memory"
                return f"writing it writes {name} too: {why}. Write what comes before it, or behind it"
        return None

    def _effect(self, base: str) -> str | None:
        name = PointName.of(self.selector.point)
        layer = self.selector.layer
        if base == "resid_post":
            behind = [key for key in self.plain if key[1] != layer]
            return next((self._not_as_in_other(key) for key in behind if self._not_as_in_other(key)), None)
        reader = _READER.get(base)
        if base in _OUTS:
            return self._added(base)
        if base.startswith("resid_"):
            reader = "resid_post"
        elif reader is not None:
            reader = name.numbered(reader)
        if reader is not None and reader in self.kind.points:
            return self._not_as_in_other((reader, layer))
        own = name.numbered("mixer_out_raw" if base in _INSIDE["mixer"] else "mlp_out_raw")
        reaches = own if own in self.kind.points else "resid_post"
        return None if self._moved(reaches) else f"nothing reads it there any more: {reaches} stays as it was"

    def _not_as_in_other(self, key: tuple[str, int | None]) -> str | None:
        if torch.equal(self.after[key], self.other[key]) or self._rounded(self.after[key], self.other[key]):
            return None
        if torch.equal(self.after[key], self.plain[key]):
            return f"{key[0]} stays as it was: what reads the point reads another tensor"
        return f"{key[0]} is not what it would be with this value: it reads other things of the block too"

    def _added(self, base: str) -> str | None:
        """What a branch adds: the block goes on as it would, and the sum that has it as a term holds."""
        only_this_branch_differs = self.source != "changed"
        wrong = self._not_as_in_other(("resid_post", self.selector.layer)) if only_this_branch_differs else None
        if wrong is not None or (base.endswith("_raw") and only_this_branch_differs):
            return wrong
        out = PointName.of(self.selector.point).end("out")
        if base.endswith("_raw") and out in self.kind.points and not self._same_tensor(self.selector.point, out):
            return self._not_as_in_other((out, self.selector.layer))  # only its norm stands between them
        return self._sums(none_is_fine=only_this_branch_differs)

    def _sums(self, none_is_fine: bool) -> str | None:
        """Where a sum has this branch as a term, it changed by as much as the branch."""
        layer, own = self.selector.layer, self.kind.points[self.selector.point].terms
        names = {PointName.of(name).as_mixer() for name, point in self.kind.points.items() if point.terms == own}
        for relation in filter(None, map(Relation.parse, self.kind.relations)):
            if relation.form != "sum":
                continue
            terms = [term for term in relation.terms if not term.of and (term.name, layer) in self.plain]
            if names & {term.name for term in terms} and (relation.total, layer) in self.plain:
                expected = sum(term.factor * self._delta(term.name) for term in terms)
                found = self._delta(relation.total)
                held = _difference(found, expected) < _tolerance(self.plain[relation.total, layer])
                return None if held else f"{relation} does not hold after writing it"
        return None if none_is_fine else "nothing shows what it is added to: no sum of this block has it as a term"

    def _rounded(self, found: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether they differ by no more than the model may round: of a scaled term, or of runs that do not repeat."""
        if self.selector.terms[0].scale == 1.0 and self.repeats:
            return False
        return _difference(found.float(), expected.float()) < _tolerance(found)

    def _same_tensor(self, point: str, other: str) -> bool:
        return other in self.kind.points and self.kind.points[other].terms == self.kind.points[point].terms

    def _delta(self, name: str) -> torch.Tensor:
        where = (name, self.selector.layer)
        return self.after[where].float() - self.plain[where].float()

    def _moved(self, name: str) -> bool:
        after, plain = (run[name, self.selector.layer] for run in (self.after, self.plain))
        same = _difference(after.float(), plain.float()) < _tolerance(plain) if not self.repeats else False
        return not (torch.equal(after, plain) or same)


def _read_back(selector: Selector, found: torch.Tensor, written: torch.Tensor) -> str | None:
    same = torch.equal(found, written)
    if selector.terms[0].scale != 1.0:
        same = _difference(found.float(), written.float()) < _tolerance(found)
    return None if same else "the value written is not the value read there afterwards"


def _difference(found: torch.Tensor, expected: torch.Tensor | int) -> float:
    return float((found - expected).norm() / found.norm().clamp_min(1e-12))


def _tolerance(like: torch.Tensor) -> float:
    """Of a relative difference, where the model rounds."""
    return 1e-4 if like.dtype in (torch.float32, torch.float64) else 4e-2


def _put(selector: Selector, value: torch.Tensor) -> Edit:
    def change(rows: torch.Tensor, where: Where, means: torch.Tensor | None) -> torch.Tensor:
        return value.to(rows.device)[[position for _, position in where]]

    made: Changing = change
    return Edit(selector, made)


def _noise(like: torch.Tensor, seed: int) -> torch.Tensor:
    """As large as the values themselves."""
    draw = torch.Generator().manual_seed(seed)
    size = like.float().std().clamp_min(1e-3)
    return (torch.randn(like.shape, generator=draw) * size).to(like.dtype)


def _tokens(engine: Engine) -> torch.Tensor:
    embedding = engine.root.get_input_embeddings().weight  # type: ignore[operator]
    draw = torch.Generator().manual_seed(0)
    return torch.randint(min(3, len(embedding) - 1), len(embedding), (1, TOKENS), generator=draw).to(device_of(engine))


def _layer(kind: BlockKind, layers: int) -> int:
    """A layer of this kind, with another one behind it if there is such a one."""
    return next((layer for layer in kind.layers if layer + 1 < layers), kind.layers[0])
