"""A map document written by hand: 6 layers of three kinds, with every sort of selector."""

from typing import Any

L = "model.layers.{i}"
STREAM = "attention and MLP run in parallel"


def term(module: str, side: str, index: int | str | None = None, scale: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"module": module, "side": side, "index": index, "scale": scale, **more}


def point(order: int, *terms: dict[str, Any]) -> dict[str, Any]:
    return {"terms": list(terms), "order": order}


def sequential(layers: list[int], mixer: str = "self_attn") -> dict[str, Any]:
    points = {
        "resid_pre": point(0, term(L, "input", 0)),
        "mixer_in": point(1, term(f"{L}.norm_1", "output")),
        "mixer_out": point(2, term(f"{L}.{mixer}", "output", 0, 0.5)),
        "resid_mid": point(3, term(f"{L}.norm_2", "input", 0)),
        "mlp_in": point(4, term(f"{L}.norm_2", "output")),
        "mlp_out": point(5, term(f"{L}.mlp", "output")),
        "resid_post": point(6, term(L, "output")),
    }
    unavailable = {"resid_mid_sum": "no norm stands on the stream"}
    if mixer == "self_attn":
        points |= {"attn_in": points["mixer_in"], "attn_out": points["mixer_out"]}
    else:
        unavailable |= dict.fromkeys(("attn_in", "attn_out"), "this block's mixer is not attention: use mixer_out")
    return {
        "name": f"{mixer}+dense",
        "block_class": "Block",
        "layers": layers,
        "branch_order": "sequential",
        "norm_placement": "pre",
        "points": points,
        "unavailable": unavailable,
    }


def parallel(layers: list[int]) -> dict[str, Any]:
    points = {
        "resid_pre": point(0, term(L, "input", "hidden_states")),
        "mixer_out": point(1, term(f"{L}.self_attn", "output", 0)),
        "attn_out": point(1, term(f"{L}.self_attn", "output", 0)),
        "mlp_out": point(2, term(f"{L}.mlp", "output")),
        "resid_post": point(3, term(L, "input", "hidden_states"), term(f"{L}.add", "output")),
    }
    return {
        "name": "parallel",
        "block_class": "ParallelBlock",
        "layers": layers,
        "branch_order": "parallel",
        "norm_placement": "pre",
        "points": points,
        "unavailable": {"resid_mid": STREAM, "resid_mid_sum": STREAM},
    }


def hybrid() -> dict[str, Any]:
    """Layers 0, 1, 4: attention; 2, 5: a recurrent mixer; 3: parallel."""
    return {
        "schema_version": 1,
        "architecture": "HybridForCausalLM",
        "layer_access_pattern": "model.layers[i]",
        "pre_attention_path": f"{L}.norm_1",
        "pre_mlp_path": f"{L}.norm_2",
        "scope": "model",
        "transformers_version": "5.23.0",
        "hookmap_version": "0.1.0",
        "num_layers": 6,
        "d_model": 16,
        "d_vocab": 32,
        "embedding_path": "model.embed_tokens",
        "layers_path": L,
        "final_norm_path": "model.norm",
        "lm_head_path": "lm_head",
        "model_points": {
            "embed": point(0, term("model.embed_tokens", "output")),
            "final_norm": point(1, term("model.norm", "output")),
        },
        "model_unavailable": {"logits": "this model has no head"},
        "kinds": [sequential([0, 1, 4]), sequential([2, 5], mixer="mamba"), parallel([3])],
    }


def uniform(layers: int = 4) -> dict[str, Any]:
    """One kind of block, as a map of an architecture."""
    kind = sequential(list(range(layers)))
    kind["points"]["mixer_out"]["terms"][0]["scale"] = kind["points"]["attn_out"]["terms"][0]["scale"] = 1.0
    return {**hybrid(), "scope": "architecture", "num_layers": layers, "kinds": [kind]}
