"""The map of a loaded model: the one that its dataflow shows, or a given one, checked against it."""

from typing import Any

from torch import nn

from hookmap.discovery.discover import discover
from hookmap.errors import DiscoveryError, MapMismatchError
from hookmap.maps.describe import layer_ranges, layers_text
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.shipped import resize
from hookmap.maps.templates import Heads, PointTemplate, TermTemplate


def map_of(module: nn.Module, root: nn.Module, given: ArchitectureMap | None) -> ArchitectureMap:
    """The given map, if it is true of this module; without one, the map that its dataflow shows.

    root: the transformers model in it. Raises DiscoveryError, and MapMismatchError with every contradiction.
    """
    return understood(module, root, given)[0]


def understood(module: nn.Module, root: nn.Module, given: ArchitectureMap | None) -> tuple[ArchitectureMap, bool]:
    """As `map_of`, and whether discovery understands the model; where it does not, a given map cannot be checked."""
    if given is None:
        return discover(module), True
    found: ArchitectureMap | None = None
    try:
        found = discover(module)
    except DiscoveryError:  # with a map by hand, a model can be captured that discovery does not understand
        problems = [
            *_wrong_architecture(given, type(root).__name__),
            *_missing_modules(given, module),
        ]
    else:
        if given.scope == "architecture" and given.architecture == found.architecture:
            given = _at_size_of(given, found)
        problems = contradictions(given, found)
    if problems:
        raise MapMismatchError(
            f"the map of {given.model_id or given.architecture} contradicts this {type(module).__name__}:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\nLeave the map out, or make one of this model: hookmap discover MODEL -o FILE"
        )
    return given, found is not None


def _at_size_of(given: ArchitectureMap, found: ArchitectureMap) -> ArchitectureMap:
    """The given map with the model's own sizes, and its heads as they are in the model."""
    sized = given
    if (given.num_layers, given.d_model) != (found.num_layers, found.d_model):
        sizes = {"num_heads": found.num_heads, "d_vocab": found.d_vocab, "model_id": found.model_id}
        sized = resize(given, found.num_layers, found.d_model, **sizes)  # type: ignore[arg-type]
    kinds = []
    for kind, before in zip(sized.kinds, given.kinds, strict=True):
        theirs = found.kind_of(kind.layers[0]).points
        heads = {
            name: theirs[name]
            for name, point in before.points.items()
            if any(t.heads for t in point.terms) and name in theirs and _bare(point) == _bare(theirs[name])
        }
        missing = {name: reason for name, reason in kind.unavailable.items() if name not in heads}
        kinds.append(kind.model_copy(update={"points": {**kind.points, **heads}, "unavailable": missing}))
    return sized.model_copy(update={"kinds": tuple(kinds)})


def _bare(point: PointTemplate) -> list[TermTemplate]:
    return [term.model_copy(update={"heads": None}) for term in point.terms]


def contradictions(given: ArchitectureMap, found: ArchitectureMap) -> list[str]:
    """Where `given` differs from `found`, the model's own map. A point that `given` leaves out is no contradiction."""
    problems = _wrong_architecture(given, found.architecture)
    if given.scope == "model" and given.config_hash != found.config_hash:
        hashes = [(each.config_hash or "none")[:12] for each in (given, found)]
        problems.append(f"config_hash: the map's is {hashes[0]}…, the model's {hashes[1]}…")
    for field in ("num_layers", "d_model", "layers_path", "layer_names", "runs"):
        ours, theirs = getattr(given, field), getattr(found, field)
        if ours != theirs:
            problems.append(f"{field}: the map says {ours!r}, the model has {theirs!r}")
    wrong: dict[tuple[str, str], list[int]] = {}
    both = range(min(given.num_layers, found.num_layers))
    if again := [i for i in both if given.kind_of(i).calls != found.kind_of(i).calls]:
        said, runs = (each.kind_of(again[0]).calls for each in (given, found))
        problems.append(f"{layers_text(again)}: the map says they run {said} times, the model runs them {runs}")
    for layer in both:
        ours, theirs = given.kind_of(layer).points, found.kind_of(layer).points
        for point in _different(ours, theirs):
            wrong.setdefault((point, _difference(ours[point], theirs.get(point))), []).append(layer)
    alike: dict[tuple[str, str], list[str]] = {}
    for (point, difference), layers in wrong.items():
        alike.setdefault((difference, layer_ranges(layers)), []).append(point)
    problems += [f"{', '.join(points)}: {text} (layers {layers})" for (text, layers), points in alike.items()]
    for point in _different(given.model_points, found.model_points):
        problems.append(f"{point}: {_difference(given.model_points[point], found.model_points.get(point))}")
    return problems


def _different(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [point for point in ours if point not in theirs or ours[point].terms != theirs[point].terms]


def _difference(ours: Any, theirs: Any) -> str:
    return f"the map says {_terms(ours)}, the model has it at {_terms(theirs) if theirs else 'no place'}"


def _terms(template: Any) -> str:
    return " + ".join(t.text() + ("" if t.heads is None else f" as {_heads(t.heads)}") for t in template.terms)


def _heads(heads: Heads) -> str:
    cut = f"{heads.start}:{heads.stop}" + (f" of each of {heads.groups} groups" if heads.groups > 1 else "")
    return f"heads of {heads.d_head} in features {cut}"


def _wrong_architecture(given: ArchitectureMap, name: str) -> list[str]:
    same = given.architecture == name
    return [] if same else [f"architecture: the map's is {given.architecture}, the model is {name}"]


def _missing_modules(given: ArchitectureMap, module: nn.Module) -> list[str]:
    present = {name for name, _ in module.named_modules(remove_duplicate=False)}
    wanted = {term.module for selector in given.selectors() for term in selector.terms}
    return [f"module {path!r} is not in the model" for path in sorted(wanted - present)]
