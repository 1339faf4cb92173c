"""Cross-layer transcoders: features that read one layer, and write to the MLP of that layer and of all later ones.

Files of circuit-tracer: `config.yaml`, and for each layer N `W_enc_N.safetensors` and `W_dec_N.safetensors`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hookmap.analysis.dictionaries.dictionary import About, Dictionary
from hookmap.analysis.dictionaries.formats import place_of_hook
from hookmap.analysis.dictionaries.writing import Change, Rewriting
from hookmap.capture.interventions.documents import Function
from hookmap.capture.interventions.functions import At, apply, watch
from hookmap.errors import SelectionError

Tensor = torch.Tensor
KIND = "cross_layer_transcoder"
READS, WRITES = "hook_resid_mid", "hook_mlp_out"
"""circuit-tracer's, where the config does not say"""
_NO_DECODING = (
    "one layer of a cross-layer transcoder reconstructs nothing: an MLP's output is the sum of what the features of "
    "its own and of all earlier layers write. This layer's share: .written(features)."
)


@dataclass(frozen=True, eq=False, repr=False)
class CrossLayer(Dictionary):
    """The features of one layer of a cross-layer transcoder.

    What the MLP of a layer is reconstructed as is a sum over the features of this and all earlier layers: of one
    layer's alone there is no reconstruction, and `decode`, `splice` and an evaluation raise SelectionError. Edits keep
    the error: at each layer that features write to they add what the change of the features does.
    """

    further: Tensor = field(default_factory=lambda: torch.empty(0))
    """[features, layers, d_out]: what features write to the layers after their own, in order"""

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"further": self.further}

    def written(self, features: Tensor) -> Tensor:
        """[…, features] -> […, layers, d_out]: this layer's share of the reconstruction of each layer from it on."""
        own = features.to(self.decoder.dtype)
        return torch.cat([(own @ self.decoder).unsqueeze(-2), torch.einsum("...f,fld->...ld", own, self.further)], -2)

    def decode(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        raise SelectionError(_NO_DECODING)

    def edit(self, change: Change, *, error: bool = True, **where: Any) -> list[Function]:
        """See `Writing.edit`: one that reads, and one for each layer that the features write to."""
        if not error:
            raise SelectionError(_NO_DECODING)
        run = _Shares(self, change, error)
        (point, layer), (out, first) = self.reads[:2], self.writes[:2]
        if layer is None or first is None:
            raise SelectionError("the transcoder's layer is not known: load_dictionary(…, layer=N).")
        layers = range(first, first + 1 + self.further.shape[1])
        return [watch(run.read, point, layer, **where), *(apply(run.to(n - first), out, n, **where) for n in layers)]


class _Shares(Rewriting):
    """Adds what a change of the features writes to each layer, in the pass that reads them."""

    def read(self, rows: Tensor, at: At) -> None:
        transcoder = self._on(rows.device)
        features = transcoder.encode(rows.flatten(1))
        super().read(transcoder.written(self._change(features) - features), at)

    def to(self, place: int) -> Callable[[Tensor, At], Tensor]:
        """What writes to the layer that comes so many after the one that is read."""

        def write(rows: Tensor, at: At) -> Tensor:
            written = self._was_read(at, again=True)
            return rows + written[:, place].view(rows.shape).to(rows)

        return write


def cross_layer(config: Mapping[str, Any], tensors: Mapping[str, Tensor], layer: int) -> CrossLayer:
    """The features of one layer, from its tensors. Raises SelectionError."""
    named = {name.removesuffix(f"_{layer}"): tensor.float() for name, tensor in tensors.items()}
    if missing := [f"{name}_{layer}" for name in ("W_enc", "b_enc", "b_dec", "W_dec") if name not in named]:
        held = ", ".join(sorted(tensors)) or "nothing"
        raise SelectionError(f"the weights lack {', '.join(missing)}: they hold {held}.")
    if named["W_dec"].ndim != 3 or not named["W_dec"].shape[1]:
        raise SelectionError(f"W_dec_{layer} is {list(named['W_dec'].shape)}, expected [features, layers, width].")
    model = config.get("model_name")
    about = About(
        _place(config.get("feature_input_hook"), READS),
        layer,
        _place(config.get("feature_output_hook"), WRITES),
        layer,
        model if isinstance(model, str) else None,
        program="circuit-tracer",
        kind=KIND,
    )
    return CrossLayer(
        encoder=named["W_enc"].T.contiguous(),
        decoder=named["W_dec"][:, 0].contiguous(),
        encoder_bias=named["b_enc"],
        decoder_bias=named["b_dec"],
        activation="jumprelu" if "threshold" in named else "relu",
        threshold=named["threshold"].flatten() if "threshold" in named else None,
        about=about,
        further=named["W_dec"][:, 1:].contiguous(),
    )


def _place(hook: Any, usual: str) -> str:
    """The point of a hook's name. Raises SelectionError where it is none of ours."""
    name = hook if isinstance(hook, str) else usual
    point = place_of_hook(f"blocks.0.{name}")[0]
    if point is None:
        raise SelectionError(f"the config names the hook {name}, which is no point here: convert it to one that is.")
    return point
