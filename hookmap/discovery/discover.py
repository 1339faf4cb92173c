"""`discover`: the map of a model, from the dataflow of one forward pass without weights.

module -> dataflow -> values -> layer list -> blocks -> points -> kinds -> ArchitectureMap
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hookmap._version import __version__
from hookmap.discovery.between_runs import before_norm, between
from hookmap.discovery.block import Block
from hookmap.discovery.block_points import BlockPoints, points_of_block
from hookmap.discovery.dataflow import Dataflow, record
from hookmap.discovery.full_width import at_full_width
from hookmap.discovery.idle import idle_module
from hookmap.discovery.layer_choice import find_layers
from hookmap.discovery.layer_list import LayerList, shape_at
from hookmap.discovery.locate import Location, captured_axes
from hookmap.discovery.model_points import read_outside
from hookmap.discovery.points_of_each_run import points_of_runs
from hookmap.discovery.towers import read_tower
from hookmap.discovery.values import Values
from hookmap.errors import DiscoveryError, HookmapError, ModelError
from hookmap.loading import configs, modules, other_inputs
from hookmap.loading.encoder_decoder import tokens_argument, with_source
from hookmap.loading.modules import model_inside
from hookmap.loading.quantised import plain_products
from hookmap.loading.towers import is_tower, tower_of
from hookmap.loading.wrappers import check_wrapper, named
from hookmap.maps.describe import layers_text
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.layer_order import text_of
from hookmap.maps.points import POINTS
from hookmap.maps.templates import BlockKind, PointTemplate

Part = Literal["text", "vision"]
_NO_TEXT = {"embed": "this part reads pictures, and no token ids", "logits": "this part gives no logits of tokens"}


def discover(
    source: Any, *, part: Part = "text", trust_remote_code: bool = False, revision: str | None = None
) -> ArchitectureMap:
    """The map of a model, read from its dataflow.

    `part`: the language model, or the tower that reads pictures, whose positions are patches. A model that reads
    pictures alone is its own tower.

    `source`: a hub id, a local folder, a transformers config, a torch module (traced as it stands, its weights
    untouched) or an nnsight model. Raises ModelError where it cannot be loaded or built, DiscoveryError where its
    dataflow has no structure that hookmap understands.
    """
    if isinstance(source, (str, Path)):
        config, published = config_of(source, trust_remote_code, revision)
        found = _of_config(config, str(source), trust_remote_code, part)
        # A published shape is less than the published config: the map claims no hash.
        return found.model_copy(update={"scope": "architecture", "config_hash": None}) if published else found
    if hasattr(source, "to_dict") and hasattr(source, "model_type") and not isinstance(source, nn.Module):
        return _of_config(source, getattr(source, "_name_or_path", "") or None, trust_remote_code, part)
    module = modules.unwrap(source)
    return _of_loaded_tower(module) if part == "vision" or is_tower(module) else _of_module(module)


def config_of(source: str | Path, trust_remote_code: bool = False, revision: str | None = None) -> tuple[Any, bool]:
    """The transformers config of a hub id or a folder, and whether it is only the shape in a shipped map.

    A shipped map's shape is used where neither the hub nor the cache has the config. Raises ModelError, with what was
    tried.
    """
    try:
        return configs.load_config(source, trust_remote_code, revision), False
    except ModelError:
        from hookmap.maps.shipped import shipped_config

        if (config := shipped_config(str(source))) is None:
            raise
        return config, True


def _of_config(config: Any, model_id: str | None, trust_remote_code: bool, part: Part = "text") -> ArchitectureMap:
    configs.say_another_class(config, model_id)
    model = configs.build(config, trust_remote_code=trust_remote_code)
    if part == "vision" or is_tower(model):
        return _of_tower_config(model, config, model_id, trust_remote_code)
    model, flow, seq, config_small = _flow_of_config(model, config, trust_remote_code)
    if config_small is None:
        how = "one forward pass on the meta device, full size"
        return assemble(model, flow, seq, config, model_id, how)
    how = "one forward pass of a narrow copy of full depth on the CPU"
    return at_full_width(assemble(model, flow, seq, config, model_id, how), config, config_small)


def flow_of(source: Any, trust_remote_code: bool = False) -> tuple[Dataflow, int]:
    """The dataflow of one forward pass of what `discover` takes, and how many tokens it reads. Raises as it does."""
    if isinstance(source, (str, Path)):
        source = config_of(source, trust_remote_code)[0]
    if hasattr(source, "to_dict") and hasattr(source, "model_type") and not isinstance(source, nn.Module):
        dtype = getattr(source, "dtype", None) or torch.float32  # as it is loaded: a cast is an operation
        model = configs.build(source, dtype=dtype, trust_remote_code=trust_remote_code)
        return _flow_of_config(model, source, trust_remote_code)[1:3]
    return _flow_of_module(modules.unwrap(source))


def _flow_of_config(
    model: nn.Module, config: Any, trust_remote_code: bool
) -> tuple[nn.Module, Dataflow, int, Any | None]:
    """The model that ran, its dataflow, the tokens that it read, and its config where it is a narrow copy."""
    seq = modules.sequence_length(config)
    try:
        return model, _one_pass(model, config, "meta", seq), seq, None
    except HookmapError:
        raise
    except Exception as error:  # what a model raises where tensors have no data has no common type
        from hookmap.loading.narrow import narrow_copy

        model, config_small = narrow_copy(config, trust_remote_code)
        seq = modules.sequence_length(config_small)
        try:
            return model, _one_pass(model, config, "cpu", seq), seq, config_small
        except Exception as second:
            raise DiscoveryError(
                f"{type(model).__name__} ran neither without weights ({other_inputs.said(error)}) "
                f"nor as a narrow copy ({other_inputs.said(second)})."
            ) from second


def _of_tower_config(model: nn.Module, config: Any, model_id: str | None, trust_remote_code: bool) -> ArchitectureMap:
    own = tower_of(model)[1].config
    try:
        return _of_tower(model, own, model_id, "one forward pass of the tower on the meta device, full size")
    except HookmapError:
        raise
    except Exception:  # as for a language model
        from hookmap.loading.narrow import narrow_copy

        small, _ = narrow_copy(config, trust_remote_code)
        how = "one forward pass of the tower of a narrow copy of full depth on the CPU"
        try:
            found = _of_tower(small, own, model_id, how)
        except HookmapError:
            raise
        except Exception as second:
            raise DiscoveryError(_no_pass(small, second)) from second
        return at_full_width(found, own, tower_of(small)[1].config).model_copy(update={"d_model": _width(found, model)})


def _width(found: ArchitectureMap, whole: nn.Module) -> int:
    """The stream's width in the whole model: that of the norm which reads it, or of the first product."""
    reader = whole.get_submodule(found.at_layer(found.pre_attention_path or found.layers_path, 0))
    sizes = [weight.shape[-1] for weight in reader.parameters()]
    if not sizes:
        raise DiscoveryError(f"no weight of {found.pre_attention_path} says how wide the stream is.")
    return sizes[0]


