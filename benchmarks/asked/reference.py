"""One model by plain PyTorch: what its modules read and give, and what the sums of its blocks say. No hookmap.

A hook on every module keeps its tensors; a function mode keeps every softmax. Then, by numbers alone and without a
name of any module: the list of blocks is the one whose entries hand the stream on, and, where transformers tells
`hidden_states`, hand on these; a branch is a tensor that some module gives and that is, times a constant, what a block
adds (or one of two that together are); the mixer is the branch that moves information between positions.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from watched import SUM, Call, Change, Run, close, is_linear

MOST = 60
"""the most tensors among which a sum of two is looked for"""


@dataclass(frozen=True)
class Branch:
    """What one branch adds: a module's output, times a constant."""

    path: str
    scale: float
    adds: torch.Tensor
    raw: tuple[torch.Tensor, ...]
    """what the branch's module gives, before a norm or factor behind it"""


@dataclass
class Layer:
    path: str
    pre: torch.Tensor
    post: torch.Tensor
    mixer: Branch | None = None
    mlp: Branch | None = None
    mid: torch.Tensor | None = None
    mid_at: tuple[str, str] | None = None
    """a module that reads or gives it, and its side"""
    heads: tuple[str, torch.Tensor, torch.Tensor] | None = None
    """the output projection's path, what it reads and what it gives"""


