"""The Jacobian lens (Gurnee et al. 2026): what a layer's stream adds to the last one's, on average over texts.

For each layer l a matrix J_l = the mean over texts and positions t of the sum over later positions t' of
d resid_post[last, t'] / d resid_post[l, t]: the lens of a row h is the model's final norm and unembedding of J_l h. The
logit lens is J_l = 1. Positions: without the first `skip` (attention sinks) and the last of each text.

Files: those of the authors' package (`J`, `n_prompts`, `source_layers`, `d_model`; neuronpedia/jacobian-lens on the
hub), read by torch's weights-only unpickler; and safetensors, `J.0`, `J.1`, …, which is what is written.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from hookmap.capture.differentiating import differentiated
from hookmap.capture.engines.hooks import register
from hookmap.errors import SelectionError, StoreError
from hookmap.loading.hub import explain, quiet, reachable
from hookmap.maps.selectors import Selector, layers_of
from hookmap.stores.durable_files import write_file, writing
from hookmap.stores.location import local
from hookmap.stores.torch_files import read_torch_file
from hookmap.wording import is_number

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

Tensor = torch.Tensor
SKIP = 16
"""first positions of each text that are left out, as the authors do"""
_METADATA = "hookmap.jacobian_lens"


@dataclass(frozen=True, eq=False)
class JacobianLens:
    """A matrix for each of some layers."""

    matrices: Mapping[int, Tensor]
    """float32 [d_model, d_model] of each layer: `J @ row` is in the space of the last layer's stream"""
    prompts: int
    """texts that they are means over; 0 where the file does not say"""
    model: str | None = None

    def __post_init__(self) -> None:
        """Raises SelectionError for matrices that are not square, of several widths, or not finite."""
        shapes = {tuple(each.shape) for each in self.matrices.values()}
        if len(shapes) != 1 or any(len(shape) != 2 or shape[0] != shape[1] for shape in shapes):
            found = ", ".join(str(list(shape)) for shape in sorted(shapes)) or "none"
            raise SelectionError(f"a Jacobian lens has square matrices of one width, found {found}.")
        if wrong := [layer for layer, each in self.matrices.items() if not bool(each.isfinite().all())]:
            raise SelectionError(f"the Jacobian lens has an infinity or nan in layers {wrong}.")

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.matrices))

    @property
    def d_model(self) -> int:
        return next(iter(self.matrices.values())).shape[0]

    def transport(self, rows: Tensor, layer: int) -> Tensor:
        """[..., d_model] of a layer's resid_post -> float32 [..., d_model] of the last one's. Raises SelectionError."""
        if layer not in self.matrices:
            raise SelectionError(f"the Jacobian lens has no layer {layer}: it has {', '.join(map(str, self.layers))}.")
        if rows.shape[-1] != self.d_model:
            raise SelectionError(f"the Jacobian lens is of rows of {self.d_model} numbers, got {rows.shape[-1]}.")
        return rows.float() @ self.matrices[layer].to(rows.device).T

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file. Raises StoreError."""
        told = json.dumps({"n_prompts": self.prompts, "model": self.model})
        named = {f"J.{layer}": each.detach().cpu().contiguous() for layer, each in self.matrices.items()}
        data = bytes(save(named, {_METADATA: told}))
        with writing(local(path)):
            write_file(local(path), data)
        return Path(path)

    def __repr__(self) -> str:
        return f"<JacobianLens of layers {self.layers[0]} to {self.layers[-1]}, d_model {self.d_model}>"


def load_jacobian_lens(source: str | os.PathLike[str], file: str | None = None) -> JacobianLens:
    """A Jacobian lens: a file, or a hub id and the file in it.

    `load_jacobian_lens("neuronpedia/jacobian-lens", "gpt2-small/jlens/Salesforce-wikitext/gpt2_jacobian_lens.pt")`.
    A `.pt` file is read by torch's weights-only unpickler. Raises StoreError, SelectionError.
    """
    path = local(source) if file is None else _fetched(source, file)
    if not path.is_file():
        raise StoreError(f"there is no file {path}. Of a hub id, name the file in it, too: file=NAME.")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    found = read_torch_file(path, "Save its matrices as safetensors, where you trust it: J.0, J.1, …")
    held = found.get("J") if isinstance(found, Mapping) else None
    if not isinstance(held, Mapping) or not all(_is_layer(n) and isinstance(t, Tensor) for n, t in held.items()):
        raise StoreError(f"{path} is no Jacobian lens: expected matrices by layer under the key J.")
    meta = found.get("metadata")
    model = meta.get("model_name") if isinstance(meta, Mapping) else None
    matrices = {int(layer): matrix.float() for layer, matrix in held.items()}
    return JacobianLens(matrices, int(found.get("n_prompts") or 0), model if isinstance(model, str) else None)


def _is_layer(name: Any) -> bool:
    return is_number(str(name))


def _fetched(source: str | os.PathLike[str], file: str) -> Path:
    if local(source).is_dir():
        return local(source) / file
    import huggingface_hub

    try:
        with quiet():
            return Path(huggingface_hub.hf_hub_download(os.fspath(source), file, local_files_only=not reachable()))
    except Exception as error:  # the hub's client has errors of several libraries
        raise StoreError(f"cannot load {file} of {source}: {explain(error, os.fspath(source))}") from error


def _safetensors(path: Path) -> JacobianLens:
    try:
        with safe_open(path, framework="pt") as held:
            told = json.loads((held.metadata() or {}).get(_METADATA, "{}"))
            names = [name for name in held.keys() if name.startswith("J.") and _is_layer(name[2:])]  # noqa: SIM118
            matrices = {int(name[2:]): held.get_tensor(name).float() for name in names}
    except (OSError, SafetensorError, ValueError) as error:
        raise StoreError(f"{path} is broken: {error}. Copy it again.") from error
    if not matrices:
        raise StoreError(f"{path} is no Jacobian lens: expected tensors J.0, J.1, …")
    return JacobianLens(matrices, int(told.get("n_prompts") or 0), told.get("model"))


def fit_jacobian_lens(
    hm: Hooked,
    texts: Any,
    layers: Any = "all",
    *,
    skip: int = SKIP,
    rows_at_once: int = 8,
    progress: Callable[[int, int], None] | None = None,
    **template: Any,
) -> JacobianLens:
    """See `HookedModel.fit_jacobian_lens`."""
    last = hm.map.num_layers - 1
    sources = tuple(layer for layer in layers_of(hm.map, layers) if layer < last)
    if not sources:
        raise SelectionError(f"a Jacobian lens needs layers before the last one, {last}.")
    selectors = hm.map.selectors("resid_post", [*sources, last])
    if wrong := [str(each) for each in selectors if each.call is not None or len(each.terms) > 1 or each.scale != 1]:
        raise SelectionError(f"no Jacobian lens: {wrong[0]} is not the output or input of one module that runs once.")
    encoded = hm.encode(texts, **template)
    long_enough = [each.token_ids for each in encoded if len(each.token_ids) > skip + 1]
    if not long_enough:
        raise SelectionError(f"a Jacobian lens needs texts of {skip + 2} tokens or more: skip=N leaves out fewer.")
    sums: dict[int, Tensor] = {}
    for done, tokens in enumerate(long_enough):
        for layer, matrix in _of_text(hm, selectors, tokens, skip, rows_at_once).items():
            sums[layer] = sums[layer] + matrix if layer in sums else matrix
        if progress is not None:
            progress(done + 1, len(long_enough))
    count = len(long_enough)
    return JacobianLens({layer: total / count for layer, total in sums.items()}, count, hm.name)


def _of_text(
    hm: Hooked, selectors: Sequence[Selector], tokens: Sequence[int], skip: int, at_once: int
) -> dict[int, Tensor]:
    """The matrices of one text: its rows are gradients, `at_once` of them in a backward pass."""
    width, valid = hm.map.d_model, torch.arange(skip, len(tokens) - 1)
    ids = torch.tensor([list(tokens)]).expand(at_once, -1).to(next(hm.root.parameters()).device)
    with differentiated(hm.model), torch.enable_grad(), _watched(hm, selectors) as seen:
        hm.root(input_ids=ids, use_cache=False)
        target, held = seen[selectors[-1].layer or 0], [seen[each.layer or 0] for each in selectors[:-1]]
        if target.shape != (at_once, len(tokens), width):
            raise SelectionError(f"no Jacobian lens: resid_post is {list(target.shape)} here, with several streams.")
        found = [torch.empty(width, width) for _ in held]
        for start in range(0, width, at_once):
            numbers = torch.arange(start, min(start + at_once, width))
            pull = torch.zeros_like(target)
            pull[(numbers - start)[:, None], valid[None], numbers[:, None]] = 1
            keep = start + at_once < width
            for matrix, gradient in zip(found, torch.autograd.grad(target, held, pull, retain_graph=keep), strict=True):
                matrix[numbers] = gradient[: len(numbers)][:, valid.to(gradient.device)].float().mean(1).cpu()
    return {each.layer or 0: matrix for each, matrix in zip(selectors[:-1], found, strict=True)}


@contextlib.contextmanager
def _watched(hm: Hooked, selectors: Sequence[Selector]) -> Iterator[dict[int, Tensor]]:
    """The tensors that a pass shows, by layer; the graph begins at the first of them."""
    seen: dict[int, Tensor] = {}

    def take(selector: Selector, args: Any, kwargs: Any, output: Any) -> None:
        found = selector.whole(args, kwargs, output)
        if not found.requires_grad:
            found.requires_grad_(True)
        seen[selector.layer or 0] = found

    with contextlib.ExitStack() as hooks:
        for each in selectors:
            hooks.callback(register(hm.model.get_submodule(each.module), each.side, partial(take, each)))
        yield seen