def _of_loaded_tower(model: nn.Module) -> ArchitectureMap:
    own = tower_of(model)[1].config
    with modules.eager(model), modules.plain_experts(model), plain_products(model, modules.device_of(model)):
        try:
            return _of_tower(model, own, getattr(own, "_name_or_path", "") or None, "one forward pass of the tower")
        except HookmapError:
            raise
        except Exception as error:
            raise DiscoveryError(_no_pass(model, error)) from error


def _no_pass(model: nn.Module, error: Exception) -> str:
    return (
        f"the part of {named(model)} that reads pictures did not run on a picture of noise: "
        f"{type(error).__name__}: {error}"
    )


def _of_tower(model: nn.Module, config: Any, model_id: str | None, how: str) -> ArchitectureMap:
    values, layers, tower = read_tower(model)
    found = _assembled(model, values, layers, config, model_id, how)
    if lone := [kind for kind in found.kinds if kind.mixer is None and kind.points]:
        raise DiscoveryError(
            f"{layers_text(lone[0].layers)} of {type(tower).__name__}: their dataflow shows nothing that goes from "
            "patch to patch. Where patches attend in windows, hookmap does not read it."
        )
    unavailable = {**found.model_unavailable, **{p: r for p, r in _NO_TEXT.items() if p not in found.model_points}}
    kinds = tuple(map(_of_patches, found.kinds))
    return found.model_copy(update={"part": "vision", "kinds": kinds, "model_unavailable": unavailable})


