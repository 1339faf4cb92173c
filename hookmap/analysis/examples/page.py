"""Examples as one HTML page: it holds everything and asks no network."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from hookmap.activations import Key
from hookmap.analysis.examples.result import Examples
from hookmap.errors import SelectionError
from hookmap.stores.durable_files import writing

MOST = 2000
"""features of a page: each takes some 20 kB"""


def save_page(
    examples: Examples, path: str | os.PathLike[str], features: Mapping[Key, Sequence[int | str]] | None = None
) -> Path:
    """Write the page. features: of each tensor those that are meant; all unless given.

    Raises SelectionError for more than `MOST` features, and StoreError where the file cannot be written.
    """
    names = {key: examples.names(key) for key in examples.tensors} if features is None else features
    if (count := sum(map(len, names.values()))) > MOST:
        raise SelectionError(f"a page of {count} features is too large for a browser: name {MOST} at most.")
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # In a script element, JSON may hold anything but what ends it.
    data = json.dumps(examples.as_json(names), ensure_ascii=False).replace("<", "\\u003c")
    target = Path(path)
    with writing(target):
        target.write_text(template.replace("%DATA%", data, 1), encoding="utf-8", errors="backslashreplace")
    return target
