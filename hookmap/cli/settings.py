"""Values of options that were not typed: from HOOKMAP_<KEY>, from hookmap.yaml, or the bundled demo model."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hookmap.cli.parsing import FILE_NAME, PREFIX, _points_with_layers, parse_calls, parse_layers, parse_list

if TYPE_CHECKING:
    from hookmap.maps.document import ArchitectureMap


def load_settings(start: Path | None = None) -> dict[str, Any]:
    """The settings that the environment or the nearest hookmap.yaml at or above `start` (the working directory) gives.

    Paths of the file are relative to its folder. Raises click.UsageError with everything that is wrong at once.
    """
    from hookmap.cli.configuration import find

    return {key: setting.value for key, setting in find(start).items() if setting.source != "default"}


def typed_or_set(given: dict[str, Any], settings: dict[str, Any], *names: str) -> dict[str, Any]:
    """These options as they were typed, else as the settings say; those that neither gives are left out.

    `given`, the options of the command, loses them.
    """
    typed = {name: given.pop(name) for name in names}
    found = {name: settings.get(name) if value in (None, "") else value for name, value in typed.items()}
    return {name: value for name, value in found.items() if value is not None}


def choose_model(typed: str | None, settings: dict[str, Any]) -> str:
    """The model of this run. If it was not typed, stderr says which model it is and what named it.

    Raises click.BadParameter for a text that can be no model's name.
    """
    if typed and len(typed.split()) > 1 and not Path(typed).exists():
        raise click.BadParameter(
            f"{typed!r} is no folder, and a hub id has no spaces. A text that the model is to read is an option: "
            "--prompt TEXT, where the command has it",
            param_hint="MODEL",
        )
    if typed:
        return typed
    if "model" in settings:
        variable = f"{PREFIX}MODEL"
        model, source = str(settings["model"]), f"named by {variable if os.environ.get(variable) else FILE_NAME}"
    else:
        from hookmap.demo import MODEL_PATH

        model, source = str(MODEL_PATH), "the bundled demo model"
    click.echo(f"model: {model} ({source})", err=True)
    return model


def chosen_tensors(
    settings: dict[str, Any], points: str | None, layers: str | None, default: str | None = None
) -> tuple[Any, Any]:
    """Points and layers as `HookedModel.capture` takes them: as typed, else as in the settings, else `default`.

    `resid_post@3,5,z@8-10,logits`: each point has layers of its own; one without any has those of --layers.
    (None, …) where there are no points. Raises click.UsageError, click.BadParameter.
    """
    text, of = points or settings.get("points") or default, settings.get("layers") if layers is None else layers
    chosen = parse_layers("all" if of is None else of)
    if text is None or "@" not in text:
        return None if text is None else parse_list(text), chosen
    from hookmap.maps.points import takes_layers

    found = _points_with_layers(text)
    if None not in found.values() and of is not None and (layers or not points):
        raise click.UsageError(f"points {text}: each names its layers: leave layers ({of}) out")
    left = {name: chosen if takes_layers(name) else "all" for name, own in found.items() if own is None}
    return {name: left[name] if own is None else parse_layers(own) for name, own in found.items()}, "all"


def chosen_calls(settings: dict[str, Any], typed: str | None) -> str | list[int]:
    """The runs of layers that run several times: as typed, else as in the settings. Raises click.BadParameter."""
    return parse_calls(str(settings.get("calls", "all")) if typed is None else typed)


def refuse_unknown(
    points: str | Sequence[str] | Mapping[str, Any] = (),
    layers: Any = "all",
    model: str | None = None,
    calls: Any = "all",
    **keeps: Any,
) -> None:
    """Refuse points, layers, calls and rows that no model has, or that `model` has not, before its weights are loaded.

    keeps: as `hookmap.capture.rows.row_selection` takes it. Raises SelectionError with all problems.
    """
    from hookmap.capture.rows import row_selection
    from hookmap.errors import SelectionError
    from hookmap.maps.points import parse_point

    problems = []
    try:
        row_selection(**keeps)
    except SelectionError as error:
        problems.append(str(error))
    names = [] if points == "all" else [points] if isinstance(points, str) else points
    unknown = [said for name in names if isinstance(said := parse_point(name), str)]
    if said := _missing(model, (points, layers, calls), sure=bool(unknown)) or "\n".join(unknown):
        problems.append(said)
    if problems:
        raise SelectionError("\n".join(problems))


def _missing(model: str | None, asked: tuple[Any, Any, Any], sure: bool) -> str | None:
    """What the model's map lacks of these, or None. Unless it lacks some for `sure`, the shipped map is asked first."""
    import hookmap
    from hookmap.maps.shipped import likely_map

    try:
        likely = None if sure or model is None else likely_map(model)
        if model is not None and (sure or (likely is not None and _lacks(likely, asked))):
            return _lacks(hookmap.discover(model), asked)
    except hookmap.HookmapError:  # of the model, which is told when it is opened, or there is no shipped map
        pass
    return None


def _lacks(found: "ArchitectureMap", asked: tuple[Any, Any, Any]) -> str | None:
    from hookmap.errors import SelectionError

    try:
        found.selectors(*asked)
    except SelectionError as error:
        return str(error)
    return None
