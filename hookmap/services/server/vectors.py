"""Steering vectors that the server offers: the files of one folder, as numbers. A request names them, and no path."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI

from hookmap.analysis.steering import SteeringVector, load_vector
from hookmap.errors import HookmapError
from hookmap.services.server.errors import bad, missing


def install(app: FastAPI, folder: Path | None) -> None:
    """Add the routes. `folder`: of files that `hookmap vector` wrote; None: none are offered."""

    @app.get("/v1/vectors")
    def listed() -> dict[str, Any]:
        """The steering vectors of the folder that `--vectors` names, with their points and layers."""
        return {"object": "list", "data": [_told(name, found) for name, found in sorted(_all(folder).items())]}

    @app.get("/v1/vectors/{name}")
    def one(name: str, layer: int) -> dict[str, Any]:
        """The direction of one layer of a vector, as an intervention takes it."""
        path = _files(folder).get(name)
        if path is None:
            raise missing("no vector has this name: see /v1/vectors.", "vector_not_found")
        try:
            found = load_vector(path)
        except HookmapError as error:
            raise bad(f"the vector {name} cannot be read.", "name", type(error).__name__) from error
        if layer not in found.layers:
            raise bad(f"{name} has no layer {layer}: it has {', '.join(map(str, found.layers))}.", "layer")
        return {**_told(name, found), "layer": layer, "vector": found[layer].tolist()}


def _files(folder: Path | None) -> dict[str, Path]:
    """The files by their names; read anew, so that a vector can be added to a running server."""
    if folder is None or not folder.is_dir():
        return {}
    return {path.stem: path for path in folder.glob("*.safetensors") if path.is_file()}


def _all(folder: Path | None) -> dict[str, SteeringVector]:
    """Those that can be read: the folder may hold other files."""
    found = {}
    for name, path in _files(folder).items():
        try:
            found[name] = load_vector(path)
        except HookmapError:
            continue
    return found


def _told(name: str, vector: SteeringVector) -> dict[str, Any]:
    about = vector.about
    return {
        "name": name,
        "object": "vector",
        "architecture": about.architecture,
        "point": about.point,
        "layers": list(vector.layers),
        "width": int(vector[vector.layers[0]].shape[0]),
    }
