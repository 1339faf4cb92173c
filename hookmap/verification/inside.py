"""Verification of the points inside a branch: q, k, v, z, pattern, mlp_post, the router. Numbers, not dataflow.

The model's own modules are applied to what was captured (`o_proj(z)` is the mixer's output), Hugging Face's attentions
are compared, and causes are asked for: the sign of one head's q, k or v is turned, and only that head may move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hookmap.loading import modules
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.points import PointName
from hookmap.maps.relations import Relation
from hookmap.maps.selectors import Term
from hookmap.maps.templates import BlockKind
from hookmap.verification.runner import CheckedRun, Error, Key, Result


def checks_inside(
    found: ArchitectureMap, model: nn.Module, ids: Tensor, values: dict[Key, Tensor], error: Error, tolerance: float
) -> Iterator[Result]:
    """Every check of the points inside branches that this map has. `values`: points of one forward pass on `ids`."""
    checker = _Inside(found, model, ids, values, error, tolerance)
    yield checker.bare()
    for kind in found.kinds:
        yield from checker.relations(kind)
        yield from checker.router(kind)
    yield from checker.patterns()
    yield from checker.attentions()
    for kind in found.kinds:
        yield from checker.heads(kind)


_ONE_TENSOR = (
    "mixer_in", "mlp_in", "q", "k", "v", "z", "pattern", "mlp_post", "router_logits", "router_indices", "router_weights"
)  # fmt: skip


class _Inside(CheckedRun):
    # Places -----------------------------------------------------------------------------------------------------

    def bare(self) -> Result:
        """What a branch reads or has inside is one tensor as it is; its bare output is what modules of it return."""
        wrong = []
        for kind in self.map.kinds:
            for point, template in kind.points.items():
                name, terms = PointName.of(PointName.of(point).as_mixer()).base, template.terms
                if name in _ONE_TENSOR and (len(terms) > 1 or terms[0].scale != 1):
                    wrong.append(f"{point} is a sum or has a factor")
                elif name.endswith("_raw") and not self._returned(kind, point):
                    wrong.append(f"{point} is not what its branch returns")
        detail = "; ".join(dict.fromkeys(wrong)) or "what branches read, hold and return are tensors as they are"
        return "bare", (), not wrong, detail, None

    def _returned(self, kind: BlockKind, point: str) -> bool:
        """Whether `mixer_out_raw` is an output of a module of its branch, shaped as `mixer_in`.

        Or a sum, as of two mixers or a branch with a residual of its own: then `mixer_out` is a multiple of it.
        """
        terms, branch = kind.points[point].terms, kind.mlp if point.startswith("mlp") else kind.mixer
        ends = (PointName.of(point).end(name) for name in ("out_raw", "out", "in"))
        raw, out, read = (self.values.get((name, kind.layers[0])) for name in ends)
        if any(term.scale != 1 for term in terms) or len(set(terms)) < len(terms):
            return False
        if len(terms) > 1:
            if raw is None or out is None:
                return True
            return self.error(raw * ((raw * out).sum() / raw.square().sum()), out) <= self.tolerance
        inside = any(f"{terms[0].module}.".startswith(f"{root}.") for root in (branch.modules if branch else ()))
        return inside and terms[0].side == "output" and (raw is None or read is None or raw.shape == read.shape)

    # Arithmetic -------------------------------------------------------------------------------------------------

    def relations(self, kind: BlockKind) -> Iterator[Result]:
        """`mixer_out_raw = o_proj(z)`, `z = pattern @ v`, `router_indices = topk(router_logits)`, …"""
        for text in kind.relations:
            relation = Relation.parse(text)
            if relation is not None and relation.form == "sum":
                continue  # see verification.relations
            compute = None if relation is None else self._right_side(relation)
            if relation is None or compute is None:
                yield "inside", kind.layers, False, f"{text}: hookmap knows no such relation", None
                continue
            layers = [i for i in kind.layers if all((name, i) in self.values for name in relation.points())]
            errors = [self._difference(relation.total, i, compute(i)) for i in layers]
            right_on_all = len(layers) == len(kind.layers) and max(errors) <= self.tolerance
            yield "inside", kind.layers, right_on_all, text, max(errors, default=None)

    def _right_side(self, relation: Relation) -> Callable[[int], Tensor] | None:
        """How to compute it on a layer; None where hookmap knows no such relation."""
        names = [term.name for term in relation.terms]
        if relation.form == "product":
            return self._mixed if names == ["pattern", "v"] else None
        if relation.function == "topk":
            return self._top if names == ["router_logits"] else None
        return self._projected(relation.function, names[0]) if names[0] in ("z", "mlp_post") else None

    def _difference(self, point: str, layer: int, expected: Tensor) -> float:
        found = self.values[point, layer]
        if point == "router_indices":  # a set: which of two equal scores comes first is nobody's promise
            found, expected = found.sort(-1).values, expected.sort(-1).values
        return self.error(found, expected if point == "z" else expected.reshape(found.shape))

    def _projected(self, path: str, point: str) -> Callable[[int], Tensor]:
        def compute(layer: int) -> Tensor:
            whole = path if "{i}" in path else f"{self.map.layers_path}.{path}"
            value = self.values[point, layer]
            with torch.no_grad():
                given = self.model.get_submodule(whole.replace("{i}", str(layer)))(value.flatten(2))
            output: Tensor = given[0] if isinstance(given, tuple) else given
            return output

        return compute

    def _mixed(self, layer: int) -> Tensor:
        pattern, v = self.pattern(layer), self.values["v", layer].movedim(2, 1)
        shared = pattern.shape[1] // v.shape[1]
        return (pattern.to(v.dtype) @ v.repeat_interleave(shared, 1)).movedim(1, 2)

    def _top(self, layer: int) -> Tensor:
        kept = self.values["router_indices", layer].shape[-1]
        return self.values["router_logits", layer].topk(kept, -1).indices

    def pattern(self, layer: int) -> Tensor:
        """[batch, heads, query, key]; a capture has the queries first."""
        return self.values["pattern", layer].movedim(2, 1)

    # Attention weights ------------------------------------------------------------------------------------------

    def patterns(self) -> Iterator[Result]:
        """No weight is negative, and the weights of a query sum to 1, or less beside a sink."""
        layers = tuple(layer for point, layer in self.values if point == "pattern" and layer is not None)
        if not layers:
            return
        sums = torch.stack([self.pattern(i).float().sum(-1).flatten() for i in layers if self.pattern(i).numel()])
        ahead = max(float(self.pattern(i).float().triu(1).abs().max()) for i in layers)
        least = min(float(self.pattern(i).min()) for i in layers)
        one = float((sums - 1).abs().max())
        below = bool((sums <= 1 + self.tolerance).all())
        rows = "sum to 1" if one <= self.tolerance else "sum to less than 1 (attention sinks take the rest)"
        causal = "none looks ahead" if ahead <= self.tolerance else "some look ahead (this model is not causal)"
        detail = f"rows of pattern {rows}, none negative, {causal}"
        yield "pattern", layers, least >= 0 and below, detail, max(0.0, -least)

    def attentions(self) -> Iterator[Result]:
        """`pattern` is what Hugging Face returns as `attentions`."""
        layers = sorted(layer for point, layer in self.values if point == "pattern" and layer is not None)
        given = self._given_attentions() if layers else []
        if len(given) == self.map.num_layers:
            given = [given[layer] for layer in layers]
        if not layers or len(given) != len(layers) or any(a.shape[-1] != self.ids.shape[1] for a in given):
            return
        errors = [self.error(self.pattern(i), a) for i, a in zip(layers, given, strict=True)]
        yield "attentions", tuple(layers), max(errors) <= self.tolerance, "pattern = attentions[i]", max(errors)

    def _given_attentions(self) -> list[Tensor]:
        try:
            output = self._run({}, output_attentions=True)
        except (TypeError, ValueError, NotImplementedError):
            return []
        given = getattr(output, "attentions", None) or ()
        return [each for each in given if isinstance(each, Tensor) and each.dim() == 4]

    # Causes -----------------------------------------------------------------------------------------------------

    def heads(self, kind: BlockKind) -> Iterator[Result]:
        """Turn the sign of the last head's q or k at one position: of the weights only its heads' move, and only at
        the queries that see it: for q that position, for k it and those behind.

        v is turned where something stands between it and z; else `z = pattern @ v` has proved it.
        """
        layer = kind.layers[0]
        for point, read in (("q", "pattern"), ("k", "pattern"), ("v", "z")):
            proved = point == "v" and "z = pattern @ v" in kind.relations
            if not proved and (point, layer) in self.values and (read, layer) in self.values:
                yield self._head(point, read, layer)

    def _head(self, point: str, read: str, layer: int) -> Result:
        own, count = self.values[point, layer].shape[2], self.values[read, layer].shape[2]
        (changed,), (seen,) = self.map.selectors(point, layer), self.map.selectors(read, layer)
        tensors: list[Tensor] = []
        hooks: dict[str, list[Any]] = {seen.module: [_reading(seen.terms[0], self.ids, tensors)]}
        length = self.ids.shape[1]
        place = length // 2
        hooks.setdefault(changed.module, []).append(_turning(changed.terms[0], own - 1, place, length))
        self._run(hooks)
        change = (tensors[0].float() - self.values[read, layer].float()).abs().amax((0, 3))
        moved = change > self.tolerance
        heads, places = moved.any(0).nonzero().flatten().tolist(), moved.any(1).nonzero().flatten().tolist()
        # Neighbouring queries share a key, or (JetMoE) every own-th does.
        shared = (list(range(count - count // own, count)), list(range(own - 1, count, own)))
        # A norm over all heads behind z (BitNet) moves the others too, by less.
        right = heads in shared if point != "v" else any(int(change.amax(0).argmax()) in each for each in shared)
        what = f"the sign of {point} of head {own - 1} at position {place} turned in layer {layer}"
        detail = f"{what}: {read} moves in heads {heads} at positions {places}"
        return "head", (layer,), right and self._seen_by(point, layer, place, places), detail, None

    def _seen_by(self, point: str, layer: int, place: int, places: list[int]) -> bool:
        """Whether these are queries that see position `place`: with sparse attention not all behind it do."""
        if point == "q":
            return places == [place]
        if ("pattern", layer) not in self.values or self.pattern(layer).float().triu(1).any():
            return bool(places)  # every position may see every other
        behind = bool((self.pattern(layer)[:, :, place + 1 :, place] > 0.05).any())
        return bool(places) and places[0] >= place and (places[-1] > place or not behind)

    def router(self, kind: BlockKind) -> Iterator[Result]:
        """The indices are different experts of each token, and as many as there are weights."""
        layers = tuple(i for i in kind.layers if ("router_indices", i) in self.values)
        wrong = []
        for layer in layers:
            indices = self.values["router_indices", layer]
            weights = self.values.get(("router_weights", layer), indices)
            scores = self.values.get(("router_logits", layer))
            twice = bool((indices.sort(-1).values.diff(dim=-1) == 0).any())
            beyond = scores is not None and not 0 <= int(indices.min()) <= int(indices.max()) < scores.shape[-1]
            if indices.shape != weights.shape or twice or beyond:
                wrong.append(layer)
        if layers:
            detail = f"wrong on layers {wrong}" if wrong else "router_indices are different experts, one per weight"
            yield "router", layers, not wrong, detail, None

    def _run(self, hooks: dict[str, list[Any]], **more: Any) -> Any:
        given = {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids), "use_cache": False, **more}
        kwargs = {parameter: given[name] for name, parameter in modules.accepted(self.model, given).items()}
        handles = [
            self.model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
            for path, each in hooks.items()
            for hook in each
        ]
        try:
            with torch.no_grad():
                return self.model(**kwargs, **{k: v for k, v in more.items() if k not in kwargs})
        finally:
            for handle in handles:
                handle.remove()


def _turning(term: Term, head: int, place: int, length: int) -> Callable[..., Any]:
    """A hook that turns the sign of one head's features at one position in a module's output."""

    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        tensor = output if term.index is None else output[term.index]
        features = torch.arange(tensor.shape[-1], device=tensor.device)
        mine = Term(term.module, "output", None, heads=term.heads).resolve((), {}, features)[head]
        turned = tensor.clone()
        rows = turned.unflatten(0, (-1, length)) if term.flat else turned
        before = rows.shape[-2] - length if term.rows == "last" else 0  # positions that are no token's (CPM-Ant)
        rows[..., before + place, mine] *= -1  # writes to `turned`: a view of it where it is flat
        if term.index is None:
            return turned
        return tuple(turned if n == term.index else each for n, each in enumerate(output))

    return hook


def _reading(term: Term, ids: Tensor, tensors: list[Tensor]) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tensors.append(term.arrange(term.resolve(args, kwargs, output), *ids.shape).detach().clone())

    return hook
