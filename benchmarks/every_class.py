"""What benchmarks over all classes share: a pool, a time limit for each class, and a ledger to go on with."""

import copy
import json
import logging
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def compared(
    compare: Callable[[str], dict[str, Any]], types: Sequence[str], ledger: Path | None, jobs: int = 1
) -> list[dict[str, Any]]:
    """What `compare` says of each type, of all causal language models where none is given, in the order of their names.

    What the ledger has is not compared again; each line is added as it is done.
    """
    from hookmap.sweep.build import classes

    of = {architecture: model_type for model_type, architecture in classes().items()}
    lines = ledger.read_text(encoding="utf-8").splitlines() if ledger is not None and ledger.exists() else []
    found = {each["type"]: each for each in map(json.loads, lines)}
    wanted = [name for name in types or sorted(of.values()) if name not in found]
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=8) as pool:
        for each in pool.imap_unordered(compare, wanted):
            print(each, file=sys.stderr, flush=True)
            found[each["type"]] = each
            if ledger is not None:
                with ledger.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(each) + "\n")
    return [found[name] for name in sorted(found)]


@contextmanager
def quietly(seconds: int) -> Iterator[None]:
    """One thread, no warnings, and TimeoutError after `seconds` of processor time: the machine may be busy."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s of processor time")

    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("hookmap").setLevel(logging.ERROR)
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def shallow(config: Any, layers: int) -> Any:
    """The first layers alone, where the config is still one that transformers takes."""
    text = config.get_text_config()
    count = getattr(text, "num_hidden_layers", 0)
    if count <= layers:
        return config
    fewer = copy.deepcopy(config)
    inner = fewer.get_text_config()
    for name, value in list(vars(inner).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(inner, name, value[:layers])
    try:
        inner.num_hidden_layers = layers
        return type(fewer).from_dict(fewer.to_dict())
    except Exception:  # a config's own checks raise what they like
        return config
