"""`hookmap.open_remote`: captures from a model on somebody else's server (NDIF, through nnsight)."""

import os
from typing import Any

from hookmap.capture.engines import Engine
from hookmap.capture.engines.remote import RemoteEngine
from hookmap.capture.options import as_of
from hookmap.capture.padding import Pads
from hookmap.capture.prepare import Prepared
from hookmap.discovery.discover import discover
from hookmap.discovery.library import given_map
from hookmap.discovery.map_of_model import map_of
from hookmap.errors import CaptureError, ModelError
from hookmap.loading import configs
from hookmap.loading.checkpoints import load_tokenizer
from hookmap.loading.modules import model_root
from hookmap.maps.document import ArchitectureMap
from hookmap.model import HookedModel


class RemoteModel(HookedModel):
    """A `HookedModel` whose weights are elsewhere: captures run there; whatever needs the weights here is refused."""

    has_weights = False

    def __init__(self, given: Any, remote: bool | str, tokenizer: Any, found: ArchitectureMap, name: str) -> None:
        """See `open_remote`. `given`: an nnsight model without weights (not dispatched)."""
        super().__init__(given._module, tokenizer, found, name, nnsight_model=given)
        self._remote = RemoteEngine(self.model, self.root, given, remote)
        where = {True: "as nnsight is set up", "local": "nnsight's simulation"}.get(remote, str(remote))
        self.pads = Pads(self._remote, found, tokenizer, forces=False)
        self._where = f"the model is elsewhere: {where}"

    def _engine_of(self, name: str) -> tuple[Engine, str]:
        if name not in ("auto", "remote"):
            raise CaptureError(f"engine: this model has no weights here, and runs remotely only; got {name!r}.")
        return self._remote, self._where

    @as_of(HookedModel.prepare)
    def prepare(self, prompts: Any, *selection: Any, **options: Any) -> Prepared:
        """See `HookedModel.prepare`. Raises CaptureError for a seed: the generators are another machine's."""
        if options.get("seed") is not None:
            raise CaptureError("a run elsewhere has no seed: leave seed= out, or generate greedily.")
        return super().prepare(prompts, *selection, **options)

    def _refused(self, *_: Any, **__: Any) -> Any:
        raise ModelError(f"{self.name} has no weights here: open it with hookmap.open to compute with them.")

    lens = attribute = sweep = _refused
    proofs = property(_refused)


def open_remote(
    x: Any,
    remote: bool | str = True,
    *,
    map: ArchitectureMap | str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
) -> RemoteModel:
    """Open a model that runs on another server, to capture from it. Only its modules are built here, without weights.

    x: a hub id, a folder, or an nnsight model that was not dispatched. remote: True is NDIF, as nnsight's own settings
    name it (`nnsight.CONFIG.set_default_api_key`); a URL is another server's; "local" runs here what would be sent.
    Its captures have no seed, no interventions, and hold a batch of rows in memory.
    Raises ModelError, TokenizerError, DiscoveryError, and MapMismatchError where the given map contradicts the model.
    """
    from nnsight import TransformersModel

    if remote is not True and not (isinstance(remote, str) and remote):
        raise CaptureError(f'remote: expected True (NDIF), the URL of a server, or "local", got {remote!r}.')
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(os.fspath(tokenizer), revision=revision)
    if isinstance(x, str | os.PathLike):
        source = os.fspath(x)
        configs.load_config(source, revision=revision)
        tokenizer = load_tokenizer(source, revision=revision) if tokenizer is None else tokenizer
        x = TransformersModel(source, task="text-generation", tokenizer=tokenizer, revision=revision)
    if not hasattr(x, "_module"):
        raise ModelError(f"cannot open a {type(x).__name__} remotely: expected a hub id, a folder or an nnsight model.")
    given = given_map(map)
    module = x._module
    root = model_root(module, weights=False)
    found = discover(root.config) if given is None else map_of(module, root, given)
    own = x.tokenizer if tokenizer is None else tokenizer
    return RemoteModel(x, remote, own, found, getattr(x, "repo_id", None) or found.model_id or type(module).__name__)
