"""A made-up looped architecture as the hub would bring it: three files that import one another relatively.

A prelude, a core that runs several times on its own state joined with what the prelude gave, and a coda: lists of
their own, and no name that is transformers'. When its code runs, it leaves a file `ran` in the folder.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.tiny_tokenizer import tiny_tokenizer

CONFIGURATION = """
from pathlib import Path

from transformers import PretrainedConfig

Path("{ran}").touch()


class SpoolConfig(PretrainedConfig):
    model_type = "spool"
    attribute_map = {"num_hidden_layers": "turns"}  # transformers' generate asks for it

    def __init__(self, breadth=24, turns=3, words=97, **kwargs):
        self.breadth, self.turns, self.words = breadth, turns, words
        super().__init__(**kwargs)
"""
PARTS = """
import torch
from torch import nn


class Strand(nn.Module):
    \"\"\"One head of attention over all positions before.\"\"\"

    def __init__(self, breadth):
        super().__init__()
        self.ask, self.answer, self.tale = (nn.Linear(breadth, breadth, bias=False) for _ in range(3))
        self.home = nn.Linear(breadth, breadth, bias=False)

    def forward(self, thread):
        score = self.ask(thread) @ self.answer(thread).mT / thread.shape[-1] ** 0.5
        later = torch.ones(score.shape[-2:], dtype=torch.bool, device=thread.device).triu(1)
        return self.home(score.masked_fill(later, float("-inf")).softmax(-1) @ self.tale(thread))


class Winding(nn.Module):
    def __init__(self, breadth):
        super().__init__()
        self.calm, self.strand = nn.LayerNorm(breadth), Strand(breadth)
        self.wide, self.slim = nn.Linear(breadth, 40), nn.Linear(40, breadth)

    def forward(self, thread):
        thread = thread + self.strand(self.calm(thread))
        return thread + self.slim(torch.relu(self.wide(self.calm(thread))))  # one norm, twice in a run
"""
MODELLING = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_spool import SpoolConfig
from .parts_spool import Winding


class SpoolForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = SpoolConfig

    def __init__(self, config):
        super().__init__(config)
        self.tongue = nn.Embedding(config.words, config.breadth)
        self.outset, self.middle, self.finish = (
            nn.ModuleList(Winding(config.breadth) for _ in range(count)) for count in (1, 2, 1)
        )
        self.begin = nn.Parameter(torch.zeros(config.breadth))
        self.bind = nn.Linear(2 * config.breadth, config.breadth)
        self.last = nn.LayerNorm(config.breadth)
        self.speak = nn.Linear(config.breadth, config.words, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.tongue

    def forward(self, input_ids, attention_mask=None, output_hidden_states=False, **kwargs):
        seen = []
        thread = self.run(self.outset, self.tongue(input_ids), seen)
        state = self.begin.expand_as(thread)
        for _ in range(self.config.turns):
            state = self.run(self.middle, self.bind(torch.cat([state, thread], -1)), seen)
        state = self.last(self.run(self.finish, state, seen))
        hidden = (*seen, state) if output_hidden_states else None
        return CausalLMOutputWithPast(logits=self.speak(state), hidden_states=hidden)

    def run(self, windings, thread, seen):
        for winding in windings:
            seen.append(thread)
            thread = winding(thread)
        return thread

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}
"""
LAYERS = ("outset.0", "middle.0", "middle.1", "finish.0")
"""the blocks in the order in which they begin to run"""


def write_model(folder: Path, turns: int = 3) -> None:
    """The folder of a whole small model: code, config, weights of O(1), tokenizer."""
    folder.mkdir(parents=True)
    (folder / "configuration_spool.py").write_text(CONFIGURATION.replace("{ran}", str(folder / "ran")))
    (folder / "parts_spool.py").write_text(PARTS)
    (folder / "modeling_spool.py").write_text(MODELLING)
    config = {
        "model_type": "spool",
        "architectures": ["SpoolForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_spool.SpoolConfig",
            "AutoModelForCausalLM": "modeling_spool.SpoolForCausalLM",
        },
        "breadth": 24,
        "turns": turns,
        "words": 97,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("tongue.weight", "speak.weight"), (97, 24))
    shapes |= {"last.weight": (24,), "last.bias": (24,), "begin": (24,), "bind.weight": (24, 48), "bind.bias": (24,)}
    for layer in LAYERS:
        shapes |= {f"{layer}.strand.{name}.weight": (24, 24) for name in ("ask", "answer", "tale", "home")}
        shapes |= {f"{layer}.calm.weight": (24,), f"{layer}.calm.bias": (24,)}
        shapes |= {f"{layer}.wide.weight": (40, 24), f"{layer}.wide.bias": (40,)}
        shapes |= {f"{layer}.slim.weight": (24, 40), f"{layer}.slim.bias": (24,)}
    return {
        name: torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 1.0)
        for name, shape in shapes.items()
    }
