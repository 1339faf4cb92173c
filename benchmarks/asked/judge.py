"""Whether a program's tensor is the one that its name says, by plain hooks and the block's sums."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from askers import POINTS, Said
from reference import Branch, Layer, Reference
from watched import close

SUPPORTED, UNAVAILABLE, ERROR, WRONG, UNJUDGED = "SUPPORTED", "UNAVAILABLE", "ERROR", "SILENTLY WRONG", "NOT JUDGED"
SAME = 1e-4
"""of the largest number: a program may compute attention itself, and adds in another order then"""
OTHER = 1e-3
"""what is another tensor differs by this at least"""

_REFUSES = re.compile(r"support|recogni[sz]e|Unrecognized|Could not (locate|find)|multimodal model", re.I)
"""in what a program says when it loads a model: it does not take this one"""


@dataclass(frozen=True)
class Verdict:
    state: str
    note: str = ""


RIGHT = Verdict(SUPPORTED)


def judged(reference: Reference, said: Said) -> dict[str, Verdict]:
    """Point -> the verdict over its layers: wrong in one is wrong; else right in one is right."""
    if "load" in said.failed or "load" in said.refused:
        why = said.failed.get("load") or said.refused["load"]
        return dict.fromkeys(POINTS, Verdict(UNAVAILABLE if _REFUSES.search(why) else ERROR, why))
    found = {"logits": _one(reference, said, "logits", None)}
    for point in POINTS[1:]:
        verdicts = [_one(reference, said, point, layer) for layer in reference.layers]
        order = (WRONG, SUPPORTED, UNJUDGED, ERROR, UNAVAILABLE)
        found[point] = min(
            verdicts, key=lambda each: (order.index(each.state), not each.note), default=Verdict(UNJUDGED)
        )
    return found


def _one(reference: Reference, said: Said, point: str, layer: int | None) -> Verdict:
    key = point if layer is None else f"{point} {layer}"
    if key in said.tensors:
        tensor = said.tensors[key]
        if layer is None:
            return _held(tensor, reference.logits, "transformers' logits")
        if not torch.isfinite(tensor).all() and point != "attn_scores":
            return Verdict(WRONG, "numbers that are not finite")
        # A model may have positions of its own: both their rows and the tokens' rows alone are an answer.
        both = reference.layers, reference.whole
        ways = [Judge(reference, said, layers, layer).of(point, tensor) for layers in both]
        return next((verdict for verdict in ways if verdict.state == SUPPORTED), ways[0])
    if key in said.failed:
        return Verdict(ERROR, said.failed[key])
    return Verdict(UNAVAILABLE, said.refused.get(key, "it has no name for it"))


def _held(found: torch.Tensor, expected: torch.Tensor, what: str, note: str = "") -> Verdict:
    if close(in_order(found, expected), expected, SAME):
        return Verdict(SUPPORTED, note)
    if found.numel() != expected.numel():
        return Verdict(WRONG, f"another size than {what}: {list(found.shape)}, not {list(expected.shape)}")
    apart = float((found.flatten() - expected.flatten()).abs().max() / expected.abs().max())
    if apart < OTHER:
        return Verdict(UNJUDGED, f"{apart:.0e} from {what}: rounding, or not")
    return Verdict(WRONG, f"{apart:.2g} from {what}")


def in_order(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of several streams: its axes in the order of the other's, where their lengths are all different."""
    ours, theirs = list(found.shape), list(expected.shape)
    if found.ndim < 4 or ours == theirs or sorted(ours) != sorted(theirs) or len(set(ours)) < len(ours):
        return found
    return found.permute([ours.index(length) for length in theirs])