def _of_patches(kind: BlockKind) -> BlockKind:
    """The kind with the axes that its stream has: that of patches alone, where those of all pictures are on one."""
    stream = kind.points.get("resid_pre")
    one = stream is not None and all(term.flat for term in stream.terms)
    axes = ("patch" if axis == "pos" else axis for axis in kind.axes if not (one and axis == "batch"))
    return kind.model_copy(update={"axes": tuple(axes)})


def _one_pass(model: nn.Module, config: Any, device: Any, seq: int) -> Dataflow:
    given = with_source(model, modules.inputs(device, seq))

    def run(others: dict[str, Any]) -> Dataflow:
        every = {**given, **others}
        return record(model, every, modules.accepted(model, every))

    try:
        flow = other_inputs.ran(model, given, run)
        flow.tokens = tokens_argument(model)
        return flow
    except RuntimeError:
        if (rows := modules.rows_per_sequence(config)) == 1:
            raise
        return record(model, modules.inputs(device, seq, rows))


def _flow_of_module(model: nn.Module) -> tuple[Dataflow, int]:
    check_wrapper(model)
    config = getattr(model, "config", None)
    seq = modules.sequence_length(config, model)
    device = modules.device_of(model)
    with modules.eager(model), modules.plain_experts(model), plain_products(model, device):
        try:
            return _one_pass(model, config, device, seq), seq
        except HookmapError:
            raise
        except Exception as error:
            raise DiscoveryError(
                f"{named(model)} did not run on {seq} token ids: {other_inputs.said(error)}\n"
                "Expected a causal language model whose forward takes token ids, [batch, pos], and needs nothing else."
            ) from error


def _of_module(model: nn.Module) -> ArchitectureMap:
    flow, seq = _flow_of_module(model)
    config = getattr(model, "config", None)
    how = "one forward pass of the model as it stands"
    found = assemble(model, flow, seq, config, getattr(config, "_name_or_path", "") or None, how)
    inside = model_inside(model)
    blocks = model.get_submodule(found.at_layer(found.layers_path, 0))
    if inside is not None and blocks not in set(inside.modules()):
        raise DiscoveryError(
            f"the blocks that the dataflow of {named(model)} shows, {found.layers_path}, are not of the "
            f"{type(inside).__name__} in it, whose own blocks hand on something else than tensors."
        )
    return found


def assemble(
    model: nn.Module, flow: Dataflow, seq: int, config: Any, model_id: str | None, how: str
) -> ArchitectureMap:
    """The map of `model`, read from its dataflow."""
    values = Values(flow)
    return _assembled(model, values, find_layers(values, seq), config, model_id, how)


def _assembled(
    model: nn.Module, values: Values, layers: LayerList, config: Any, model_id: str | None, how: str
) -> ArchitectureMap:
    readings: dict[int, BlockPoints] = {}
    for number in sorted({number for number, _ in layers.streams}):
        times = range(layers.times(number))
        if all((number, run) in layers.streams for run in times):
            blocks = [Block(values, layers, number, run) for run in times]
            if (idle := idle_module(blocks[0])) is not None:
                raise DiscoveryError(_why_idle(model, number, idle))
            runs = list(map(points_of_block, blocks))
            readings[number] = points_of_runs(values, layers, number, runs)
    kinds = _kinds(layers, readings, values)
    outside = read_outside(values, layers, layers.tokens)
    parts = between(values, layers)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    return ArchitectureMap(
        architecture=modules.architecture_of(model),
        layer_access_pattern=layers.path.replace(".{i}", "[i]"),
        pre_attention_path=_first_reader(readings, "mixer"),
        pre_mlp_path=_first_reader(readings, "mlp"),
        scope="model",
        model_id=model_id,
        model_type=getattr(config, "model_type", None),
        config=configs.own_settings(config) if hasattr(config, "to_diff_dict") else {},
        config_hash=configs.config_hash(settings) if settings else None,
        transformers_version=version("transformers"),
        hookmap_version=__version__,
        num_layers=layers.length,
        d_model=layers.width,
        num_heads=_number(config, "num_attention_heads"),
        d_vocab=outside.d_vocab,
        embedding_path=outside.embedding_path,
        layers_path=layers.path,
        layer_names=layers.names,
        runs=_order(layers),
        final_norm_path=outside.final_norm_path,
        lm_head_path=outside.lm_head_path,
        model_points=_templates(outside.locations),
        model_unavailable=outside.unavailable,
        kinds=kinds,
        joined=not parts,
        between=parts | before_norm(values, layers, outside.normed),
        left_out=layers.uncovered_lists,
        discovered_by=how,
    )


