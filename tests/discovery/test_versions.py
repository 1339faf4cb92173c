"""The installed transformers decides: the block of GPT-J and CodeGen returns a bare tensor since 5.24."""

from pathlib import Path

import pytest
import torch
import transformers
from support import plain_hooks

import hookmap
from hookmap.verification.verify import verify

IDS = [[5, 17, 3, 44, 9, 40, 31, 8]]
_SIZES = {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4, "vocab_size": 97, "n_positions": 64}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPTJ", "CodeGen"])
def test_one_checkpoint_is_right_whatever_its_block_returns(name: str, tmp_path: Path) -> None:
    """The same folder under 5.23 and 5.24: each point is what a plain hook sees there."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**_SIZES)
    plain_hooks.redrawn(getattr(transformers, f"{name}ForCausalLM")(config)).save_pretrained(tmp_path)
    hm = hookmap.open(tmp_path, device="cpu")
    blocks, seen, returned = hm.model.transformer.h, {}, set()

    def keep(layer: int) -> None:
        def hook(
            _: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor | tuple[torch.Tensor, ...]
        ) -> None:
            returned.add(type(output))
            seen[layer] = args[0].clone(), (output[0] if isinstance(output, tuple) else output).clone()

        blocks[layer].register_forward_hook(hook)

    run = hm.capture(IDS, ["resid_pre", "resid_post"], max_new_tokens=0)
    for layer in range(3):
        keep(layer)
    with torch.no_grad():
        hm.model(torch.tensor(IDS), use_cache=False)
    for layer, (before, after) in seen.items():
        assert torch.allclose(run["resid_pre", layer], before, atol=1e-5)
        assert torch.allclose(run["resid_post", layer], after, atol=1e-5)
    (kind,) = returned
    places = {None} if kind is torch.Tensor else {0}
    for found in (hm.map, hookmap.discover(tmp_path), hookmap.load_map(tmp_path)):
        assert {
            term.index for s in found.selectors("resid_post") for term in s.terms if term.side == "output"
        } <= places
    assert verify(tmp_path).passed
