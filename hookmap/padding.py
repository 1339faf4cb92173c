"""May prompts of different lengths share a batch? Shown on the model itself: a padded row says what it says alone."""

from typing import TYPE_CHECKING, Any

import torch

from hookmap import generation as gen
from hookmap.errors import HookmapError

if TYPE_CHECKING:
    from hookmap.model import HookedModel

_LENGTHS = (3, 40, 150)
"""tokens of the prompts that are tried; the longer ones reach behind the chunks that some attention is computed in"""
_STEPS = 4
_ROUNDING = 1e-3
"""distance of the logits, over their own size, that is rounding in float32"""


def why_no_pads(hm: "HookedModel") -> str | None:
    """Why prompts must not be padded to one length; None where logits stay the same but for rounding.

    Runs a few tokens. A model with a mixer that carries a state through its tokens is not tried: pads are tokens to it.
    """
    mixers = {kind.mixer.type for kind in hm.map.kinds if kind.mixer is not None}
    if others := sorted(mixers - {"attention"}):
        return f"its mixers are {', '.join(others)}"
    if not gen.takes(hm.root, "attention_mask"):
        return "its forward takes no attention mask"
    try:
        distance = _distance(hm)
    except (HookmapError, RuntimeError, IndexError) as error:
        return f"a padded batch could not be tried: {type(error).__name__}"
    bound = max(_ROUNDING, 8 * torch.finfo(next(hm.root.parameters()).dtype).eps)
    return (
        None if distance <= bound else f"pads change its logits by {distance:.1e} of their size, more than {bound:.1e}"
    )


def _distance(hm: "HookedModel") -> float:
    """The largest relative distance of a row of logits in a padded batch from the same row alone."""
    config: Any = hm.root.config
    longest = min(_LENGTHS[-1], getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9)
    draw = torch.Generator().manual_seed(0)
    lengths = [min(length, longest - _STEPS) for length in _LENGTHS]
    prompts = [torch.randint(hm.vocabulary, (length,), generator=draw).tolist() for length in lengths]
    options: dict[str, Any] = {"max_new_tokens": _STEPS, "min_new_tokens": _STEPS, "positions": "-1:"}
    alone = hm.capture(prompts, ["logits"], batch_size=1, engine="hooks", **options)
    together = hm.capture(prompts, ["logits"], batch_size=len(prompts), engine="hooks", **options)
    found = 0.0
    for number, (one, other) in enumerate(zip(alone.samples, together.samples, strict=True)):
        for row, (place, token) in enumerate(zip(one.positions or (), one.token_ids[-_STEPS:], strict=False)):
            a, b = (run.read(number, "logits", None)[row].float() for run in (alone, together))
            found = max(found, float((a - b).norm() / (a - a.mean()).norm()))
            if token != other.token_ids[place + 1]:  # type: ignore[operator]
                break  # a tie: from here on the rows are fed different tokens
    return found
