"""From the residual stream to logits, in vLLM's worker: its final norm, and the logits that it computes from that."""

import torch
from safetensors.torch import load, save

from hookmap.errors import SelectionError
from hookmap.model import HookedModel
from hookmap.vllm.engine import VllmEngine

_TOKENS = 6
_TOLERANCE = {torch.float32: 1e-4}
"""of a row's size; of narrower dtypes, 0.05"""


class VllmUnembedding:
    """What a lens computes logits with. Its norm is held against the model's own when it is made."""

    dtype: torch.dtype

    def __init__(self, model: HookedModel, engine: VllmEngine) -> None:
        """Raises SelectionError where the norm, of the last layer's stream, does not give the rows that it gave."""
        self._engine = engine
        tokens = [(1 + 37 * n) % (model.map.d_vocab or _TOKENS) for n in range(_TOKENS)]
        points = {"resid_post": [model.map.num_layers - 1], "final_norm": "all"}
        run = model.capture([tokens], points, max_new_tokens=0)
        stream, own = run.read(0, "resid_post", -1), run.read(0, "final_norm")
        self.dtype = stream.dtype
        normed = self._computed(stream)["normed"]
        off = float(((normed - own).norm(dim=-1) / own.norm(dim=-1)).max())
        if not off <= _TOLERANCE.get(self.dtype, 0.05):
            raise SelectionError(
                f"no lens: between the last layer and the final norm of {model.map.architecture} is more than the "
                f"norm, whose rows differ by {off:.2g} of their size."
            )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, pos, d_model] -> float32 [batch, pos, d_vocab]."""
        logits = self._computed(x.flatten(0, 1))["logits"]
        return logits.reshape(*x.shape[:2], logits.shape[-1])

    def _computed(self, stream: torch.Tensor) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = load(self._engine.unembed(save({"stream": stream.contiguous()})))
        return found