class Judge:
    """One layer's tensors."""

    def __init__(self, reference: Reference, said: Said, layers: dict[int, Layer], number: int) -> None:
        self.reference, self.said, self.number = reference, said, number
        self.layer = layers[number]

    def of(self, point: str, tensor: torch.Tensor) -> Verdict:
        ways: dict[str, Callable[[torch.Tensor], Verdict]] = {
            "resid_pre": lambda t: _held(t, self.layer.pre, "the block's input"),
            "resid_post": lambda t: _held(t, self.layer.post, "the block's output"),
            "resid_mid": self._middle,
            "mixer_out": lambda t: self._adds(t, self.layer.mixer, "mlp_out"),
            "mlp_out": lambda t: self._adds(t, self.layer.mlp, "mixer_out"),
            "mixer_out_raw": lambda t: self._gives(t, self.layer.mixer),
            "mlp_out_raw": lambda t: self._gives(t, self.layer.mlp),
            "pattern": self._pattern,
            "attn_scores": self._scores,
            "z": self._z,
            "attn_result": self._results,
        }
        return ways[point](tensor) if point in ways else self._projection(point, tensor)

    def _said(self, point: str) -> torch.Tensor | None:
        return self.said.tensors.get(f"{point} {self.number}")

    def _middle(self, tensor: torch.Tensor) -> Verdict:
        path, side = self.layer.mid_at or ("", "")
        if side == "output" and close(tensor, self.reference.run.calls[path][0].given[0], SAME):
            return Verdict(SUPPORTED, "before the norm on the stream")
        if self.layer.mid is not None:
            return _held(tensor, self.layer.mid, "the stream plus what the mixer adds")
        mixer, mlp = self._said("mixer_out"), self._said("mlp_out")
        if mixer is not None and mlp is not None and mixer.numel() == mlp.numel() == tensor.numel():
            pre, post = self.layer.pre.flatten(), self.layer.post.flatten()
            middle = tensor.flatten()
            if close(middle, pre + mixer.flatten(), SAME) and close(middle + mlp.flatten(), post, SAME):
                return Verdict(SUPPORTED, "by its own sums")
        if self.layer.mixer is not None and self.layer.mlp is not None:
            return _held(tensor, self.layer.pre + self.layer.mixer.adds, "the stream plus what the mixer adds")
        return Verdict(UNJUDGED, "no sum of two of the block's tensors is what it adds")

    def _adds(self, tensor: torch.Tensor, branch: Branch | None, other: str) -> Verdict:
        if branch is not None:
            verdict = _held(tensor, branch.adds, "what the branch adds")
            if verdict.state == WRONG and any(close(tensor, raw, SAME) for raw in branch.raw):
                return Verdict(WRONG, "what its module gives, not what is added to the stream")
            return verdict
        rest, added = self._said(other), self.layer.post - self.layer.pre
        fits = rest is not None and rest.numel() == tensor.numel() == added.numel()
        if fits and close(tensor.flatten() + rest.flatten(), added, SAME):  # type: ignore[union-attr]
            return Verdict(SUPPORTED, "by its own sums")
        return Verdict(UNJUDGED, "no sum of two of the block's tensors is what it adds")

    def _gives(self, tensor: torch.Tensor, branch: Branch | None) -> Verdict:
        if branch is None:
            return Verdict(UNJUDGED, "no sum of two of the block's tensors is what it adds")
        if any(close(tensor, raw, SAME) for raw in branch.raw[:1] + branch.raw[2:]):
            return RIGHT
        if len(branch.raw) > 1 and close(tensor, branch.raw[1], SAME):
            return Verdict(SUPPORTED, "as the branch's module gives it")
        if close(tensor, self.layer.post, SAME):
            return Verdict(WRONG, "the stream behind the block")
        if self.layer.heads is not None and close(tensor, self.layer.heads[1], SAME):
            return Verdict(WRONG, "what the heads give, before the output projection")
        return _held(tensor, branch.raw[0], "what the branch's module gives")

    def _pattern(self, tensor: torch.Tensor) -> Verdict:
        seen = [out for _, out in self.reference.attention(self.number)]
        if not seen:
            return Verdict(UNJUDGED, "no softmax is seen in the block")
        keys = tensor.shape[-1]
        if any(close(tensor, out[..., :keys], SAME) for out in seen if out.shape[-1] >= keys):
            return RIGHT
        if any(close(tensor.flatten(0, -3), out[..., :keys].flatten(0, -3), SAME) for out in seen):
            return RIGHT
        return _held(tensor, seen[-1], "the softmax in the block")

    def _scores(self, tensor: torch.Tensor) -> Verdict:
        """Up to a number of each row, which softmax does not see, and where the weight is not nothing."""
        seen = [pair for pair in self.reference.attention(self.number) if pair[1].numel() == tensor.numel()]
        for read, out in seen:
            found = tensor.reshape(out.shape)
            there = out > 1e-9
            apart = torch.where(there, found - read, 0.0)
            mean = apart.sum(-1, keepdim=True) / there.sum(-1, keepdim=True)
            size = torch.where(there, read, 0.0).abs().max()
            if torch.where(there, apart - mean, 0.0).abs().max() <= SAME * size:
                return RIGHT
            if close(found, out, SAME):
                return Verdict(WRONG, "the weights after the softmax, not the scores")
        return (
            Verdict(WRONG, "not what the softmax reads")
            if seen
            else Verdict(UNJUDGED, "no softmax is seen in the block")
        )

    def _z(self, tensor: torch.Tensor) -> Verdict:
        if self.layer.heads is None:
            return Verdict(UNJUDGED, "no output projection is found")
        heads, positions = self._heads(), len(self.reference.tokens)
        if tensor.ndim == 4 and tensor.shape[1:3] == (heads, positions):  # the heads before the positions
            tensor = tensor.transpose(1, 2)
        verdict = _held(tensor, self.layer.heads[1], "what the output projection reads")
        if verdict.state == SUPPORTED and tensor.ndim == 4 and heads and tensor.shape[2] != heads:
            return Verdict(WRONG, f"cut into {tensor.shape[2]} heads, and there are {heads}")
        return verdict

    def _heads(self) -> int:
        seen = self.reference.attention(self.number)
        return seen[-1][1].shape[1] if seen else 0

    def _results(self, tensor: torch.Tensor) -> Verdict:
        if self.layer.heads is None or tensor.ndim < 3:
            return Verdict(UNJUDGED, "no output projection is found")
        path, _, given = self.layer.heads
        bias = getattr(self.reference.model.get_submodule(path), "bias", None)
        total = tensor.reshape(-1, *tensor.shape[-2:]).sum(-2)
        without = given - bias.detach() if bias is not None else given
        if not close(total, without, SAME):
            return _held(total, given, "what the output projection gives, summed over heads")
        heads = self._heads()
        return (
            RIGHT
            if not heads or tensor.shape[-2] == heads
            else Verdict(WRONG, f"{tensor.shape[-2]} heads, not {heads}")
        )

    def _projection(self, point: str, tensor: torch.Tensor) -> Verdict:
        """Found, feature by feature, in what a module gives; there the sign of its last head is turned."""
        if not self.reference.attention(self.number):
            return Verdict(UNJUDGED, "no softmax is seen in the block")
        positions = len(self.reference.tokens)
        rows = tensor.reshape(positions, -1)
        heads = tensor.shape[-2] if tensor.ndim == 4 else 1
        if point == "v" and self._makes_z(tensor):
            return RIGHT
        found = self.reference.located(self.number, rows)
        if found is None:
            return Verdict(UNJUDGED, "no module gives it")
        path, columns = found
        last = columns[-(len(columns) // heads) :]
        role, changed = self.reference.role(self.number, path, last)
        if role != point and point == "v" and self.layer.heads is None:  # in some models values are in the mask, too
            return Verdict(UNJUDGED, f"turning its sign acts as {role}, and no output projection is found")
        if role != point:
            return Verdict(WRONG if role in "qkv" else UNJUDGED, f"turning its sign acts as {role}")
        every = self._heads()
        # Heads share one of these side by side, or every n-th of them does.
        shared = [list(range(every - every // heads, every)), list(range(heads - 1, every, heads))]
        if heads > 1 and changed and every % heads == 0 and changed not in shared:
            return Verdict(WRONG, f"its last head acts on heads {changed} of {every}")
        return RIGHT

    def _makes_z(self, values: torch.Tensor) -> bool:
        """Whether the weights times these, each as often as queries share it, are `z`."""
        weights, z = self.reference.attention(self.number)[-1][1], self.layer.heads and self.layer.heads[1]
        if z is None or values.ndim != 4 or weights.shape[1] % values.shape[2] or weights.shape[-1] != values.shape[1]:
            return False
        each = values.repeat_interleave(weights.shape[1] // values.shape[2], dim=2)
        return close(torch.einsum("bhqk,bkhd->bqhd", weights, each), z, SAME)