class Reference:
    """What plain hooks say of a model. `layers` is empty where no list of blocks hands the stream on."""

    def __init__(self, model: nn.Module, tokens: list[int]) -> None:
        self.model, self.tokens = model, tokens
        self.run = Run(model, tokens)
        self.logits = self.run.output.logits.float()
        self._told = self.run.output.get("hidden_states") or self.run.output.get("decoder_hidden_states") or ()
        self.list, self.as_recorded = self._blocks()
        self.whole = {n: self._layer(f"{self.list}.{n}") for n in self._chosen()}
        """with the positions of a model's own"""
        self.layers = {n: self._of_tokens(layer) for n, layer in self.whole.items()}

    def _chosen(self) -> list[int]:
        """The first and the last layer of each make: made of the same classes of modules."""
        blocks = self.model.get_submodule(self.list) if self.list else ()
        return sorted({n for layers in makes(blocks) for n in (layers[0], layers[-1])})

    def _blocks(self) -> tuple[str, bool]:
        """The path of the list of blocks, and whether transformers' `hidden_states` are what each of them reads."""
        scores: dict[str, tuple[int, bool]] = {}
        for path, module in self.model.named_modules():
            blocks = len(module) if isinstance(module, nn.ModuleList) else 0
            calls = [call for n in range(blocks) if (call := self.run.once(f"{path}.{n}")) is not None]
            if not calls or len(calls) < blocks or self._rows(calls[0].given[0]) is None:
                continue
            handed = sum(close(b.given[0], a.gives[0]) for a, b in pairwise(calls))
            told = [self._narrowed(call.given[0]) for call in calls]
            same = sum(close(a, state) for a, state in zip(told, self._told, strict=False))
            if handed + same and self._reaches_logits(f"{path}.{blocks - 1}"):
                scores[path] = (same + handed, same == len(calls))
        best = max(scores, key=lambda path: scores[path][0], default="")
        return best, best != "" and scores[best][1]

    def _rows(self, stream: torch.Tensor) -> slice | None:
        """The positions of a stream that are those of the tokens: a model may add positions of its own.

        Then they are those that transformers records. None where the stream has other positions than the tokens.
        """
        n = len(self.tokens)
        if n in stream.shape:
            return slice(None)
        for start in range(max(0, stream.shape[1] - n + 1) if stream.ndim == 3 else 0):
            if any(close(stream[:, start : start + n], state) for state in self._told):
                return slice(start, start + n)
        return None

    def _narrowed(self, tensor: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
        """The tokens' rows of a tensor; `like`: the stream whose positions it has, itself where that is not given."""
        stream = tensor if like is None else like
        rows = self._rows(stream) or slice(None)
        return tensor[:, rows] if tensor.shape[:2] == stream.shape[:2] else tensor

    def _of_tokens(self, layer: Layer) -> Layer:
        """The layer with the tokens' rows alone, where the stream has positions of its own."""
        if layer.pre.ndim < 3 or layer.pre.shape[1] == len(self.tokens) or layer.pre.shape != layer.post.shape:
            return layer

        def own(tensor: torch.Tensor) -> torch.Tensor:
            return self._narrowed(tensor, layer.pre)

        def branch(whole: Branch | None) -> Branch | None:
            return whole and replace(whole, adds=own(whole.adds), raw=tuple(map(own, whole.raw)))

        mid, heads = layer.mid, layer.heads
        return replace(
            layer,
            pre=own(layer.pre),
            post=own(layer.post),
            mixer=branch(layer.mixer),
            mlp=branch(layer.mlp),
            mid=None if mid is None else own(mid),
            heads=heads and (heads[0], own(heads[1]), own(heads[2])),
        )

    def _reaches_logits(self, path: str) -> bool:
        """Whether the logits depend on what the module reads."""
        run = Run(self.model, self.tokens, {(path, "input"): lambda rows: rows * 1.5 + rows.abs().mean()})
        return not close(run.output.logits.float(), self.logits, 1e-6)

    def _layer(self, path: str) -> Layer:
        call = self.run.once(path)
        assert call is not None
        layer = Layer(path, call.given[0], call.gives[0])
        if layer.pre.shape != layer.post.shape:
            return layer
        self._find_branches(layer)
        if layer.mixer is not None:
            layer.heads = self._projection(layer.mixer, path)
        return layer

    def _inside(self, layer: str) -> dict[str, Call]:
        paths = [path for path in self.run.calls if path.startswith(f"{layer}.")]
        return {path: call for path in paths if (call := self.run.once(path)) is not None}

    def _find_branches(self, layer: Layer) -> None:
        """The branches where the stream is a sum; or, of a post-norm block, two sums with a norm behind each."""
        inside = self._inside(layer.path)
        given = {path: call.gives[0] for path, call in inside.items() if call.gives[0].numel() == layer.pre.numel()}
        if (found := addends(layer.post - layer.pre, given, layer.post)) is not None:
            self._told_apart(layer, found, inside)
            return
        fitting = {path: call for path, call in inside.items() if _fits(call, layer)}
        for norm, call in fitting.items():
            one = addends(call.given[0].flatten() - layer.pre.flatten(), given, call.given[0], most=1)
            if not one or _leads_to(norm, one[0][0]):
                continue
            for last, other in fitting.items():
                if last == norm or not close(other.gives[0], layer.post):
                    continue
                two = addends(other.given[0].flatten() - call.gives[0].flatten(), given, other.given[0], most=1)
                if two and two[0][0] != one[0][0]:
                    layer.mixer, layer.mlp = self._branch(*one[0], layer.path), self._branch(*two[0], layer.path)
                    layer.mid, layer.mid_at = call.gives[0], (norm, "output")
                    return

    def _told_apart(self, layer: Layer, found: list[tuple[str, float]], inside: dict[str, Call]) -> None:
        """Which of one or two branches is the mixer: the first that a change at position 0 reaches elsewhere."""
        noise = torch.randn(layer.pre.shape[2:], generator=torch.Generator().manual_seed(0))

        def change(rows: torch.Tensor) -> torch.Tensor:
            new = rows.clone()
            new[:, 0] += noise * rows.abs().mean()
            return new

        other = Run(self.model, self.tokens, {(layer.path, "input"): change})
        order = list(self.run.calls)
        moved = {}
        for path, scale in sorted(found, key=lambda each: order.index(each[0])):
            call, again = self.run.once(path), other.once(path)
            rows = [each.gives[0].reshape(layer.pre.shape)[:, 1:] for each in (call, again) if each is not None]
            moved[path, scale] = len(rows) == 2 and not close(rows[1], rows[0], 1e-6)
        mixer = next((each for each, moves in moved.items() if moves), None)
        if mixer is not None and len(moved) == 1 and not self._mixes(layer, mixer[0], change):
            mixer = None  # what it reads was mixed elsewhere, and does not go into this sum
        if mixer is not None:
            layer.mixer = self._branch(*mixer, layer.path)
        rest = [each for each in moved if each != mixer]
        if rest:
            layer.mlp = self._branch(*rest[0], layer.path)
        if layer.mixer is None or layer.mlp is None:
            return
        middle = layer.pre + layer.mixer.adds
        reading = [path for path, call in inside.items() if call.given and close(call.given[0], middle)]
        if reading:
            layer.mid, layer.mid_at = middle, (reading[0], "input")

    def _mixes(self, layer: Layer, path: str, change: Change) -> bool:
        """Whether the part of the layer that holds a branch moves information between positions itself."""
        child = ".".join(path.split(".")[: len(layer.path.split(".")) + 1])
        call = self.run.once(child)
        if call is None or not call.given or call.given[0].shape != layer.pre.shape:
            return True  # it cannot be asked alone
        again = Run(self.model, self.tokens, {(child, "input"): change}).once(child)
        return again is None or not close(again.gives[0][:, 1:], call.gives[0][:, 1:], 1e-6)

    def _branch(self, path: str, scale: float, layer: str) -> Branch:
        call = self.run.once(path)
        assert call is not None
        child = ".".join(path.split(".")[: len(layer.split(".")) + 1])
        whole = self.run.once(child)
        raw = [call.gives[0], *([whole.gives[0]] if whole is not None else [])]
        if path == child:  # a norm, or a module of one child: what it reads was given by the branch
            raw.append(call.given[0])
        return Branch(path, scale, call.gives[0] * scale, tuple(raw))

    def _projection(self, mixer: Branch, layer: str) -> tuple[str, torch.Tensor, torch.Tensor] | None:
        for path, call in self._inside(layer).items():
            given = any(close(call.gives[0], raw) for raw in mixer.raw)
            if given and is_linear(self.model.get_submodule(path)) and self._attends(path, layer):
                return path, call.given[0], call.gives[0]
        return None

    def _attends(self, path: str, layer: str) -> bool:
        """Whether a part of the layer with this module in it has its softmaxes; True where the layer has none."""
        parts = path[len(layer) + 1 :].split(".")
        above = (".".join([layer, *parts[:n]]) for n in range(1, len(parts)))
        return not self.run.softmax.get(layer) or any(self.run.softmax.get(each) for each in above)

    def attention(self, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The softmaxes in a layer that could be attention's."""
        n = len(self.tokens)
        seen = self.run.softmax.get(self.layers[number].path, [])
        return [(a, b) for a, b in seen if b.shape[-2] == n and b.shape[-1] >= n]

    def places(self) -> dict[str, dict[int, tuple[str, str, float]]]:
        """Point -> layer -> the module whose input or output it is, and the factor. For tools that read modules."""
        found: dict[str, dict[int, tuple[str, str, float]]] = {}
        for n, layer in self.layers.items():
            at: dict[str, tuple[str, str, float] | None] = {
                "resid_pre": (layer.path, "input", 1.0),
                "resid_post": (layer.path, "output", 1.0),
                "resid_mid": (*layer.mid_at, 1.0) if layer.mid_at else None,
                "mixer_out": (layer.mixer.path, "output", layer.mixer.scale) if layer.mixer else None,
                "mlp_out": (layer.mlp.path, "output", layer.mlp.scale) if layer.mlp else None,
                "z": (layer.heads[0], "input", 1.0) if layer.heads else None,
                **{name: (path, "output", 1.0) for name, path in self._projections(n).items()},
            }
            for point, place in at.items():
                if place is not None:
                    found.setdefault(point, {})[n] = place
        return found

    def _projections(self, number: int) -> dict[str, str]:
        """q, k and v, where each is what one linear module gives."""
        layer = self.layers[number]
        if layer.heads is None or not self.attention(number):
            return {}
        branch = layer.heads[0].rpartition(".")[0]
        roles: dict[str, str] = {}
        for path in self._inside(layer.path):
            if path.startswith(f"{branch}.") and path != layer.heads[0] and is_linear(self.model.get_submodule(path)):
                role = self.role(number, path, None)[0]
                if role in "qkv":
                    roles.setdefault(role, path)
        return roles

    def located(self, number: int, rows: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """A module of the layer, linear ones first, that gives each of these columns, and where: rows are positions."""
        inside = self._inside(self.layers[number].path)
        linear = {path: is_linear(self.model.get_submodule(path)) for path in inside}
        for path in sorted(inside, key=lambda each: not linear[each]):
            given = inside[path].gives[0]
            if given.shape[:2] != (1, len(rows)) or given[0, 0].numel() < rows.shape[1]:
                continue
            apart = torch.cdist(rows.T.double(), given.reshape(len(rows), -1).T.double())
            nearest = apart.min(-1)
            if nearest.values.max() <= 1e-4 * rows.norm(dim=0).max():
                return path, nearest.indices
        return None

    def role(self, number: int, path: str, columns: torch.Tensor | None) -> tuple[str, list[int]]:
        """q, k, v or another, and the heads that change: the sign of these columns, or all, is turned at a position."""
        layer, at = self.layers[number], len(self.tokens) // 2

        def turn(rows: torch.Tensor) -> torch.Tensor:
            new = rows.clone(memory_format=torch.contiguous_format)
            flat = new.view(len(self.tokens), -1)
            if columns is None:
                flat[at] *= -1
            else:
                flat[at, columns] *= -1
            return new

        run = Run(self.model, self.tokens, {(path, "output"): turn})
        before, after = (each.softmax[layer.path] for each in (self.run, run))
        n = len(self.tokens)
        moved = [(b[1] - a[1]).abs() for a, b in zip(before, after, strict=False) if a[1].shape[-2] == n]
        moved = [each for each in moved if each.max() > 1e-6]
        if moved:
            rows = moved[0].amax((0, 1, 3)) > 1e-6
            heads = (moved[0].amax((0, 2, 3)) > 1e-6).nonzero().flatten().tolist()
            only = bool(rows[at]) and int(rows.sum()) == 1
            return ("q" if only else "k" if bool(rows[at:].any()) and not bool(rows[:at].any()) else "other"), heads
        if layer.heads is None:
            return "other", []
        z = run.once(layer.heads[0])
        changed = z is not None and not close(z.given[0], layer.heads[1], 1e-6)
        return ("v" if changed else "other"), []


def makes(blocks: Any) -> list[list[int]]:
    """The layers of each make."""
    found: dict[Any, list[int]] = {}
    for n, block in enumerate(blocks):
        found.setdefault(tuple((path, type(module)) for path, module in block.named_modules()), []).append(n)
    return list(found.values())


def first_of_each_make(blocks: Any) -> list[int]:
    return [layers[0] for layers in makes(blocks)]


def addends(
    total: torch.Tensor, given: dict[str, torch.Tensor], near: torch.Tensor, most: int = 2
) -> list[tuple[str, float]] | None:
    """One or two of the tensors, with factors, that sum to `total`; None where there are none such."""
    paths: list[str] = []
    for path, tensor in given.items():
        if tensor.abs().max() > 0 and not any(close(tensor, given[other], 1e-7) for other in paths):
            paths.append(path)
    paths = paths[:MOST]
    if not paths:
        return None
    target = total.flatten().double()
    limit = SUM * float(near.abs().max())
    rows = torch.stack([given[path].flatten().double() for path in paths])
    gram, dots = rows @ rows.T, rows @ target
    for n, path in enumerate(paths):
        factor = float(dots[n] / gram[n, n])
        if (target - factor * rows[n]).abs().max() <= limit and target.abs().max() > 10 * limit:
            return [(path, _plain(factor))]
    found = []
    for a in range(len(paths) if most > 1 else 0):
        for b in range(a + 1, len(paths)):
            pair = torch.tensor([a, b])
            system = gram[pair][:, pair]
            if torch.linalg.det(system) <= 1e-9 * gram[a, a] * gram[b, b]:
                continue
            x, y = torch.linalg.solve(system, dots[pair]).tolist()
            if (target - x * rows[a] - y * rows[b]).abs().max() <= limit:
                found.append(((abs(x - 1) + abs(y - 1)), [(paths[a], _plain(x)), (paths[b], _plain(y))]))
    return min(found)[1] if found else None


def _plain(factor: float) -> float:
    return 1.0 if abs(factor - 1) < 1e-4 else factor


def _fits(call: Call, layer: Layer) -> bool:
    return call.given[0].numel() == layer.pre.numel() == call.gives[0].numel()


def _leads_to(path: str, other: str) -> bool:
    return path == other or other.startswith(f"{path}.")
