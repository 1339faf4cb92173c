"""A dictionary as bytes, for other processes: its tensors as they are, with all that is not in them beside."""

import json
from dataclasses import asdict
from typing import Any

from safetensors.torch import load, save

from hookmap.analysis.dictionaries.dictionary import About, Dictionary
from hookmap.documents import read_json
from hookmap.errors import SelectionError

_PLAIN = ("activation", "k", "normalisation", "by_norms")
_GATE = "gate."


def to_bytes(found: Any) -> bytes:
    """Raises SelectionError for an object of another library, which would have to be pickled."""
    if type(found) is not Dictionary:
        raise SelectionError(
            f"dictionaries: a {type(found).__name__} cannot be sent to workers, which make a plain dictionary of "
            "what they get. Load its files with hookmap.load_dictionary, or hookmap.open the model here."
        )
    told = {**{name: getattr(found, name) for name in _PLAIN}, "about": asdict(found.about)}
    tensors = {name: each.detach().cpu().contiguous().clone() for name, each in found.tensors().items()}
    return bytes(save(tensors, {"hookmap": json.dumps(told)}))


def from_bytes(data: bytes) -> Dictionary:
    """The same again."""
    size = int.from_bytes(data[:8], "little")
    told = json.loads(read_json(data[8 : 8 + size])["__metadata__"]["hookmap"])
    tensors: dict[str, Any] = load(data)
    gate = {name.removeprefix(_GATE): tensors.pop(name) for name in list(tensors) if name.startswith(_GATE)}
    return Dictionary(**tensors, gate=gate, about=About(**told.pop("about")), **told)
