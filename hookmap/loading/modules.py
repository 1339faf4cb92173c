"""The transformers model inside a module: the one that `generate` calls."""

import torch
from torch import nn

from hookmap.errors import ModelError
from hookmap.loading.wrappers import model_inside


def generating_root(module: nn.Module, weights: bool = True) -> nn.Module:
    """The transformers model that is watched: the module, or the one that wrappers (PEFT) hold."""
    root = model_inside(module)
    if root is None:
        raise ModelError(f"{type(module).__name__} holds no transformers model: expected one with `generate`.")
    if root.config.is_encoder_decoder or not root.can_generate():
        kind = "an encoder-decoder" if root.config.is_encoder_decoder else "not a generating model"
        raise ModelError(
            f"{type(root).__name__} is {kind}: expected a causal language model, such as AutoModelForCausalLM loads."
        )
    if weights and any(
        p.is_meta for module in root.modules() if not _brings_weights(module) for p in module.parameters(False)
    ):
        raise ModelError(f"{type(root).__name__} has no weights (meta device): load them, then open it.")
    embedding = root.get_input_embeddings()
    if not isinstance(getattr(embedding, "weight", None), torch.Tensor):
        raise ModelError(
            f"{type(root).__name__} embeds what it reads with a {type(embedding).__name__}: expected one embedding of "
            "token ids, because a sample's rows are those of its token ids. Its map can be had: hookmap discover"
        )
    found: nn.Module = root
    return found


def _brings_weights(module: nn.Module) -> bool:
    """Whether accelerate holds its weights elsewhere, on a disk say, and brings them when it runs."""
    return getattr(module.__dict__.get("_hf_hook"), "offload", False) is True
