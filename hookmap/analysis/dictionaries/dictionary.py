"""A dictionary: features of activations, each a direction that is written where the feature is active."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch

from hookmap.activations import Key, key_of
from hookmap.analysis.dictionaries.writing import Writing
from hookmap.errors import SelectionError
from hookmap.stores.ledger import tensor_name
from hookmap.stores.sparse import CHUNK

Tensor = torch.Tensor
Activation = Literal["relu", "topk", "jumprelu", "threshold", "gated"]
Normalisation = Literal["none", "constant_norm_rescale", "layer_norm"]
_EPSILON = 1e-5
"""of SAELens's layer norm"""


@dataclass(frozen=True)
class About:
    """Where a dictionary was trained, as far as its files say."""

    point: str | None = None
    """the point that it reads"""
    layer: int | None = None
    point_out: str | None = None
    """the point that it writes: of a transcoder another one; None: the one that it reads"""
    layer_out: int | None = None
    model: str | None = None
    prepend_bos: bool | None = None
    """whether its texts began with the token that begins a sequence"""
    context: int | None = None
    """tokens of its texts"""
    skip: int = 0
    """tokens at the start of each text that it was not trained on"""
    program: str = ""
    """whose files they are"""
    kind: str = ""
    """what that program calls the architecture"""


