"""A capture in the layouts of other programs: torch, NumPy, Hugging Face datasets, SAELens, probelab.

Each is a new folder that appears whole. `tensors.json` says which point, layer and run a tensor is, and where prompts
have images, `image_rows.npy` or a column says which rows are of their tokens. All but `pt` are written some rows at a
time. NumPy and Arrow know no bfloat16 and no 8-bit floats: there these are float32, which holds each value exactly.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hookmap.activations import Key, Sample, call_of
from hookmap.errors import SelectionError, StoreError
from hookmap.extras import needed
from hookmap.maps.points import FEATURES, PointName, transformer_lens_name
from hookmap.stores.copying import ROWS
from hookmap.stores.durable_files import temporary
from hookmap.stores.interface import Store
from hookmap.stores.ledger import tensor_name
from hookmap.stores.location import local

NEEDS_DATASETS = 'this layout needs Hugging Face datasets: pip install "hookmap[data]"'
_IMAGE_ROWS = "image_rows.npy"
_WHERE_SET = ("image_positions", "pictures", "encoder_token_ids")
"""fields of a sample that its line has only where they are set"""
_AS_FLOAT = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Wanted:
    """What of a capture to export."""

    store: Store
    keys: tuple[Key, ...]
    context: int | None = None
    """rows of each sequence, for SAELens"""


def export(
    store: Store,
    layout: str,
    out: "str | os.PathLike[str]",
    *,
    point: str | None = None,
    layer: int | None = None,
    call: int | None = None,
    context: int | None = None,
) -> list[str]:
    """Write `store` to the new folder `out`. Returns notes: what the layout could not take.

    `layout`: a name in LAYOUTS; `point`, `layer`, `call`: only these tensors; `context`: rows of each of SAELens's
    sequences.
    Raises StoreError where the layout cannot hold this capture, SelectionError for tensors that it does not have.
    """
    if layout not in LAYOUTS:
        raise StoreError(f"unknown layout {layout!r}: expected one of {', '.join(LAYOUTS)}.")
    keys = _keys(store, point, layer, call)
    if not keys or not len(store):
        raise StoreError(f"nothing to export: {'no such tensor' if not keys else 'no finished sample'}.")
    folder = local(os.path.abspath(local(out)))
    if folder == Path.cwd():
        raise StoreError(f"{out} is the folder you are in, and an export appears whole, by a rename: -o {out}/NEW")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{folder} exists already: expected a new or empty folder. Write to another one: -o DIR")
    draft = temporary(folder)
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        notes = LAYOUTS[layout](Wanted(store, keys, context), draft)
        _write_tensors(layout, keys, draft)
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    except OSError as error:
        raise StoreError(f"cannot write to {folder}: {error.strerror or error}.") from error
    except UnicodeEncodeError as error:
        raise StoreError(f"{layout} holds texts as UTF-8, and a sample has half a surrogate pair: {error}.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return notes


def _keys(store: Store, point: str | None, layer: int | None, call: int | None) -> tuple[Key, ...]:
    """The tensors to export. `layer` alone: of every point that has one; `call` alone: of every layer that has it."""
    found = _named(store, point, layer, call)
    if sparse := [tensor_name(key) for key in found if PointName.of(key[0]).base == FEATURES]:
        raise SelectionError(
            f"{', '.join(sparse)}: sparse rows have no other format: name another tensor, point=POINT (--point)."
        )
    return found


def _named(store: Store, point: str | None, layer: int | None, call: int | None) -> tuple[Key, ...]:
    if point is not None and (call is None or layer is not None):
        return store.keys_of(point, layer, call)
    if layer is not None and layer < 0 and store.num_layers is not None:
        layer += store.num_layers
    return tuple(
        key
        for key in (store.keys if point is None else store.keys_of(point))
        if layer is None or key[1] == layer
        if call is None or (call_of(key) or 0) == call
    )


def _pt(wanted: Wanted, folder: Path) -> list[str]:
    """activations.pt: {name: [rows, d], "offsets": [samples + 1]}, read with `torch.load(weights_only=True)`."""
    tensors = {
        tensor_name(key): torch.cat([wanted.store.read(s.sample, *key) for s in wanted.store.samples])
        for key in wanted.keys
    }
    tensors["offsets"] = torch.tensor(_offsets(wanted.store))
    with open(folder / "activations.pt", "wb") as file:
        try:
            torch.save(tensors, file)
        except RuntimeError as error:  # torch says so of a disk that refuses a write
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
    return _write_samples(wanted.store, folder)


def _numpy(wanted: Wanted, folder: Path) -> list[str]:
    """NAME.npy, [rows, d], for each tensor; offsets.npy, [samples + 1]."""
    rows = _offsets(wanted.store)[-1]
    for key in wanted.keys:
        with open(folder / f"{tensor_name(key)}.npy", "wb") as file:
            for place, piece in enumerate(_pieces(wanted.store, key)):
                data = _as_numpy(piece)
                if not place:
                    header = {"descr": data.dtype.str, "fortran_order": False, "shape": (rows, *data.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(data.tobytes())
    np.save(folder / "offsets.npy", np.array(_offsets(wanted.store), dtype=np.int64))
    return [*_write_samples(wanted.store, folder), *_float_note(wanted)]


def _datasets(wanted: Wanted, folder: Path) -> list[str]:
    """One row per sample: a column for each tensor, [rows, d], and what is known of the sample."""
    datasets = needed("datasets", NEEDS_DATASETS, StoreError)
    first = wanted.store.samples[0].sample
    columns: dict[str, Any] = {"sample": datasets.Value("int64")}
    columns |= {name: datasets.Value("string") for name in ("id", "prompt", "text", "labels")}
    columns |= {"prompt_tokens": datasets.Value("int64")}
    columns |= {name: datasets.Sequence(datasets.Value("int64")) for name in ("token_ids", "positions", "image_rows")}
    for key in wanted.keys:
        example = _as_numpy(wanted.store.read(first, *key)[:1])
        columns[tensor_name(key)] = datasets.Array2D((None, int(np.prod(example.shape[1:]))), str(example.dtype))

    def rows() -> Iterator[dict[str, Any]]:
        for sample in wanted.store.samples:
            row = _describe(sample) | {"labels": None if sample.labels is None else json.dumps(sample.labels)}
            row["positions"] = list(sample.positions) if isinstance(sample.positions, tuple) else None
            row["image_rows"] = _image_rows(sample)
            for key in wanted.keys:
                row[tensor_name(key)] = _as_numpy(wanted.store.read(sample.sample, *key).flatten(1))
            yield {name: row.get(name) for name in columns}

    _save_dataset(datasets, rows, columns, folder)
    return _float_note(wanted)


def _saelens(wanted: Wanted, folder: Path) -> list[str]:
    """As CacheActivationsRunner writes it: sequences of `context` rows under the hook's name, and their token ids."""
    if len(wanted.keys) != 1 or wanted.context is None:
        held = ", ".join(map(tensor_name, wanted.keys))
        raise StoreError(
            f"SAELens caches one tensor, in sequences of one length: got {held}, and a length of {wanted.context}. "
            "Choose: --point P --layer N --context ROWS"
        )
    datasets = needed("datasets", NEEDS_DATASETS, StoreError)
    (key,), context, store = wanted.keys, wanted.context, wanted.store
    name = transformer_lens_name(key[0], key[1])
    if name is None:
        raise StoreError(f"TransformerLens, whose names SAELens uses, has no name for {tensor_name(key)}.")
    example = _as_numpy(store.read(store.samples[0].sample, *key)[:1])
    columns = {
        name: datasets.Array2D((context, int(np.prod(example.shape[1:]))), str(example.dtype)),
        "token_ids": datasets.Sequence(datasets.Value("int32"), length=context),
    }

    def rows() -> Iterator[dict[str, Any]]:
        for sample in store.samples:
            ids = _ids_of_rows(sample)
            for start in range(0, sample.rows - context + 1, context):
                part = store.rows_at(sample.sample, key, range(start, start + context))
                yield {name: _as_numpy(part.flatten(1)), "token_ids": ids[start : start + context]}

    _save_dataset(datasets, rows, columns, folder)
    if any(sample.image_positions for sample in store.samples):  # beside the columns: SAELens knows its own alone
        whole = [_mask(sample)[: sample.rows // context * context] for sample in store.samples]
        np.save(folder / _IMAGE_ROWS, np.concatenate(whole).reshape(-1, context))
    left = sum(sample.rows % context for sample in store.samples)
    run = call_of(key)
    notes = [f"{left} rows at the ends of samples fill no sequence of {context} and are left out"] if left else []
    notes += (
        [] if run is None else [f"the rows are of call {run} of the layer, which TransformerLens's name does not say"]
    )
    return notes + _float_note(wanted)


def _probelab(wanted: Wanted, folder: Path) -> list[str]:
    """As probelab.storage.save_memmap writes it: layer_N.bin, bfloat16 [rows, d], of one point; all rows detected."""
    points, layers = sorted({key[0] for key in wanted.keys}), [key[1] for key in wanted.keys]
    if len(points) != 1 or None in layers:
        raise StoreError(f"probelab holds the layers of one point: got {', '.join(points)}. Choose one: --point P")
    if len(set(layers)) < len(layers):
        raise StoreError("probelab holds one tensor of each layer, and layers run several times. Choose: --call N")
    notes: list[str] = []
    width, calls = 0, [call_of(key) for key in wanted.keys]
    for key in wanted.keys:
        with open(folder / f"layer_{key[1]}.bin", "wb") as file:
            for piece in _pieces(wanted.store, key):
                width = piece.flatten(1).shape[1]
                if piece.dtype != torch.bfloat16 and not notes:
                    notes.append(f"probelab's layout is bfloat16: {piece.dtype} was rounded to it")
                file.write(piece.bfloat16().contiguous().view(torch.int16).numpy().tobytes())
    offsets = np.array(_offsets(wanted.store), dtype=np.int64)
    (folder / "offsets.bin").write_bytes(offsets.tobytes())
    (folder / "detection_mask.bin").write_bytes(b"\1" * int(offsets[-1]))
    meta = {
        "format": "memmap_v1",
        "dims": "blsh",
        "total_tokens": int(offsets[-1]),
        "n_layers": len(wanted.keys),
        "hidden_dim": width,
        "layers": layers,
        "n_samples": len(offsets) - 1,
        "metadata": {"point": points[0]} | ({"calls": calls} if any(call is not None for call in calls) else {}),
    }
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return [*_write_samples(wanted.store, folder), *notes]


LAYOUTS: dict[str, Callable[[Wanted, Path], list[str]]] = {
    "pt": _pt,
    "numpy": _numpy,
    "datasets": _datasets,
    "saelens": _saelens,
    "probelab": _probelab,
}
"""name -> what writes it"""


def _pieces(store: Store, key: Key) -> Iterator[torch.Tensor]:
    """All rows of one tensor, some at a time; at least one piece, so that dtype and width are known."""
    for place, sample in enumerate(store.samples):
        if not sample.rows and not place:
            yield store.read(sample.sample, *key)
        for start in range(0, sample.rows, ROWS):
            yield store.rows_at(sample.sample, key, range(start, min(start + ROWS, sample.rows)))


def _as_numpy(tensor: torch.Tensor) -> "np.ndarray[Any, Any]":
    return (tensor.float() if tensor.dtype in _AS_FLOAT else tensor).numpy()


def _float_note(wanted: Wanted) -> list[str]:
    first = wanted.store.samples[0].sample
    dtypes = {wanted.store.rows_at(first, key, range(0)).dtype for key in wanted.keys} & set(_AS_FLOAT)
    return [f"{', '.join(sorted(map(str, dtypes)))} became float32: the values are the same"] if dtypes else []


def _offsets(store: Store) -> list[int]:
    """Where each sample's rows begin, and the end."""
    offsets = [0]
    for sample in store.samples:
        offsets.append(offsets[-1] + sample.rows)
    return offsets


def _ids_of_rows(sample: Sample) -> Sequence[int]:
    if sample.positions == "mean":
        raise StoreError(f"sample {sample.sample} is a mean over tokens: SAELens needs rows of tokens.")
    return [sample.token_ids[position] for position in sample.row_positions]


def _image_rows(sample: Sample) -> list[int] | None:
    """Which rows of a sample are of its images' tokens; None where it has none, or its row is a mean over tokens."""
    if not sample.image_positions or sample.positions == "mean":
        return None
    held = range(sample.rows) if sample.positions is None else sample.positions
    of_images = frozenset(sample.image_positions)
    return [row for row, position in enumerate(held) if position in of_images]


def _mask(sample: Sample) -> "np.ndarray[Any, Any]":
    """[rows], bool: whether a row is of an image's token."""
    found = np.zeros(sample.rows, dtype=bool)
    found[_image_rows(sample) or []] = True
    return found


def _describe(sample: Sample) -> dict[str, Any]:
    return {
        "sample": sample.sample,
        "id": sample.id,
        "rows": sample.rows,
        "prompt_tokens": sample.prompt_tokens,
        "prompt": sample.prompt,
        "text": sample.text,
        "token_ids": list(sample.token_ids),
        "positions": sample.positions,
        "labels": sample.labels,
        **{name: value for name in _WHERE_SET if (value := getattr(sample, name)) is not None},
    }


def _write_samples(store: Store, folder: Path) -> list[str]:
    """The table of samples, and which rows are of images. Returns notes."""
    with open(folder / "samples.jsonl", "w", encoding="ascii") as file:
        for sample in store.samples:
            file.write(json.dumps(_describe(sample)) + "\n")
    pictured = [sample for sample in store.samples if sample.image_positions]
    if pictured and any(sample.positions == "mean" for sample in pictured):
        return [f"rows are means over tokens, of images and of text: there is no {_IMAGE_ROWS}"]
    if pictured:
        np.save(folder / _IMAGE_ROWS, np.concatenate([_mask(sample) for sample in store.samples]))
    return []


def _write_tensors(layout: str, keys: Sequence[Key], folder: Path) -> None:
    """What each tensor is, by its name in this layout."""
    names: dict[str, Callable[[Key], str | None]] = {
        "probelab": lambda key: f"layer_{key[1]}.bin",
        "saelens": lambda key: transformer_lens_name(key[0], key[1]),
    }
    told = [
        {"name": names.get(layout, tensor_name)(key), "point": key[0], "layer": key[1], "call": call_of(key)}
        for key in keys
    ]
    (folder / "tensors.json").write_text(json.dumps(told, indent=1) + "\n", encoding="ascii")


def _save_dataset(datasets: Any, rows: Callable[[], Iterator[dict[str, Any]]], columns: Any, folder: Path) -> None:
    cache = folder.with_name(f"{folder.name}.arrow")  # beside it: a dataset is not saved over its own file
    quiet = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        features = datasets.Features(columns)
        writer = datasets.arrow_writer.ArrowWriter(features=features, path=str(cache), writer_batch_size=16)
        with writer:
            for row in rows():
                writer.write(row)
            writer.finalize()
        datasets.Dataset.from_file(str(cache)).save_to_disk(str(folder), num_shards=1)
    finally:
        if quiet:
            datasets.enable_progress_bars()
        cache.unlink(missing_ok=True)
