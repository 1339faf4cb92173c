"""Plain PyTorch hooks, which the libraries are held against, and the model alone."""

from collections.abc import Callable
from typing import Any

import torch

from ways.work import RIGHT, Tensor, Ways, Work, dictionary_weights, difference, plain


def bare(work: Work, model: Any) -> dict[str, Callable[[], Any]]:
    """The same without a library, and without looking. The backward pass goes to what the first block reads."""

    @torch.no_grad()
    def passes() -> None:
        model(work.clean, use_cache=False, logits_to_keep=1)
        model(work.many_corrupted, use_cache=False, logits_to_keep=1)

    def backward() -> Tensor:
        given = model.get_input_embeddings()(work.prompt).requires_grad_()
        return torch.autograd.grad(model(inputs_embeds=given).logits[0, -1, RIGHT], given)[0]

    return {
        "generate": lambda: model.generate(work.prompt, **work.generate),
        "forward": torch.no_grad()(lambda: model(work.batch, use_cache=False)),
        "backward": backward,
        "passes": passes,
    }


def by_hand(work: Work) -> Ways:
    model = plain(work.folder)
    blocks, vector = model.model.layers, torch.ones(model.config.hidden_size)
    weights = dictionary_weights(work)

    def hooked(hooks: dict[int, Callable[..., Any]], run: Callable[[], Any], *, before: bool = False) -> Any:
        handles = [
            (blocks[layer].register_forward_pre_hook if before else blocks[layer].register_forward_hook)(hook)
            for layer, hook in hooks.items()
        ]
        try:
            return run()
        finally:
            for handle in handles:
                handle.remove()

    def capture() -> Callable[[], Tensor]:
        rows: list[Tensor] = []
        keep = dict.fromkeys(work.few, lambda module, given, output: rows.append(output.clone()))
        hooked(keep, lambda: model.generate(work.prompt, **work.generate))
        return lambda: torch.stack([row[0, -1] for row in rows[-len(work.few) :]])

    def steering() -> Callable[[], Tensor]:
        add = {work.at: lambda module, given, output: output + vector}
        ids = hooked(add, lambda: model.generate(work.prompt, **work.generate))
        return lambda: ids[0, -work.new :]

    @torch.no_grad()
    def harvest() -> Callable[[], Tensor]:
        rows: list[Tensor] = []
        keep = dict.fromkeys(range(work.layers), lambda module, given, output: rows.append(output.clone()))
        hooked(keep, lambda: model.model(work.batch, use_cache=False))
        return lambda: torch.stack(rows)

    def gradients() -> Callable[[], Tensor]:
        rows: list[Tensor] = []
        given = model.get_input_embeddings()(work.prompt).requires_grad_()
        keep = dict.fromkeys(range(work.layers), lambda module, given, output: rows.append(output))
        logits = hooked(keep, lambda: model(inputs_embeds=given).logits)
        found = torch.autograd.grad(logits[0, -1, RIGHT], rows)
        return lambda: torch.cat(found)

    @torch.no_grad()
    def sweep() -> Callable[[], Tensor]:
        kept: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            return lambda module, given: kept.update({layer: given[0].clone()})

        def patch(layer: int) -> Callable[..., Any]:
            return lambda module, given: (work.written(given[0], layer, kept[layer]), *given[1:])

        reading, writing = ({layer: make(layer) for layer in work.swept} for make in (keep, patch))
        hooked(reading, lambda: model(work.clean, use_cache=False, logits_to_keep=1), before=True)
        run = hooked(writing, lambda: model(work.many_corrupted, use_cache=False, logits_to_keep=1), before=True)
        return lambda: difference(run.logits[:, -1])

    @torch.no_grad()
    def features() -> Callable[[], Tensor]:
        rows: list[Tensor] = []
        keep = {work.at: lambda module, given, output: rows.append(output)}
        hooked(keep, lambda: model.model(work.batch, use_cache=False))
        active = (rows[0] @ weights["W_enc"] + weights["b_enc"]).relu()
        return lambda: active

    return {"capture": capture, "steering": steering, "harvest": harvest, "gradients": gradients, "sweep": sweep,
            "features": features}  # fmt: skip
