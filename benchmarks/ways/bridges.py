"""TransformerLens, and SAELens on it."""

from collections.abc import Callable

import torch

from ways.work import RIGHT, Tensor, Ways, Work, difference


def transformer_lens(work: Work) -> Ways:
    """The bridge: `generate(return_cache=True)`, hooks, `run_with_cache`; sweeps by a batch of hooks.

    Its own sweep, `patching.generic_activation_patch`, runs one pass for each patch: "sweep, its own".
    """
    import pandas
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(work.folder, device="cpu", dtype=torch.float32)
    for parameter in bridge.parameters():
        parameter.requires_grad_(False)
    before, behind = ([f"blocks.{layer}.hook_resid_{side}" for layer in range(work.layers)] for side in ("pre", "post"))
    few, swept = [behind[layer] for layer in work.few], [before[layer] for layer in work.swept]
    vector = torch.ones(bridge.cfg.d_model)
    how = {"max_new_tokens": work.new, "do_sample": False, "stop_at_eos": False, "verbose": False,
           "return_type": "tokens"}  # fmt: skip

    def capture() -> Callable[[], Tensor]:
        cache = bridge.generate(work.prompt, return_cache=True, names_filter=few, **how)[1]
        last = work.prompt.shape[1] + work.new - 2  # it feeds the last new token, too
        return lambda: torch.stack([cache[name][0, last] for name in few])

    def steering() -> Callable[[], Tensor]:
        with bridge.hooks(fwd_hooks=[(behind[work.at], lambda rows, hook: rows + vector)]):
            ids = bridge.generate(work.prompt, **how)
        return lambda: ids[0, -work.new :]

    @torch.no_grad()
    def harvest() -> Callable[[], Tensor]:
        cache = bridge.run_with_cache(work.batch, names_filter=behind, stop_at_layer=work.layers)[1]
        return lambda: torch.stack([cache[name] for name in behind])

    def gradients() -> Callable[[], Tensor]:
        rows: list[Tensor] = []
        begin = (before[0], lambda given, hook: given.detach().requires_grad_())
        keep = [(name, lambda given, hook: rows.append(given)) for name in behind]
        with bridge.hooks(fwd_hooks=[begin, *keep]):
            logit = bridge(work.prompt)[0, -1, RIGHT]
        found = torch.autograd.grad(logit, rows)
        return lambda: torch.cat(found)

    @torch.no_grad()
    def sweep() -> Callable[[], Tensor]:
        cache = bridge.run_with_cache(work.clean, names_filter=swept, stop_at_layer=work.layers)[1]
        patch = [
            (name, lambda rows, hook, layer=layer, name=name: work.written(rows, layer, cache[name]))
            for name, layer in zip(swept, work.swept, strict=True)
        ]
        logits = bridge.run_with_hooks(work.many_corrupted, fwd_hooks=patch)
        return lambda: difference(logits[:, -1])

    @torch.no_grad()
    def own_sweep() -> Callable[[], Tensor]:
        cache = bridge.run_with_cache(work.clean, names_filter=swept, stop_at_layer=work.layers)[1]
        cells = pandas.DataFrame(work.cells, columns=["layer", "pos"])
        found = patching.generic_activation_patch(
            bridge, work.corrupted, cache, lambda logits: difference(logits[0, -1]), patching.layer_pos_patch_setter,
            "resid_pre", index_df=cells,
        )  # fmt: skip
        return lambda: found

    return {"capture": capture, "steering": steering, "harvest": harvest, "gradients": gradients, "sweep": sweep,
            "sweep, its own": own_sweep}  # fmt: skip


def sae_lens(work: Work) -> Ways:
    """Its dictionary on its own bridge, whose pass ends behind the layer."""
    from sae_lens import SAE
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    bridge = SAETransformerBridge.boot_transformers(work.folder, device="cpu", dtype=torch.float32)
    sae = SAE.load_from_disk(work.dictionary, device="cpu")
    name = f"blocks.{work.at}.hook_out"  # the dictionary's `hook_resid_post`, by the name that this bridge caches

    @torch.no_grad()
    def features() -> Callable[[], Tensor]:
        rows = bridge.run_with_cache(work.batch, names_filter=[name], stop_at_layer=work.at + 1)[1][name]
        active = sae.encode(rows)
        return lambda: active

    return {"features": features}
