"""The demo model with heads of 32, the smallest that vLLM's kernels take: the same function, with other weights."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hookmap.demo import MODEL_PATH

WIDE = 32


def save(folder: Path) -> Path:
    """Writes the checkpoint.

    A head's numbers stand in the first places of each half, since rotary embeddings pair the halves, and zeros behind
    them. The base of the rotary angles is squared, the heads' norms see twice as many numbers, and scores are divided
    by a root that is larger: scales of the norms make up for both.
    """
    shutil.copytree(MODEL_PATH, folder)
    config = json.loads((folder / "config.json").read_text())
    narrow = config["head_dim"]
    assert narrow * 2 == WIDE
    config["head_dim"] = WIDE
    config["rope_parameters"]["rope_theta"] **= 2
    (folder / "config.json").write_text(json.dumps(config))
    places = torch.cat([torch.arange(narrow // 2), torch.arange(narrow // 2) + WIDE // 2])
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        last = name.split(".")[-2]
        if last in ("q_proj", "k_proj", "v_proj"):
            heads = weight.view(-1, narrow, weight.shape[1])
            wide = weight.new_zeros(len(heads), WIDE, weight.shape[1])
            wide[:, places] = heads
            weights[name] = wide.flatten(0, 1).contiguous()
        elif last == "o_proj":
            heads = weight.view(len(weight), -1, narrow)
            wide = weight.new_zeros(len(weight), heads.shape[1], WIDE)
            wide[:, :, places] = heads
            weights[name] = wide.flatten(1).contiguous()
        elif last in ("q_norm", "k_norm"):
            wide = weight.new_zeros(WIDE)
            wide[places] = weight * 2**-0.5 * (2**0.5 if last == "q_norm" else 1.0)
            weights[name] = wide
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
