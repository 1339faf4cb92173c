"""What hookmap says to the same questions."""

from functools import partial
from pathlib import Path
from typing import Any

import questions as q
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hookmap

POINTS = (
    "resid_pre", "resid_mid", "resid_post", "mixer_out", "mixer_out_raw", "mlp_out", "mlp_out_raw", "z", "pattern",
    "q", "k", "q_rot", "k_rot", "attn_scores", "mlp_pre", "mlp_pre_linear", "mlp_post",
)  # fmt: skip


def load(folder: Path) -> Any:
    """With eager attention, as both peers run it: another kernel would add in another order."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def hookmaps_answers(folder: Path) -> q.Answers:
    found = q.Answers()
    hm = hookmap.open(load(folder), tokenizer=AutoTokenizer.from_pretrained(folder))

    def read(point: str, layer: int) -> torch.Tensor:
        run = hm.capture([q.TOKENS], [point], [layer], max_new_tokens=0)[point, layer]
        return q.seen(point, run[0])

    def written(do: str, point: str, **what: Any) -> torch.Tensor:
        edit = {"do": do, "point": point, "layers": q.LAYER, **what}
        return hm.capture([q.TOKENS], ["logits"], max_new_tokens=0, interventions=[edit]).read(0, "logits")

    found.ask("logits", lambda: hm.capture([q.TOKENS], ["logits"], max_new_tokens=0).read(0, "logits"))
    for point in POINTS:
        for layer in range(q.LAYERS):
            found.ask(f"read {point} {layer}", partial(read, point, layer))
    found.ask("lens", lambda: lens(hm))
    steer = {"vector": q.VECTOR, "strength": q.STRENGTH}
    for point in ("resid_post", "resid_mid", "mlp_out", "mlp_out_raw"):
        found.ask(f"steer {point}", partial(written, "steer", point, **steer))
    found.ask("steer at places", lambda: written("steer", "resid_post", positions=q.PLACES, **steer))
    for point in ("mixer_out", "mixer_out_raw", "mlp_out", "mlp_out_raw"):
        found.ask(f"ablate {point}", partial(written, "ablate", point))
    found.ask("ablate head", lambda: written("ablate", "z", heads=[q.HEAD]))
    source = {"positions": q.PLACES, "source": {"prompt": q.SOURCE}}
    for point in ("resid_pre", "resid_mid"):
        found.ask(f"patch {point}", partial(written, "patch", point, **source))
    found.ask("sweep", lambda: sweep(hm))
    found.ask("attribution", lambda: hm.attribute(q.TOKENS, q.TARGET, q.AGAINST).values[:-1, 0])
    return found


def lens(hm: Any) -> torch.Tensor:
    top = hm.map.d_vocab
    found = hm.lens(q.TOKENS, top=top)
    return torch.zeros_like(found.top_probabilities).scatter_(-1, found.top_ids, found.top_probabilities)


def sweep(hm: Any) -> torch.Tensor:
    found: torch.Tensor = hm.sweep(q.SOURCE, q.TOKENS, q.TARGET, q.AGAINST).grid.values
    return found
