"""A made-up looped architecture as the hub would bring it: files that import one another relatively.

A prelude, a core that runs several times on its own state joined with what the prelude gave, and a coda: lists of
their own, and no name that is transformers'. When its code runs, it leaves a file `ran` in the folder.
"""

from pathlib import Path

from support.odd_code import WEFT, Shapes, shapes_of_block, write_folder

PARTS = """
import torch
from torch import nn

from .weft_spool import Weft


class Winding(nn.Module):
    def __init__(self, breadth):
        super().__init__()
        self.calm, self.strand = nn.LayerNorm(breadth), Weft(breadth)
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
    shapes: Shapes = {"begin": (24,), "bind.weight": (24, 48), "bind.bias": (24,)}
    shapes |= {f"{layer}.{name}": shape for layer in LAYERS for name, shape in shapes_of_block("strand", "calm")}
    write_folder(folder, "Spool", {"turns": turns}, {"weft": WEFT, "parts": PARTS, "modeling": MODELLING}, shapes)
