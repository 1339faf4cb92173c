"""Interventions of every declarative kind, for the tiny Llama of `on_vllm`, and prompts for them."""

from typing import Any

import torch
from support.on_vllm import prompts


def vector(seed: int, size: int = 64) -> list[float]:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=draw) * 2).tolist()


def matrix(seed: int, *shape: int) -> list[list[float]]:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).tolist()


EDITS: dict[str, list[dict[str, Any]]] = {
    "steer the stream": [{"do": "steer", "point": "resid_post", "layers": [1], "vector": vector(1), "strength": 3}],
    "steer what enters": [{"do": "steer", "point": "resid_pre", "layers": "all", "vector": vector(2)}],
    "steer the middle": [
        {"do": "steer", "point": "resid_mid", "layers": [0, 2], "vector": vector(3), "keep_norm": True, "strength": 4}
    ],
    "steer generated tokens": [
        {"do": "steer", "point": "resid_mid", "layers": [1], "vector": vector(4), "strength": 5,
         "positions": "generated"}
    ],
    "steer one step": [
        {"do": "steer", "point": "mlp_out", "layers": [1], "vector": vector(5), "strength": 9, "steps": [0, 2]}
    ],
    "zero a branch": [{"do": "ablate", "point": "mixer_out", "layers": [1]}],
    "mean of a branch": [{"do": "ablate", "point": "mlp_out", "layers": "all", "to": "mean"}],
    "resample": [
        {"do": "ablate", "point": "resid_post", "layers": [0], "to": "resample", "source": {"prompt": [9, 8, 7, 6]}}
    ],
    "patch": [
        {"do": "patch", "point": "resid_pre", "layers": [1], "positions": [1, 3],
         "source": {"prompt": [5, 6, 7, 8, 9], "positions": [2, 4]}}
    ],
    "project out": [{"do": "project_out", "point": "resid_mid", "layers": "all", "direction": vector(6)}],
    "scale heads": [{"do": "scale", "point": "z", "layers": [0, 1], "heads": [1], "factor": -3.0}],
    "scale a read": [{"do": "scale", "point": "mixer_in", "layers": [2], "factor": 0.2}],
    "clamp a feature": [{"do": "clamp", "point": "mlp_post", "layers": "all", "feature": 7, "value": 5.0}],
    "clamp a direction": [{"do": "clamp", "point": "resid_post", "layers": [0], "direction": vector(7), "max": 0.0}],
    "noise": [{"do": "noise", "point": "q", "layers": [1], "std": 2.0, "seed": 4}],
    "swap": [{"do": "swap", "point": "resid_post", "layers": [0], "positions": [1, 4]}],
    "replace": [{"do": "replace", "point": "v", "layers": [1], "positions": [2], "tensor": [matrix(8, 1, 32)]}],
    "low rank": [{"do": "low_rank", "point": "mlp_in", "layers": [1], "down": matrix(9, 2, 64),
                  "up": matrix(10, 64, 2)}],
    "skip a block": [{"do": "skip", "what": "block", "layers": [1]}],
    "skip a branch": [{"do": "skip", "what": "mlp", "layers": [2]}],
    "several": [
        {"do": "steer", "point": "resid_post", "layers": [0], "vector": vector(11)},
        {"do": "scale", "point": "resid_post", "layers": [0], "factor": 0.5, "positions": "text=be"},
        {"do": "ablate", "point": "z", "layers": [1], "heads": [0]},
    ],
}  # fmt: skip


def asked() -> list[list[int]]:
    """Of different lengths, and a token that "be" is the text of."""
    return [[1, 4, *ids] for ids in (*prompts(2, 7), *prompts(2, 11, seed=1), *prompts(1, 20, seed=2))]
