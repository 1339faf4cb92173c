"""Gradients on a model that was really trained, against autograd by hand and against changes that are really made."""

from typing import Any

import pytest
import torch

import hookmap

pytestmark = pytest.mark.real

TEXTS = ["When Mary and John went to the store, John gave a drink to", "The capital of France is", "2 + 2 ="]
LAYERS = [0, 15, 29]


def test_gradients_of_padded_texts_are_those_of_autograd_for_each_alone(exact: Any) -> None:
    """The largest relative error is what float32 leaves of thirty layers."""
    right, wrong = (exact.tokenizer(text)["input_ids"][0] for text in (" Mary", " Rome"))
    metric = hookmap.metrics.logit_difference(" Mary", " Rome")
    found = exact.gradients(TEXTS, metric, ["resid_pre", "mixer_out", "z", "mlp_post", "mlp_out"], LAYERS)
    blocks = exact.model.model.layers
    for number, text in enumerate(TEXTS):
        seen: dict[tuple[str, int], torch.Tensor] = {}
        handles = []

        def keep(point: str, layer: int, seen: dict[tuple[str, int], torch.Tensor] = seen) -> Any:
            def hook(module: Any, args: Any, output: Any = None) -> None:
                tensor = args[0] if output is None else output[0] if isinstance(output, tuple) else output
                tensor.requires_grad_()
                tensor.retain_grad()
                seen[point, layer] = tensor

            return hook

        for layer in LAYERS:
            block = blocks[layer]
            handles += [block.register_forward_pre_hook(keep("resid_pre", layer))]
            handles += [block.self_attn.register_forward_hook(keep("mixer_out", layer))]
            handles += [block.self_attn.o_proj.register_forward_pre_hook(keep("z", layer))]
            handles += [block.mlp.down_proj.register_forward_pre_hook(keep("mlp_post", layer))]
            handles += [block.mlp.register_forward_hook(keep("mlp_out", layer))]
        exact.model.requires_grad_(False)
        logits = exact.model(exact.tokenizer(text, return_tensors="pt")["input_ids"], use_cache=False).logits[0, -1]
        (logits[right] - logits[wrong]).backward()
        exact.model.requires_grad_(True)
        for handle in handles:
            handle.remove()
        assert float(found.metric[number]) == pytest.approx(float((logits[right] - logits[wrong]).detach()), abs=1e-3)
        for (point, layer), tensor in seen.items():
            assert tensor.grad is not None
            own = found.read(number, point, layer).flatten(1)
            error = float((own - tensor.grad[0]).norm() / tensor.grad.norm())
            assert error < 1e-3, (point, layer, text, error)


def test_integrated_gradients_miss_what_they_say_of_the_metrics_difference(exact: Any) -> None:
    """Both ends by transformers: the text itself, and the mean of its tokens' embeddings at every token."""
    ids = exact.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    right, wrong = (exact.tokenizer(text)["input_ids"][0] for text in (" Mary", " John"))
    found = exact.saliency(TEXTS[0], hookmap.metrics.logit_difference(" Mary", " John"), steps=32)
    with torch.no_grad():
        given = exact.model.get_input_embeddings()(ids)
        whole, base = (
            float(logits[0, -1, right] - logits[0, -1, wrong])
            for logits in (
                exact.model(inputs_embeds=own).logits for own in (given, given.mean(1, True).expand_as(given))
            )
        )
    missed = abs(float(found.scores[0].sum()) - (whole - base)) / abs(whole - base)
    assert found.gap is not None and missed == pytest.approx(float(found.gap[0]), abs=5e-3)
