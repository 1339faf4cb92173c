"""What a model on vLLM must show when it is opened: rows of a prompt and of new tokens, told from each other."""

from itertools import product

import torch

from hookmap.errors import CaptureError
from hookmap.model import HookedModel
from hookmap.stores.ledger import tensor_name
from hookmap.vllm.engine import VllmEngine

_TOKENS, _NEW = 5, 3
_NEAR = {torch.float32: 1e-3, torch.float64: 1e-6}
"""of a row's size; of narrower dtypes, 0.25: kernels for prompts and for new tokens round differently"""


def self_test(model: HookedModel, engine: VllmEngine) -> None:
    """Generates a few tokens, and reads them again as a prompt: the rows must be the same.

    Raises CaptureError where they are not, and where a layer's output is not what enters the next one.
    """
    tapped, count = engine.tapped, model.map.num_layers
    points = {
        point: layers
        for point in ("resid_pre", "resid_post")
        if point in model.map.points
        and (layers := [n for n in range(count) if _there(model, point, n) and (not tapped or (point, n) in tapped)])
    }
    if not points:
        return
    if engine.longest < _TOKENS + _NEW:
        raise CaptureError(
            f"max_model_len={engine.longest}: expected at least {_TOKENS + _NEW}, which a model must run when it opens."
        )
    size = model.map.d_vocab or _TOKENS
    prompts = [[(1 + 37 * n) % size for n in range(_TOKENS)]] * engine.engines  # one for each
    generated = model.capture(prompts, points, max_new_tokens=_NEW)
    read = model.capture([list(sample.token_ids[:-1]) for sample in generated.samples], points, max_new_tokens=0)
    for key, sample in product(generated.keys, range(engine.engines)):
        made, again = (run.read(sample, key[0], key[1]).float() for run in (generated, read))
        near = _NEAR.get(generated.read(sample, key[0], key[1]).dtype, 0.25)
        off = float(((made - again).norm(dim=-1) / again.norm(dim=-1).clamp_min(1e-30)).max())
        if not off <= near:
            raise CaptureError(
                f"vLLM {engine.version}: the rows of {tensor_name(key)} are others while tokens are "
                f"generated than when they are read, by {off:.2g} of their size. Open the model with hookmap.open."
            )
        after = ("resid_pre", key[1] + 1) if key[0] == "resid_post" and key[1] is not None else None
        if after in generated.keys and not torch.equal(generated.read(sample, *after).float(), made):
            raise CaptureError(f"{tensor_name(key)} is not what enters the next layer: the map is another model's.")


def _there(model: HookedModel, point: str, layer: int) -> bool:
    return model.map.unavailable(point, layer) is None