def _why_idle(model: nn.Module, layer: int, module: str) -> str:
    return (
        f"{named(model)} does not compute here what it is meant to: in layer {layer}, {module} multiplies the stream "
        "with its weights, and what it adds to it does not depend on it. A model may do so where a kernel is missing."
    )


def _order(layers: LayerList) -> str:
    """The order in which the blocks run; nothing where each runs once, as they are numbered."""
    order = sorted(layers.calls, key=lambda run: layers.calls[run].enter)
    numbers = [number for number, _ in order]
    return "" if numbers == sorted(set(numbers)) else text_of(numbers)


def _kinds(layers: LayerList, readings: dict[int, BlockPoints], values: Values) -> tuple[BlockKind, ...]:
    """Blocks whose points are the same are one kind; layers that were never called are a kind without points."""
    groups: dict[str, tuple[list[int], BlockKind]] = {}
    for number in range(layers.length):
        kind = _kind(layers, number, readings.get(number), values)
        groups.setdefault(kind.model_dump_json(), ([], kind))[0].append(number)
    made: list[BlockKind] = []
    for numbers, kind in groups.values():
        twins = sum(other.name.split("#")[0] == kind.name for other in made)
        name = f"{kind.name}#{twins + 1}" if twins else kind.name
        made.append(kind.model_copy(update={"layers": tuple(numbers), "name": name}))
    return tuple(made)


def _kind(layers: LayerList, number: int, reading: BlockPoints | None, values: Values) -> BlockKind:
    if reading is None:
        names = [name for name, point in POINTS.items() if point.per_layer]
        times = layers.times(number)
        return BlockKind(
            name="no_stream" if times else "not_called", layers=(), branch_order="other", norm_placement="other",
            block_class=type(layers.calls[number, 0].module).__name__ if times else "", calls=max(times, 1),
            points={}, unavailable=dict.fromkeys(names, _why_no_stream(layers, number)),
        )  # fmt: skip
    name = "+".join(branch.type for branch in (reading.mixer, reading.mlp) if branch is not None)
    return BlockKind(
        name=name or reading.branch_order,
        block_class=type(layers.calls[number, 0].module).__name__,
        layers=(),
        branch_order=reading.branch_order,
        norm_placement=reading.norm_placement,
        axes=captured_axes(shape_at(values, layers.calls[number, 0], layers.streams[number, 0][0]), layers.seq),
        calls=layers.times(number),
        coupled=reading.coupled,
        mixer=reading.mixer,
        mlp=reading.mlp,
        cross_attn=reading.cross_attn,
        relations=tuple(map(str, reading.relations)),
        points=_templates(reading.locations),
        unavailable=reading.unavailable,
    )


def _why_no_stream(layers: LayerList, number: int) -> str:
    runs = range(layers.times(number))
    if not runs:
        return layers.unread.get(number, "this layer is never called on text alone")
    lacking = [run for run in runs if (number, run) not in layers.streams]
    if len(lacking) == len(runs):
        return layers.unread.get(number, "no stream was found in it")
    return f"in run {lacking[0]} of its {len(runs)}, no stream of all positions enters and leaves it"


def _templates(locations: dict[str, Location]) -> dict[str, PointTemplate]:
    """The locations in the order of the forward pass, each with its number in that order."""
    times = sorted({location.time for location in locations.values()})
    ordered = sorted(locations.items(), key=lambda item: item[1].time)
    return {
        n: PointTemplate(terms=t.terms, order=times.index(t.time), evidence=t.evidence, beside=t.beside, write=t.write)
        for n, t in ordered
    }


def _first_reader(readings: dict[int, BlockPoints], role: str) -> str | None:
    return next((path for reading in readings.values() if (path := reading.readers.get(role))), None)


def _number(config: Any, name: str) -> int | None:
    for each in (config, getattr(config, "text_config", None)):
        try:
            value = getattr(each, name, None)
        except RuntimeError:  # transformers' config of a model whose layers differ in this number
            continue
        if isinstance(value, int):
            return value
    return None
