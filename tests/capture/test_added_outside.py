"""A generation of blocks that give only what is to be added: `x = x + block(x)`."""

from __future__ import annotations

import pytest
import torch
from support.invented_causal import LadderConfig, LadderForCausalLM

import hookmap

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("seeded")]
PROMPTS = [[5, 17, 3, 44], [9, 40, 31, 8]]
POINTS = ["resid_pre", "mixer_out", "resid_mid", "mlp_out", "resid_post"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
def test_the_sum_is_what_enters_the_next_block_bit_for_bit(dtype: torch.dtype, engine: str) -> None:
    model = LadderForCausalLM(LadderConfig(block="Given", added_outside=True)).eval().to(dtype)
    entered: dict[int, list[torch.Tensor]] = {}
    for layer, module in enumerate([*model.ladder.rungs, model.ladder.still]):
        module.register_forward_pre_hook(
            lambda _, args, layer=layer: entered.setdefault(layer, []).append(args[0].detach().clone())
        )
    hm = hookmap.open(model, check=False)
    for prompt in PROMPTS:
        entered.clear()
        run = hm.capture([prompt], POINTS, "all", max_new_tokens=3, engine=engine)
        (tokens,) = run.tokens
        said = model.says(torch.tensor([tokens[:-1]])) if dtype is torch.float32 else {}
        for layer in range(3):
            steps = [passes[2][0, -1] for passes in (entered[layer], entered[layer + 1])]
            for point, step in zip(("resid_pre", "resid_post"), steps, strict=True):
                found = run.read(0, point, layer)
                assert len(found) == len(tokens) - 1
                assert torch.equal(found[-1], step), (point, layer)
            for point in POINTS[:-1] if said else ():
                assert torch.allclose(run.read(0, point, layer), said[point, layer][0], atol=1e-5), (point, layer)
