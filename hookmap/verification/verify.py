"""Does a map tell the truth? Numbers from plain PyTorch hooks, compared with Hugging Face and with arithmetic.

Nothing that discovery used is used here: the model runs with data, hooks read what the map names, and three kinds of
evidence are asked for: Hugging Face's own hidden states, the additions of the block, and causes (a branch's weights
are changed, and what the map says comes after them must move, and nothing else).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hookmap.discovery.discover import config_of, discover
from hookmap.errors import CaptureError, HookmapError, MapMismatchError, ModelError
from hookmap.loading import modules
from hookmap.loading.finiteness import in_words, is_stream
from hookmap.loading.narrow import narrow_copy
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.points import PointName
from hookmap.maps.selectors import Selector, select
from hookmap.maps.templates import BlockKind, PointTemplate, TermTemplate
from hookmap.stores.ledger import tensor_name
from hookmap.verification.inside import checks_inside
from hookmap.verification.reads import checks_reads
from hookmap.verification.relations import Relations

Key = tuple[str, int | None]
_BATCH, _POSITIONS = 2, 9


@dataclass(frozen=True)
class Check:
    """One statement about the map, and whether the numbers bear it out."""

    name: str
    layers: tuple[int, ...]
    passed: bool
    detail: str
    error: float | None = None
    """largest difference, relative to the root mean square of what was expected"""


@dataclass(frozen=True)
class Verification:
    """All checks of one map on one model."""

    architecture_map: ArchitectureMap
    on: str
    """what ran: the model's own weights, or random ones at narrow width"""
    checks: tuple[Check, ...] = field(default=())

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "architecture": self.architecture_map.architecture,
            "model_id": self.architecture_map.model_id,
            "on": self.on,
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
        }


