"""A worker of vLLM that watches its points by plain hooks, and writes what it saw: for several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from support.vllm_families import watched

from hookmap.vllm.discover import discover


class Watching:
    """vLLM's `worker_extension_cls`: its methods are called in each worker by name."""

    vllm_config: Any
    model_runner: Any
    rank: int

    def watch(self) -> int:
        """Hooks on every place; returns how many points there are."""
        self.places = discover(self.vllm_config).places
        self._watched = watched(self.model_runner.model, {key: place.terms for key, place in self.places.items()})
        self._read = self._watched.__enter__()
        return len(self.places)

    def write(self, folder: str) -> None:
        """Writes the last pass's rows of this rank, a tensor `point.layer` each."""
        rows = {".".join(map(str, key)): tensor.clone() for key, tensor in self._read().items()}
        save_file(rows, Path(folder) / f"rank-{self.rank}.safetensors")