@dataclass(frozen=True, eq=False)
class Dictionary(Writing):
    """Weights of one architecture, by whatever program; `encode` and `decode` are those of that program.

    An object of another library that has `encode` and `decode` works in its place: see `as_dictionary`.
    """

    encoder: Tensor
    """[d_in, features]"""
    decoder: Tensor
    """[features, d_out]"""
    encoder_bias: Tensor
    """[features]"""
    decoder_bias: Tensor
    """[d_out]"""
    activation: Activation = "relu"
    k: int | None = None
    """of topk"""
    threshold: Tensor | None = None
    """of jumprelu [features], or of all features []: what is not above it is 0"""
    input_bias: Tensor | None = None
    """[d_in], subtracted from what is read"""
    gate: Mapping[str, Tensor] = field(default_factory=dict)
    """of gated: `bias`, `magnitude` (a logarithm) and `magnitude_bias`, [features] each"""
    skip: Tensor | None = None
    """[d_out, d_in] of a skip transcoder: what is written without features"""
    normalisation: Normalisation = "none"
    """of each row before it is read, undone when it is written"""
    by_norms: bool = False
    """whether features are told in units of their decoder vectors' norms"""
    about: About = field(default_factory=About)

    def __post_init__(self) -> None:
        """Raises SelectionError for weights that do not fit together, all of them at once."""
        features = self.features
        shapes = {
            "encoder": (self.d_in, features),
            "decoder": (features, self.d_out),
            "encoder_bias": (features,),
            "decoder_bias": (self.d_out,),
            "input_bias": (self.d_in,),
            "skip": (self.d_out, self.d_in),
        }
        wrong = [
            f"{name} is {list(found.shape)}, expected {list(shape)}"
            for name, shape in shapes.items()
            if (found := getattr(self, name)) is not None and tuple(found.shape) != shape
        ]
        if self.threshold is not None and tuple(self.threshold.shape) not in ((), (features,)):
            wrong.append(f"threshold is {list(self.threshold.shape)}, expected [{features}]")
        wrong += [
            f"gate {name} is {list(t.shape)}, expected [{features}]"
            for name, t in self.gate.items()
            if tuple(t.shape) != (features,)
        ]
        if self.activation == "topk" and (self.k is None or not 0 < self.k <= features):
            wrong.append(f"k is {self.k}, expected 1 to {features}")
        if self.activation in ("jumprelu", "threshold") and self.threshold is None:
            wrong.append("a threshold is missing")
        if self.activation == "gated" and {*self.gate} != {"bias", "magnitude", "magnitude_bias"}:
            wrong.append("a gate is missing")
        tensors = self.tensors()
        wrong += [
            f"{name} holds an infinity or nan" for name, each in tensors.items() if not bool(each.isfinite().all())
        ]
        if wrong:
            raise SelectionError("the dictionary's weights do not fit: " + "; ".join(wrong) + ".")

    @property
    def d_in(self) -> int:
        return self.encoder.shape[0]

    @property
    def d_out(self) -> int:
        return self.decoder.shape[1]

    @property
    def features(self) -> int:
        """How many there are."""
        return self.encoder.shape[1]

    @property
    def reads(self) -> Key:
        """The point and layer that it reads. Raises SelectionError where its files do not say."""
        if self.about.point is None:
            raise SelectionError(
                "the dictionary's files do not say where it was trained: load_dictionary(…, point=POINT, layer=N)."
            )
        return key_of(self.about.point, self.about.layer)

    @property
    def writes(self) -> Key:
        """The point and layer that it writes: of a transcoder not those that it reads. Raises SelectionError."""
        if self.about.point_out is None:
            return self.reads
        return key_of(self.about.point_out, self.about.layer_out)

    @property
    def transcoder(self) -> bool:
        """Whether it writes another tensor than it reads."""
        return self.about.point_out is not None or self.skip is not None or self.d_in != self.d_out

    def encode(self, rows: Tensor) -> Tensor:
        """[…, d_in] -> […, features], in the dictionary's dtype. Raises SelectionError for another width."""
        read = self._normalised(self._checked(rows))[0]
        read = read if self.input_bias is None else read - self.input_bias
        before = read @ self.encoder
        norms = self.decoder.norm(dim=1) if self.by_norms else None
        if self.activation == "gated":
            size = torch.relu(before * self.gate["magnitude"].exp() + self.gate["magnitude_bias"])
            found = size * (before + self.gate["bias"] > 0)
        else:
            found = self._activated(before + self.encoder_bias, norms)
        return found if norms is None or self.activation == "topk" else found * norms

    def active(self, rows: Tensor) -> Tensor:
        """[n, d_in] -> [n, features], a sparse tensor (COO) of the active ones; a few rows are dense at a time.

        Raises SelectionError for another width.
        """
        step = max(1, CHUNK // self.features)
        return torch.cat([self.encode(part).to_sparse() for part in torch.split(rows, step)]).coalesce()

    def _activated(self, before: Tensor, norms: Tensor | None) -> Tensor:
        if self.activation == "relu":
            return torch.relu(before)
        if self.activation == "topk":
            assert self.k is not None
            best = (before if norms is None else before * norms).topk(self.k, dim=-1)
            return torch.zeros_like(before).scatter_(-1, best.indices, torch.relu(best.values))
        assert self.threshold is not None
        return torch.relu(before) * (before > self.threshold)

    def decode(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        """[…, features] -> […, d_out].

        rows: [..., d_in], what was encoded: needed where the rows are normalised, or some is written without features.
        Raises SelectionError where they are needed and not given, and for another number of features.
        """
        if features.shape[-1] != self.features:
            raise SelectionError(f"expected {self.features} features, got {features.shape[-1]}.")
        if rows is None and (self.normalisation != "none" or self.skip is not None):
            raise SelectionError("this dictionary's output depends on what it reads, too: decode(features, rows).")
        features = features.to(self.decoder.dtype)
        if self.by_norms:
            features = features / self.decoder.norm(dim=1)
        found = features @ self.decoder + self.decoder_bias
        if rows is None:
            return found
        rows = self._checked(rows)
        if self.normalisation != "none" and not self.transcoder:
            found = self._undone(found, rows)
        return found if self.skip is None else found + rows @ self.skip.T

    def reconstruct(self, rows: Tensor) -> Tensor:
        """What it writes for rows: `decode(encode(rows), rows)`, [..., d_out]."""
        return self.decode(self.encode(rows), rows)

    def _checked(self, rows: Tensor) -> Tensor:
        if rows.shape[-1] != self.d_in:
            where = "" if self.about.point is None else f", as {tensor_name(self.reads)} of its model"
            raise SelectionError(
                f"the dictionary reads rows of {self.d_in} numbers{where}, got {rows.shape[-1]}: it is of another "
                "model or point."
            )
        return rows.to(self.encoder.dtype)

    def _normalised(self, rows: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The rows as they are read, and what undoes it: a factor and a summand."""
        if self.normalisation == "constant_norm_rescale":
            factor = rows.norm(dim=-1, keepdim=True) / self.d_in**0.5
            return rows / factor, (factor, torch.zeros_like(factor))
        if self.normalisation == "layer_norm":
            mean = rows.mean(-1, keepdim=True)
            deviation = (rows - mean).std(-1, keepdim=True)
            return (rows - mean) / (deviation + _EPSILON), (deviation, mean)
        one = torch.ones((), dtype=rows.dtype, device=rows.device)
        return rows, (one, 0 * one)

    def _undone(self, found: Tensor, rows: Tensor) -> Tensor:
        factor, summand = self._normalised(rows)[1]
        return found * factor + summand

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that it has, by name."""
        named = ("encoder", "decoder", "encoder_bias", "decoder_bias", "threshold", "input_bias", "skip")
        found = {name: each for name in named if (each := getattr(self, name)) is not None}
        return found | {f"gate.{name}": each for name, each in self.gate.items()}

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Self:
        """The same on another device or in another dtype."""
        moved: dict[str, Any] = {name: each.to(device=device, dtype=dtype) for name, each in self.tensors().items()}
        if all(moved[name] is each for name, each in self.tensors().items()):
            return self
        gate = {name: moved.pop(f"gate.{name}") for name in self.gate}
        return replace(self, **moved, gate=gate)

    @property
    def digest(self) -> str:
        """SHA-256 of its weights, and of what is not in them."""
        made = hashlib.sha256(repr((self.activation, self.k, self.normalisation, self.by_norms)).encode())
        for name, each in sorted(self.tensors().items()):
            made.update(name.encode() + each.detach().float().cpu().contiguous().numpy().tobytes())
        return made.hexdigest()

    def direction(self, feature: int) -> Tensor:
        """The vector [d_out] that one unit of a feature writes. Raises SelectionError where there is none."""
        if not 0 <= feature < self.features:
            raise SelectionError(f"feature {feature}: this dictionary has 0 to {self.features - 1}.")
        found = self.decoder[feature]
        return found / found.norm() if self.by_norms else found

    def __repr__(self) -> str:
        where = "" if self.about.point is None else f" of {tensor_name(self.reads)}"
        out = f" -> {tensor_name(self.writes)}" if self.about.point_out is not None else ""
        return f"<Dictionary{where}{out}: {self.features} features, {self.about.kind or self.activation}>"