def verify(
    source: Any,
    *,
    architecture_map: ArchitectureMap | None = None,
    random_weights: bool = False,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> Verification:
    """Run a model and check its map (found by discovery where none is given).

    `source`: as for `discover`. A torch module, an nnsight model, and a hub id or folder whose weights can be loaded
    are verified with their own weights; a config, a model without reachable weights, and anything under
    `random_weights`, as a narrow copy of full depth with random weights: the result says which. Raises ModelError or
    DiscoveryError where there is nothing to check.
    """
    config = _config(source, trust_remote_code)
    model, on = _runnable(source, config, random_weights, trust_remote_code)
    if modules.device_of(model).type == "meta":
        raise ModelError("the model is on the meta device, without weights: give its config to `verify` instead.")
    if on.startswith("random"):
        redraw(model, seed)
    found = architecture_map or discover(source if config is None else config, trust_remote_code=trust_remote_code)
    _same_architecture(found, model)
    checked = found
    if on.startswith("random"):
        found, checked = _at_the_width_of(found, model)
    with modules.eager(model):
        return Verification(found, on, tuple(_Verifier(checked, model, seed).checks()))


def _at_the_width_of(found: ArchitectureMap, copy: nn.Module) -> tuple[ArchitectureMap, ArchitectureMap]:
    """The map without what a narrow copy cannot prove, and that map with the numbers of heads that the copy has."""
    if not any(t.heads for kind in found.kinds for point in kind.points.values() for t in point.terms):
        return found, found
    narrow_map = discover(copy)
    kept, kinds = [], []
    for kind in found.kinds:
        own = narrow_map.kind_of(kind.layers[0]).points
        reason = "it is not proved: a narrow copy of the model does not show it in the same place"
        kept.append(kind.without({n: reason for n, p in kind.points.items() if not _same_places(p, own.get(n))}))
        points = {name: _with_heads(point, own.get(name)) for name, point in kept[-1].points.items()}
        kinds.append(kept[-1].model_copy(update={"points": points}))
    return found.model_copy(update={"kinds": tuple(kept)}), found.model_copy(update={"kinds": tuple(kinds)})


def _same_places(point: PointTemplate, own: PointTemplate | None) -> bool:
    """Whether a point of heads stands where the copy's does; other points are checked where they are."""
    if not any(term.heads for term in point.terms):
        return True
    return own is not None and [(t.module, t.side, t.index) for t in own.terms] == [
        (t.module, t.side, t.index) for t in point.terms
    ]


def _with_heads(point: PointTemplate, own: PointTemplate | None) -> PointTemplate:
    if own is None or len(own.terms) != len(point.terms):
        return point
    pairs = zip(point.terms, own.terms, strict=True)
    terms = tuple(a.model_copy(update={"heads": b.heads}) if a.heads else a for a, b in pairs)
    return point.model_copy(update={"terms": terms})


def redraw(model: nn.Module, seed: int = 0) -> None:
    """Random weights under which each branch adds about as much as the stream holds.

    Under the usual initialisation (std 0.02) a branch adds so little that a wrong tensor hides in the tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.dtype.is_floating_point:
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            value = noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else parameter + 0.1 * noise
            parameter.copy_(value)


def _runnable(source: Any, config: Any, random_weights: bool, trust_remote_code: bool) -> tuple[nn.Module, str]:
    """The model with its own weights, or, where there are none or none are wanted, a narrow copy with random ones."""
    if config is None:
        return modules.unwrap(source), "the model's own weights"
    why = ""
    if isinstance(source, (str, Path)) and not random_weights:
        from hookmap.loading.checkpoints import load_model

        try:
            return load_model(source, trust_remote_code=trust_remote_code), "the model's own weights"
        except ModelError as error:
            if any(Path(source).glob("*.safetensors")) or any(Path(source).glob("*.bin")):
                raise  # there are weights, and they are broken
            why = f" ({str(error).splitlines()[0]})"
    model, _ = narrow_copy(config, trust_remote_code)
    return model, f"random weights, narrow width, full depth{why}"


def _config(source: Any, trust_remote_code: bool) -> Any:
    """The config of a hub id, a folder or a config; None for a module. Offline, a shipped map's config serves."""
    if not isinstance(source, (str, Path)):
        is_config = hasattr(source, "to_dict") and not isinstance(source, nn.Module)
        return source if is_config else None
    return config_of(source, trust_remote_code)[0]


def _same_architecture(found: ArchitectureMap, model: nn.Module) -> None:
    if found.architecture != (own := modules.architecture_of(model)):
        raise MapMismatchError(
            f"the map is of {found.architecture}, the model is a {own}. "
            "Make its own map: hookmap discover MODEL -o FILE"
        )


class _Verifier:
    def __init__(self, found: ArchitectureMap, model: nn.Module, seed: int) -> None:
        self.map, self.model = found, model
        self.selectors = select(found, found.points)
        generator = torch.Generator().manual_seed(seed)
        self.embedding = _input_embedding(found, model)
        vocab = found.d_vocab or 2 if self.embedding is None else len(next(self.embedding.parameters()))
        device = modules.device_of(model)
        self.ids = torch.randint(min(5, vocab - 1), vocab, (_BATCH, _POSITIONS), generator=generator).to(device)
        self.events: list[tuple[str, str, int]] = []
        self.sequence: list[int] = []
        """the layers in the order in which they ran, one entry for each time"""
        precise = next(model.parameters()).dtype in (torch.float32, torch.float64)
        self.tolerance = 1e-4 if precise else 4e-2

    def checks(self) -> Iterator[Check]:
        missing = sorted({t.module for s in self.selectors for t in s.terms if not self._has(t.module)})
        if missing:
            yield Check("modules", (), False, f"the model has no module {', '.join(missing)}")
            return
        try:
            values, output = self._first_run()
        except HookmapError as error:
            yield Check("selectors", (), False, str(error))
            return
        if (wrong := self._not_finite(values)) is not None:
            yield wrong
            return
        try:
            yield from self._comparisons(values, output)
        except Exception as error:  # a wrong map's tensors fail in sums, products and hooks as each of them does
            said = str(error).partition("\n")[0]
            yield Check("fit", (), False, f"what the map names does not fit together: {said}")

    def _comparisons(self, values: dict[Key, Tensor], output: Any) -> Iterator[Check]:
        yield self._shapes(values)
        yield self._order()
        yield from self._hidden_states(values, output)
        yield from self._ends(values, output)
        yield from self._final_norm(values, output)
        relations = Relations(self.map, self.model, self.ids, values, self._error, self.tolerance)
        for kind in self.map.kinds:
            for each in relations.checks(kind):
                yield Check(*each)
        yield from self._second_names(values)
        for each in checks_inside(self.map, self.model, self.ids, values, self._error, self.tolerance):
            yield Check(*each)
        for each in checks_reads(self.map, self.model, self.ids, values, self._error, self.tolerance):
            yield Check(*each)
        yield from self._causes(values)

    def _not_finite(self, values: dict[Key, Tensor]) -> Check | None:
        """Nothing can be compared with an infinity: each check would fail for a reason that is not its own."""
        for selector in self.selectors:
            key = (selector.point, selector.layer)
            bad = ~values[key].flatten(2).isfinite().all(-1) if key in values and is_stream(selector.point) else None
            if bad is not None and bool(bad.any()):
                layers = () if selector.layer is None else (selector.layer,)
                said = in_words(tensor_name(key), int(bad.any(0).nonzero()[0]), values[key].dtype, self.model)
                return Check("finite", layers, False, said)
        return None

    def _first_run(self) -> tuple[dict[Key, Tensor], Any]:
        try:
            return self._run()
        except RuntimeError:  # a model of audio reads several rows of ids per sequence
            rows = modules.rows_per_sequence(getattr(self.model, "config", None))
            if rows == 1:
                raise
            self.ids = self.ids.repeat_interleave(rows, 0)
            return self._run()

    def _has(self, path: str) -> bool:
        try:
            self.model.get_submodule(path)
        except AttributeError:
            return False
        return True

    # Running ----------------------------------------------------------------------------------------------------

    def _run(self, changed: dict[str, Tensor] | None = None) -> tuple[dict[Key, Tensor], Any]:
        """All points of all layers, as plain forward hooks see them in one forward pass."""
        found: dict[tuple[Key, int], Tensor] = {}
        handles = []
        self.events, self.sequence = [], []
        for numbers in self._numbers_of_blocks().values():
            module = self.model.get_submodule(self.map.layers_path.replace("{i}", str(numbers[0])))
            handles.append(module.register_forward_pre_hook(self._ran(numbers)))
        for selector in self.selectors:
            for number, term in enumerate(selector.terms):
                module = self.model.get_submodule(term.module)
                handles.append(module.register_forward_hook(self._reader(found, selector, number), with_kwargs=True))
        for path in {t.module for s in self.selectors for t in s.terms}:
            module = self.model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(self._event(path, "input")))
            handles.append(module.register_forward_hook(self._event(path, "output")))
        given = {
            "input_ids": self.ids,
            "attention_mask": torch.ones_like(self.ids),
            "use_cache": False,
            "output_hidden_states": True,
        }
        kwargs = {parameter: given[name] for name, parameter in modules.accepted(self.model, given).items()}
        try:
            with torch.no_grad():
                # Without tying: for a module with several names torch swaps the new weights in and not out again.
                output = torch.func.functional_call(self.model, changed or {}, (), kwargs, tie_weights=False)
        finally:
            for handle in handles:
                handle.remove()
        return {(s.point, s.layer): self._total(s, found) for s in self.selectors if self._seen(s, found)}, output

    def _reader(self, found: dict[tuple[Key, int], Tensor], selector: Selector, number: int) -> Callable[..., None]:
        term = selector.terms[number]
        calls: dict[tuple[Key, int], int] = {}

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            key = (selector.point, selector.layer), number
            calls[key] = calls.get(key, -1) + 1
            if term.call in (None, calls[key]):
                tensor = term.resolve(args, kwargs, output)
                found[key] = term.arrange(tensor, _BATCH, _POSITIONS).detach().clone()

        return hook

    def _numbers_of_blocks(self) -> dict[int, list[int]]:
        """Each block's module -> its numbers: several where it stands in the list several times."""
        found: dict[int, list[int]] = {}
        for number in range(self.map.num_layers):
            path = self.map.layers_path.replace("{i}", str(number))
            if self._has(path):
                found.setdefault(id(self.model.get_submodule(path)), []).append(number)
        return found

    def _ran(self, numbers: list[int]) -> Callable[..., None]:
        turns = itertools.cycle(numbers)

        def hook(*_: Any) -> None:
            self.sequence.append(next(turns))

        return hook

    def _event(self, path: str, side: str) -> Callable[..., None]:
        calls = itertools.count()

        def hook(*_: Any) -> None:
            self.events.append((path, side, next(calls)))

        return hook

    def _seen(self, selector: Selector, found: dict[tuple[Key, int], Tensor]) -> bool:
        return all(((selector.point, selector.layer), n) in found for n in range(len(selector.terms)))

    def _total(self, selector: Selector, found: dict[tuple[Key, int], Tensor]) -> Tensor:
        parts = [found[(selector.point, selector.layer), n] * t.scale for n, t in enumerate(selector.terms)]
        if len(shapes := {tuple(part.shape) for part in parts}) > 1:
            raise CaptureError(f"{selector} is no sum: its tensors have the shapes {sorted(map(list, shapes))}.")
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    # Checks -----------------------------------------------------------------------------------------------------

    def _shapes(self, values: dict[Key, Tensor]) -> Check:
        wrong = [f"{s} was not reached" for s in self.selectors if (s.point, s.layer) not in values]
        for (point, layer), tensor in values.items():
            if tuple(tensor.shape[:2]) != (_BATCH, _POSITIONS):
                wrong.append(f"{point}[{layer}] has shape {list(tensor.shape)}, expected [{_BATCH}, {_POSITIONS}, …]")
        widths = {tensor.shape[-1] for (point, _), tensor in values.items() if point.startswith("resid_")}
        if len(widths) > 1:
            wrong.append(f"the residual stream has several widths: {sorted(widths)}")
        return Check("shapes", (), not wrong, "; ".join(wrong[:5]) or f"{len(values)} tensors are [batch, pos, d]")

    def _order(self) -> Check:
        """The promised order is the order in which the boundaries were crossed."""
        place = {event: number for number, event in reversed(list(enumerate(self.events)))}
        wrong, last, last_name = [], -1, ""
        for selector in self.selectors:
            here = max(place.get((term.module, term.side, term.call or 0), -1) for term in selector.terms)
            if here < last:
                wrong.append(f"{selector.point}[{selector.layer}] comes before {last_name}")
            last, last_name = max(last, here), f"{selector.point}[{selector.layer}]"
        detail = "; ".join(wrong[:5]) or f"{len(self.selectors)} selectors are in the order of the forward pass"
        return Check("order", (), not wrong, detail)

    def _hidden_states(self, values: dict[Key, Tensor], output: Any) -> Iterator[Check]:
        """`resid_pre` is Hugging Face's `hidden_states[i]`; some models record after the block instead."""
        states = getattr(output, "hidden_states", None)
        layers = sorted(layer for point, layer in values if point == "resid_pre" and layer is not None)
        if not hasattr(output, "hidden_states"):
            return  # a module that promises none
        if not states or not layers:
            yield Check("hidden_states", (), not layers, "the model returns no hidden states to compare with")
            return
        if self.map.left_out and len(states) > self.map.num_layers + 1:
            yield self._among(values, [self._like(state) for state in states], layers)
            return
        # A layer that is not called records nothing, one that runs twice does twice: the k-th state is of the k-th run.
        places = {i: self.sequence.index(i) for i in layers if i in self.sequence}
        recorded = {i: states[place] for i, place in places.items() if place < len(states)}
        following = dict(zip(layers, [*layers[1:], None], strict=True))
        before = [
            min(self._error(values.get(key), self._like(state)) for key in self._handed(i))
            for i, state in recorded.items()
        ]
        after = [
            self._error(values.get(("resid_pre", following[i]), values.get(("resid_post", i))), self._like(state))
            for i, state in recorded.items()
        ]
        recorded_after = max(before) > self.tolerance and max(after) <= self.tolerance
        errors, point = (after, "resid_pre[i + 1]") if recorded_after else (before, "resid_pre[i]")
        wrong = [i for i, error in zip(layers, errors, strict=False) if error > self.tolerance]
        detail = f"{point} differs from hidden_states[i] on layers {wrong}" if wrong else f"{point} = hidden_states[i]"
        if recorded_after:
            detail += " (this model records them after the block)"
        yield Check("hidden_states", tuple(layers), not wrong, detail, max(errors))

    def _handed(self, layer: int) -> list[Key]:
        """What a layer reads; and, where it begins or ends a loop, in which something may be added, what it was given.

        The points are of the first time that a layer runs.
        """
        place = self.sequence.index(layer)
        last = self.sequence[place - 1] if place else layer
        loop = self.map.kind_of(layer).calls != self.map.kind_of(last).calls and last not in self.sequence[: place - 1]
        return [("resid_pre", layer), *([("resid_post", last)] if loop else [])]

    def _among(self, values: dict[Key, Tensor], states: list[Tensor], layers: list[int]) -> Check:
        """A model of several lists of blocks records the streams of all of them, one behind the other.

        Before the blocks, or after them: then the last state is after the final norm.
        """
        for point, own in (("resid_pre", layers), ("resid_post", layers[:-1])):
            errors = [[self._error(values[point, i], state) for state in states] for i in own]
            places = [row.index(min(row)) for row in errors]
            worst = max(map(min, errors))
            if worst <= self.tolerance and places == list(range(places[0], places[0] + len(own))):
                detail = f"{point}[i] = hidden_states[i + {places[0]}] (the model records several lists of blocks)"
                return Check("hidden_states", tuple(own), True, detail, worst)
        return Check("hidden_states", tuple(layers), False, "the layers' streams are not among the hidden_states")

    def _ends(self, values: dict[Key, Tensor], output: Any) -> Iterator[Check]:
        """The embedding, the hand-over from block to block, and the logits."""
        if ("embed", None) in values and self.embedding is not None:
            with torch.no_grad():
                expected = self.embedding(self.ids)
            yield self._equal("embed", (), "embed = the input embedding's output", values["embed", None], expected)
        if ("logits", None) in values and getattr(output, "logits", None) is not None:
            yield self._equal("logits", (), "logits = the model's logits", values["logits", None], output.logits)
        pairs = [
            i
            for i in range(self.map.num_layers - 1)
            if ("resid_post", i) in values
            and ("resid_pre", i + 1) in values
            # A layer behind a loop is handed what the loop's last round made, and the points are of the first.
            and self.map.kind_of(i).calls == self.map.kind_of(i + 1).calls
        ]
        scaled = {i: _ratio(values["resid_pre", i + 1], values["resid_post", i]) for i in pairs}
        errors = [self._error(values["resid_post", i] * scaled[i], values["resid_pre", i + 1]) for i in pairs]
        between = sorted({f"{ratio:g} times" for ratio in scaled.values() if ratio != 1.0})
        detail = "resid_pre[i + 1] = resid_post[i]" + (f", or {', '.join(between)} it" if between else "")
        if pairs and not self.map.joined:
            detail = "the model adds to the stream between blocks: resid_pre[i + 1] is not resid_post[i]"
            yield Check("hand-over", tuple(pairs), min(errors) > self.tolerance, detail)
        elif pairs:
            yield Check("hand-over", tuple(pairs), max(errors) <= self.tolerance, detail, max(errors))

    def _final_norm(self, values: dict[Key, Tensor], output: Any) -> Iterator[Check]:
        """Hugging Face's last hidden state; where that is of another place, what the norm makes of the last stream."""
        if (found := values.get(("final_norm", None))) is None:
            return
        last, norm = values.get(("resid_post", self.map.num_layers - 1)), self.map.final_norm_path
        states = getattr(output, "hidden_states", None) or ()
        error = self._error(found, self._like(states[-1])) if states else float("inf")
        detail = "final_norm = hidden_states[-1]"
        if last is not None and norm and (error > self.tolerance or self._error(last, found) <= self.tolerance):
            streams = last.shape != found.shape  # which are mixed into one before the norm
            with torch.no_grad():
                if streams and (base := getattr(self.model, "base_model", None)) is not None:
                    error = self._error(found, self._like(base(self.ids).last_hidden_state))
                else:
                    error = self._error(found, self.model.get_submodule(norm)(last))
            detail = "final_norm = last_hidden_state" if streams else f"final_norm = {norm}(resid_post[-1])"
        yield Check("final_norm", (), error <= self.tolerance, detail, error)

    def _second_names(self, values: dict[Key, Tensor]) -> Iterator[Check]:
        """`attn_in` is `mixer_in` where the mixer is attention; `resid_mid` is `mlp_in` where no norm is between."""
        post = [layer for kind in self.map.kinds if kind.norm_placement == "post" for layer in kind.layers]
        names = {point: first for point, _ in values if (first := PointName.of(point).as_mixer()) != point}
        for point, first in (*sorted(names.items()), ("resid_mid", "mlp_in")):
            layers = [i for name, i in values if i is not None and name == point and (point in names or i in post)]
            errors = [self._error(values.get((first, i)), values[point, i]) for i in layers]
            if errors:
                within = max(errors) <= self.tolerance
                yield Check("name", tuple(layers), within, f"{point} = {first}", max(errors))

    def _causes(self, values: dict[Key, Tensor]) -> Iterator[Check]:
        """Change the weights of one branch of one layer: what comes after it moves, what does not is untouched."""
        for kind in self.map.kinds:
            for layer in dict.fromkeys((kind.layers[0], kind.layers[-1])):
                for role in ("mixer", "mlp"):
                    expected = _expected(kind, role)
                    names = self._weights(kind, role, layer)
                    if not expected or not names:
                        continue
                    moved_values, _ = self._run(self._changed(names))
                    yield self._cause(values, moved_values, kind, layer, role, expected)

    def _weights(self, kind: BlockKind, role: str, layer: int) -> list[str]:
        branch = kind.mixer if role == "mixer" else kind.mlp
        paths = [path.replace("{i}", str(layer)) for path in (branch.modules if branch else ())]
        parameters = dict(self.model.named_parameters())
        # A pre-norm inside the branch's module (Reformer) makes what the branch reads: its weights are not the branch.
        own = {t.module.replace("{i}", str(layer)) for t in _terms(kind, f"{role}_in") if t.side == "output"}
        other = kind.mlp if role == "mixer" else kind.mixer  # a module of both tells neither apart
        own |= {path.replace("{i}", str(layer)) for path in (other.modules if other else ())}
        return [
            name
            for name, parameter in parameters.items()
            if parameter.dtype.is_floating_point
            and not parameter.is_meta  # offloaded: what runs is another tensor
            and any(name.startswith(path + ".") for path in paths)
            and not any(name.startswith(path + ".") for path in own)
        ]

    def _changed(self, names: list[str]) -> dict[str, Tensor]:
        parameters = dict(self.model.named_parameters())
        return {name: (parameters[name] * 1.5 + 0.01).detach() for name in names}

    def _cause(
        self,
        before: dict[Key, Tensor],
        after: dict[Key, Tensor],
        kind: BlockKind,
        layer: int,
        role: str,
        expected: dict[str, bool],
    ) -> Check:
        wrong, said = [], []
        for point, should_move in expected.items():
            if (point, layer) not in before or (point, layer) not in after:
                continue
            moved = self._error(after[point, layer], before[point, layer]) > self.tolerance
            said.append(f"{point} {'moves' if should_move else 'stays'}")
            if moved != should_move:
                wrong.append(f"{point} {'moved' if moved else 'did not move'}")
        what = "mixer" if role == "mixer" else "MLP"
        detail = f"other {what} weights in layer {layer}: " + (", ".join(wrong or said))
        return Check("cause", (layer,), not wrong, detail)

    def _equal(self, name: str, layers: tuple[int, ...], detail: str, found: Tensor, expected: Tensor) -> Check:
        error = self._error(found, expected)
        return Check(name, layers, error <= self.tolerance, detail, error)

    def _like(self, state: Tensor) -> Tensor:
        """A recorded hidden state as [batch, pos, ...], also of a model that keeps its stream in another order."""
        lengths = list(state.shape)
        if lengths[:2] == [_BATCH, _POSITIONS] or _BATCH not in lengths or _POSITIONS not in lengths:
            return state
        return state.movedim((lengths.index(_BATCH), lengths.index(_POSITIONS)), (0, 1))

    def _error(self, found: Tensor | None, expected: Tensor) -> float:
        if found is None or found.shape != expected.shape:
            return float("inf")
        found, expected = found.float(), expected.float()
        scale = expected.square().mean().sqrt().clamp_min(1e-12)
        error = float(((found - expected).abs().max() / scale).item())
        return error if error == error else float("inf")


