"""A made-up architecture as the hub would bring it: modelling files in a model folder, named in its config.json.

No name in it is transformers' own. When its code runs, it leaves a file `ran` in the folder.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from string import Template

import torch
from safetensors.torch import save_file
from support.tiny_tokenizer import tiny_tokenizer

Shapes = dict[str, tuple[int, ...]]
CONFIGURATION = Template("""
from pathlib import Path

from transformers import PretrainedConfig

Path("$ran").touch()


class ${name}Config(PretrainedConfig):
    model_type = "$type"
    attribute_map = {"num_hidden_layers": "$depth"}  # transformers' generate asks for it

    def __init__(self, breadth=24, $depth=3, words=97, **kwargs):
        self.breadth, self.$depth, self.words = breadth, $depth, words
        super().__init__(**kwargs)
""")
WEFT = """
import torch
from torch import nn


class Weft(nn.Module):
    \"\"\"One head of attention over all positions before.\"\"\"

    def __init__(self, breadth):
        super().__init__()
        self.ask, self.answer, self.tale = (nn.Linear(breadth, breadth, bias=False) for _ in range(3))
        self.home = nn.Linear(breadth, breadth, bias=False)

    def forward(self, thread):
        score = self.ask(thread) @ self.answer(thread).mT / thread.shape[-1] ** 0.5
        later = torch.ones(score.shape[-2:], dtype=torch.bool, device=thread.device).triu(1)
        return self.home(score.masked_fill(later, float("-inf")).softmax(-1) @ self.tale(thread))
"""
MODELLING = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_loom import LoomConfig
from .weft_loom import Weft


class Storey(nn.Module):
    def __init__(self, breadth):
        super().__init__()
        self.calm, self.cool = nn.LayerNorm(breadth), nn.LayerNorm(breadth)
        self.weft = Weft(breadth)
        self.wide, self.slim = nn.Linear(breadth, 40), nn.Linear(40, breadth)

    def forward(self, *, spare=None, thread):
        thread = thread + self.weft(self.calm(thread))
        return {"cloth": thread + 0.5 * self.slim(torch.relu(self.wide(self.cool(thread))))}


class LoomForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = LoomConfig

    def __init__(self, config):
        super().__init__(config)
        self.tongue = nn.Embedding(config.words, config.breadth)
        self.tower = nn.ModuleList(Storey(config.breadth) for _ in range(config.storeys))
        self.last = nn.LayerNorm(config.breadth)
        self.speak = nn.Linear(config.breadth, config.words, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.tongue

    def forward(self, input_ids, attention_mask=None, output_hidden_states=False, **kwargs):
        thread, seen = self.tongue(input_ids), []
        for storey in self.tower:
            seen.append(thread)
            thread = storey(thread=thread)["cloth"]
        hidden = (*seen, self.last(thread)) if output_hidden_states else None
        return CausalLMOutputWithPast(logits=self.speak(self.last(thread)), hidden_states=hidden)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}
"""


def write_model(folder: Path) -> None:
    """The folder of a whole small model: code, config, weights of O(1), tokenizer."""
    shapes = {f"tower.{i}.{name}": shape for i in range(3) for name, shape in shapes_of_block("weft", "calm", "cool")}
    write_folder(folder, "Loom", {"storeys": 3}, {"weft": WEFT, "modeling": MODELLING}, shapes)


def write_folder(folder: Path, name: str, depth: dict[str, int], code: dict[str, str], shapes: Shapes) -> None:
    """`depth`: the config's own word for its number of layers, and that number; `code`: files by their kind."""
    kind, (word,) = name.lower(), depth
    folder.mkdir(parents=True)
    configuration = CONFIGURATION.substitute(ran=folder / "ran", name=name, type=kind, depth=word)
    for file, text in {"configuration": configuration, **code}.items():
        (folder / f"{file}_{kind}.py").write_text(text)
    config = {
        "model_type": kind,
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_{kind}.{name}Config",
            "AutoModelForCausalLM": f"modeling_{kind}.{name}ForCausalLM",
        },
        "breadth": 24,
        **depth,
        "words": 97,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(7)
    ends: Shapes = dict.fromkeys(("tongue.weight", "speak.weight"), (97, 24))
    ends |= dict.fromkeys(("last.weight", "last.bias"), (24,))
    weights = {
        name: torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 1.0)
        for name, shape in (ends | shapes).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)


def shapes_of_block(attention: str, *norms: str) -> Iterable[tuple[str, tuple[int, ...]]]:
    """The weights of a block with these names."""
    shapes: Shapes = {f"{attention}.{name}.weight": (24, 24) for name in ("ask", "answer", "tale", "home")}
    shapes |= {f"{norm}.{name}": (24,) for norm in norms for name in ("weight", "bias")}
    shapes |= {"wide.weight": (40, 24), "wide.bias": (40,), "slim.weight": (24, 40), "slim.bias": (24,)}
    return shapes.items()
