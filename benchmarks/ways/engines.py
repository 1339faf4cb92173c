"""interp-engine and TorchLens."""

from collections.abc import Callable

import torch

from ways.work import RIGHT, Tensor, Ways, Work, dictionary_weights, difference, plain


def interp_engine(work: Work) -> Ways:
    """Its eager engine. `capture_generation` generates, and then runs one pass over all tokens."""
    from interp_engine import HookManager, load_model
    from interp_engine.capture import capture as read
    from interp_engine.capture import capture_generation
    from interp_engine.directions import apply_directions
    from interp_engine.steer import SteerSpec, generate_stream, steer

    model = load_model(work.folder, backend="eager", device="cpu", dtype="float32", requires_grad=True)
    spec = [SteerSpec(torch.ones(model.d_model), work.at)]
    behind = [("resid_post", layer) for layer in range(work.layers)]
    weights = dictionary_weights(work)
    vectors = weights["W_enc"].T.contiguous()

    def capture() -> Callable[[], Tensor]:
        names = [f"resid_post.{layer}" for layer in work.few]
        cache = capture_generation(model, work.prompt, names, max_tokens=work.new)[1]
        return lambda: torch.stack([cache[name][0, -1] for name in names])

    def steering() -> Callable[[], Tensor]:
        with steer(model, spec):
            steps = list(generate_stream(model, work.prompt[0], max_tokens=work.new, temperature=0, stop_at_eos=False))
        return lambda: torch.tensor([step.token_id for step in steps])

    def harvest() -> Callable[[], Tensor]:
        cache = read(model, work.batch, behind)
        return lambda: torch.stack([cache.get(*name) for name in behind])

    def gradients() -> Callable[[], Tensor]:
        cache = read(model, work.prompt, behind, detach=False)
        found = torch.autograd.grad(cache.output.logits[0, -1, RIGHT], [cache.get(*name) for name in behind])
        return lambda: torch.cat(found)

    def sweep() -> Callable[[], Tensor]:
        """By hand, all cells in one batch, with its hooks that write: it has no sweep of its own."""
        kept = read(model, work.clean, [("resid_pre", layer) for layer in work.swept])
        with HookManager() as hooks:
            for layer in work.swept:
                module, side = model.resolve_point("resid_pre", layer)
                clean = kept.get("resid_pre", layer)
                hooks.write(module, lambda rows, layer=layer, clean=clean: work.written(rows, layer, clean), point=side)
            logits = read(model, work.many_corrupted, []).output.logits
        return lambda: difference(logits[:, -1])

    def features() -> Callable[[], Tensor]:
        rows = read(model, work.batch, [("resid_post", work.at)]).get("resid_post", work.at)
        active = apply_directions(rows, vectors, weights["b_enc"], "relu")
        return lambda: active

    return {"capture": capture, "steering": steering, "harvest": harvest, "gradients": gradients, "sweep": sweep,
            "features": features}  # fmt: skip


def torchlens(work: Work) -> Ways:
    """`record` of the blocks' outputs and of their gradients, which ends behind the last block where it can.

    Its patching grid traces the whole model anew for each patch, which takes minutes on these models: it is not asked.
    """
    from functools import reduce
    from operator import or_

    import torchlens as tl

    model = plain(work.folder)
    names = [f"model.layers.{layer}" for layer in range(work.layers)]
    blocks = reduce(or_, map(tl.module, names))

    @torch.no_grad()
    def harvest() -> Callable[[], Tensor]:
        kept = tl.record(
            model, [], {"input_ids": work.batch, "use_cache": False}, save=blocks, halt=tl.module(names[-1])
        )
        return lambda: torch.stack([record.ram_payload for record in kept.records])

    def gradients() -> Callable[[], Tensor]:
        given = model.get_input_embeddings()(work.prompt).requires_grad_()
        read = {"inputs_embeds": given, "use_cache": False}
        output, kept = tl.record(model, [], read, save=blocks, save_grads=blocks, return_output=True)
        kept.log_backward(output.logits[0, -1, RIGHT])

        def pick() -> Tensor:
            found: dict[str, Tensor] = {}  # behind a block two sums have gradients: that of its output comes first
            for record in kept.grad_records:
                if record.ctx.type == "add" and record.ctx.grad_kind == "grad_output":
                    found.setdefault(record.ctx.module_stack[-1].address, record.ram_payload)
            return torch.cat([found[name] for name in names])

        return pick

    return {"harvest": harvest, "gradients": gradients}