def _input_embedding(found: ArchitectureMap, model: nn.Module) -> nn.Module | None:
    """The model's own word for it; where it has none, the module that the map names."""
    if hasattr(model, "get_input_embeddings"):
        return model.get_input_embeddings()  # type: ignore[no-any-return,operator]
    try:
        return None if found.embedding_path is None else model.get_submodule(found.embedding_path)
    except AttributeError:
        return None


def _expected(kind: BlockKind, role: str) -> dict[str, bool]:
    """What must move, and what must not, when the weights of a branch change."""
    if kind.branch_order == "sequential":
        if "mlp_in" in kind.points and kind.points["mlp_in"].order < kind.points["resid_mid"].order:
            moves = ("mixer_out", "resid_mid") if role == "mixer" else ("mlp_out",)  # an MLP before the mixer too
            return {"resid_pre": False, **dict.fromkeys((*moves, "resid_post"), True)}
        if role == "mixer":
            return {"resid_pre": False, "mixer_out": True, "resid_mid": True, "mlp_in": True, "resid_post": True}
        stay = dict.fromkeys(("resid_pre", "mixer_in", "mixer_out", "resid_mid"), False)
        return {**stay, "mlp_out": True, "resid_post": True}
    if kind.branch_order == "parallel":
        own, other = (role, "mlp" if role == "mixer" else "mixer")
        return {"resid_pre": False, f"{other}_out": False, f"{own}_out": True, "resid_post": True}
    if kind.branch_order in ("mixer_only", "mlp_only"):
        return {"resid_pre": False, f"{role}_in": False, f"{role}_out": True, "resid_post": True}
    return {}


def _ratio(after: Tensor, before: Tensor) -> float:
    """The constant that a model multiplies the stream by between two blocks (RWKV halves it); 1 where it does not."""
    if after.shape != before.shape:
        return 1.0
    ratio = float((after * before).sum() / before.square().sum().clamp_min(1e-12))
    return next((power for power in (0.5, 0.25, 2.0) if abs(ratio / power - 1) < 1e-5), 1.0)


def _terms(kind: BlockKind, point: str) -> tuple[TermTemplate, ...]:
    return kind.points[point].terms if point in kind.points else ()
