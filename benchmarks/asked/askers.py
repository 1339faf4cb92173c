"""How each program is asked for the points of one model. Every interpreter imports this: torch alone at the top.

An asker gets the model's folder and what is asked, and notes in `Said` a tensor, a refusal or an error for each
(point, layer). Each program answers in its own best way: by its own names where it has some; nnsight reads the modules
that plain hooks found.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

POINTS = (
    "logits", "resid_pre", "resid_mid", "resid_post", "mixer_out", "mlp_out", "mixer_out_raw", "mlp_out_raw",
    "q", "k", "v", "z", "attn_scores", "pattern", "attn_result",
)  # fmt: skip


@dataclass
class Said:
    """What one program says of one model. A key is a point, or `POINT LAYER`."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def give(self, key: str, get: Callable[[], Any], refusals: tuple[type[Exception], ...] = ()) -> None:
        try:
            with torch.no_grad():
                self.tensors[key] = get().detach().float().cpu().contiguous().clone()
        except refusals as error:
            self.refused[key] = in_a_line(error)
        except Exception as error:  # whatever a program raises is its answer
            self.failed[key] = in_a_line(error)

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        save_file(self.tensors, _beside(path, ".safetensors"))
        document = {"refused": self.refused, "failed": self.failed}
        _beside(path, ".json").write_text(json.dumps(document, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Said":
        from safetensors.torch import load_file

        document = json.loads(_beside(path, ".json").read_text(encoding="utf-8"))
        tensors = _beside(path, ".safetensors")
        return cls(load_file(tensors) if tensors.exists() else {}, document["refused"], document["failed"])


def _beside(path: Path, ending: str) -> Path:
    """Of a model type with a dot in its name, too."""
    return path.with_name(path.name + ending)


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@dataclass(frozen=True)
class Asked:
    tokens: list[int]
    layers: list[int]
    blocks: str
    """the path of the list of blocks, as plain hooks found it"""
    places: dict[str, dict[str, tuple[str, str, float]]]
    """point -> layer -> a module, its side, and a factor"""

    @classmethod
    def load(cls, folder: Path) -> "Asked":
        return cls(**json.loads((folder / "asked.json").read_text(encoding="utf-8")))

    @property
    def ids(self) -> torch.Tensor:
        return torch.tensor([self.tokens])


def checkpoint(folder: Path) -> Any:
    """The model as transformers loads it, with eager attention where it has that."""
    import transformers

    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    found = getattr(transformers, name)
    try:
        return found.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    except (ValueError, TypeError):
        return found.from_pretrained(folder, dtype=torch.float32).eval()


def hookmap(folder: Path, asked: Asked, said: Said) -> None:
    import hookmap
    from hookmap.errors import HookmapError

    hm = hookmap.open(checkpoint(folder))
    if (own := hm.map.layer_access_pattern.removesuffix("[i]")) != asked.blocks:
        raise ValueError(f"its layers are those of {own}, and the plain reference's those of {asked.blocks}")
    there: dict[str, list[int]] = {}
    for point in POINTS[1:]:
        for layer in asked.layers:
            kind = hm.map.kind_of(layer)
            if point in kind.points or (point == "attn_result" and "z" in kind.points):
                there.setdefault(point, []).append(layer)
            else:
                said.refused[f"{point} {layer}"] = kind.unavailable.get(point, "the map has no such point here")

    def read(points: dict[str, Any]) -> Any:
        return hm.capture([asked.tokens], points, max_new_tokens=0)

    said.give("logits", lambda: hm.capture([asked.tokens], ["logits"], max_new_tokens=0)["logits"])
    run = at_once(lambda: read(there))
    for point, layers in there.items():
        for layer in layers:
            said.give(
                f"{point} {layer}",
                lambda: (run or read({point: [layer]}))[point, layer],  # noqa: B023
                (HookmapError,),
            )


def at_once(read: Callable[[], Any]) -> Any:
    """All points in one pass; None where one of them stops it, and each is asked by itself then."""
    try:
        return read()
    except Exception:
        return None


def transformer_lens(folder: Path, asked: Asked, said: Said) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    names = {
        "resid_pre": ["hook_resid_pre"], "resid_mid": ["hook_resid_mid"], "resid_post": ["hook_resid_post"],
        "mixer_out": ["hook_attn_out", "hook_mixer_out"], "mlp_out": ["hook_mlp_out"], "z": ["attn.hook_z"],
        "q": ["attn.hook_q"], "k": ["attn.hook_k"], "v": ["attn.hook_v"], "pattern": ["attn.hook_pattern"],
        "attn_scores": ["attn.hook_attn_scores"], "attn_result": ["attn.hook_result"],
    }  # fmt: skip
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(asked.ids)
    said.give("logits", lambda: logits)
    results: Any = {}
    try:  # separate, for it makes attention compute another way
        bridge.set_use_attn_result(True)
        with torch.no_grad():
            results = bridge.run_with_cache(asked.ids)[1]
    except Exception as error:
        said.refused |= {f"attn_result {layer}": in_a_line(error) for layer in asked.layers}
    for point, own in names.items():
        for layer in asked.layers:
            key, held = f"{point} {layer}", results if point == "attn_result" else cache
            name = next((f"blocks.{layer}.{each}" for each in own if f"blocks.{layer}.{each}" in held), None)
            if name is None:
                said.refused.setdefault(key, f"its bridge of this model has no {' or '.join(own)}")
            else:
                said.give(key, lambda: held[name])  # noqa: B023


def nnterp(folder: Path, asked: Asked, said: Said) -> None:
    from nnterp import StandardizedTransformer

    refused, settings = "", {"device_map": "cpu", "allow_multimodal": True}
    try:
        model = StandardizedTransformer(str(folder), enable_attention_probs=True, **settings)
    except Exception as error:
        refused = in_a_line(error)
        model = StandardizedTransformer(str(folder), attn_implementation="eager", **settings)

    def read(get: Callable[[], Any]) -> Any:
        with model.trace(asked.ids):
            out = get().save()
        return out

    said.give("logits", lambda: read(lambda: model.logits))
    accessors = {
        "resid_pre": model.layers_input, "resid_post": model.layers_output,
        "mixer_out_raw": model.attentions_output, "mlp_out_raw": model.mlps_output,
    }  # fmt: skip
    for layer in asked.layers:
        for point, accessor in accessors.items():
            said.give(f"{point} {layer}", lambda: read(lambda: accessor[layer]))  # noqa: B023
        if refused:
            said.refused[f"pattern {layer}"] = refused
        else:
            said.give(f"pattern {layer}", lambda: read(lambda: model.attention_probabilities[layer]))  # noqa: B023


def interp_engine(folder: Path, asked: Asked, said: Said) -> None:
    from interp_engine import load_model
    from interp_engine.capture import capture

    model = load_model(str(folder), backend="eager", device="cpu", dtype="float32", attn_implementation="eager")
    names = {
        "resid_pre": "resid_pre", "resid_mid": "resid_mid", "resid_post": "resid_post", "mixer_out": "attn_out_post",
        "mixer_out_raw": "attn_out", "mlp_out": "mlp_out_post", "mlp_out_raw": "mlp_out", "q": "q_norm_in",
        "k": "k_norm_in", "v": "value", "z": "z", "attn_scores": "attn_scores", "pattern": "attn_probs",
    }  # fmt: skip
    there = []
    parts = max((slot.of for slot in model.arch.layer_slots), default=1)  # it counts the pairs of branches of a block

    def own(point: str, layer: int) -> int:
        return layer * parts + (parts - 1 if point == "resid_post" else 0)

    for point, name in names.items():
        for layer in asked.layers:
            try:
                why = model.refuses(name, own(point, layer))
            except Exception as error:
                why = in_a_line(error)
            if why is None:
                there.append((point, name, layer, own(point, layer)))
            else:
                said.refused[f"{point} {layer}"] = " ".join(str(why).split())[:300]

    def read(wanted: list[tuple[str, int]]) -> Any:
        return capture(model, asked.ids, wanted)

    said.give("logits", lambda: read([("resid_post", asked.layers[0])]).output.logits)
    run = at_once(lambda: read([(name, number) for _, name, _, number in there]))
    for point, name, layer, number in there:
        said.give(
            f"{point} {layer}",
            lambda: (run or read([(name, number)])).get(name, number),  # noqa: B023
            (ValueError,),  # how it refuses
        )


def torchlens(folder: Path, asked: Asked, said: Said) -> None:
    """Its facets, named parts of modules by its recipes; where it has none, the output of a module by its path."""
    import torchlens
    from torchlens.semantic.facets import MissingFacetError

    model = checkpoint(folder)  # the trace does not keep it
    trace = torchlens.trace(model, [], {"input_ids": asked.ids, "use_cache": False})
    names = {
        "resid_pre": "resid_pre", "resid_mid": "resid_mid", "resid_post": "resid_post", "mixer_out_raw": "attn_out",
        "mlp_out_raw": "down_out", "q": "q", "k": "k", "v": "v", "z": "z", "attn_scores": "scores",
        "pattern": "pattern", "attn_result": "result",
    }  # fmt: skip
    modules = {str(module.address): module for module in trace.modules}
    for point in POINTS[1:]:
        for layer in asked.layers:
            key, name = f"{point} {layer}", names.get(point, "")
            within = [m for path, m in modules.items() if f"{path}.".startswith(f"{asked.blocks}.{layer}.")]
            having = min((m for m in within if name and m.facets.has(name)), key=lambda m: len(m.address), default=None)
            path, side, factor = asked.places.get(point, {}).get(str(layer), ("", "", 1.0))
            if having is not None:
                said.give(key, lambda: value_of(having.facets[name]), (MissingFacetError,))  # noqa: B023
            if key not in said.tensors and side == "output" and path in modules:
                said.refused.pop(key, None)
                said.give(key, lambda: output_of(modules[path]) * factor)  # noqa: B023
            if key not in said.tensors and key not in said.failed:
                said.refused.setdefault(key, "no recipe of its facets gives it here, and no module's output is it")


def output_of(module: Any) -> torch.Tensor:
    try:
        return value_of(module.out)
    except ValueError:  # several outputs: [batch, pos, width], and not the weights
        return next(value_of(out) for out in module.outs if value_of(out).ndim == 3)


def value_of(facet: Any) -> torch.Tensor:
    for _ in range(3):
        if isinstance(facet, torch.Tensor):
            return facet
        facet = next((getattr(facet, name) for name in ("value", "out", "tensor") if hasattr(facet, name)), facet)
    raise TypeError(f"the facet is no tensor: {facet}")


def nnsight(folder: Path, asked: Asked, said: Said) -> None:
    """The modules that plain hooks found: nnsight has no names for points, the user writes paths."""
    from nnsight import NNsight

    model = NNsight(checkpoint(folder))

    def read(path: str, side: str, factor: float) -> Any:
        module = model
        for name in path.split("."):
            own = f"E_{name}" if name in ("input", "inputs", "output") else name  # its name of a module called so
            module = module[int(name)] if name.isdecimal() else getattr(module, own)
        with model.trace(input_ids=asked.ids, use_cache=False):
            if side == "input":
                args, kwargs = module.inputs
                out = (args[0] if args else kwargs.get("hidden_states", module.input)).save()
            else:
                out = module.output.save()
        return (out[0] if isinstance(out, tuple) else out) * factor

    def logits() -> Any:
        with model.trace(input_ids=asked.ids, use_cache=False):
            out = model.output.logits.save()
        return out

    said.give("logits", logits)
    for point in POINTS[1:]:
        for layer in asked.layers:
            place = asked.places.get(point, {}).get(str(layer))
            if place is None:
                said.refused[f"{point} {layer}"] = "no module's input or output is this tensor"
            else:
                said.give(f"{point} {layer}", lambda: read(*place))  # noqa: B023


PROGRAMS: dict[str, Callable[[Path, Asked, Said], None]] = {
    "hookmap": hookmap, "transformer-lens": transformer_lens, "nnterp": nnterp, "interp-engine": interp_engine,
    "torchlens": torchlens, "nnsight": nnsight,
}  # fmt: skip
PACKAGES = {
    "hookmap": "hookmap", "transformer-lens": "transformer_lens.model_bridge", "nnterp": "nnterp",
    "interp-engine": "interp_engine", "torchlens": "torch", "nnsight": "nnsight",
}  # fmt: skip
"""what a worker imports before it makes a process for each model; TorchLens would not trace in that process then"""
