"""A digest of a Python function: of its code, and of the numbers, texts and tensors that the code names."""

import hashlib
from collections.abc import Iterator
from functools import partial
from inspect import getclosurevars
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch


def digest_of(fn: Any) -> str:
    """SHA-256, the same in another process for the same function. Objects that the code names count by their class."""
    digest = hashlib.sha256()
    for part in _parts(fn):
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _parts(fn: Any) -> Iterator[str]:
    if isinstance(fn, partial):
        yield from _parts(fn.func)
        yield from map(_of_value, (*fn.args, *fn.keywords.items()))
    elif isinstance(fn, MethodType):
        yield from _parts(fn.__func__)
        yield from (f"{name} {_of_value(value)}" for name, value in sorted(vars(fn.__self__).items()))
    elif isinstance(fn, FunctionType):
        yield from _of_code(fn.__code__)
        yield from map(_of_value, (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).items()))
        named = getclosurevars(fn)
        for name, value in sorted({**named.globals, **named.nonlocals}.items()):
            yield f"{name} {_of_value(value)}"
    elif isinstance(fn, torch.nn.Module):
        yield type(fn).__qualname__
        yield from (f"{name} {_of_value(value)}" for name, value in fn.state_dict().items())
    else:
        yield _of_value(fn)


def _of_code(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr(code.co_names)
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _of_code(each)
        else:
            yield repr(sorted(map(repr, each))) if isinstance(each, frozenset) else repr(each)


def _of_value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {list(value.shape)} {hashlib.sha256(data).hexdigest()}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(map(_of_value, value))})"
    if isinstance(value, int | float | complex | str | bytes | range | slice | type(None)):
        return repr(value)
    if isinstance(value, FunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{type(value).__module__}.{type(value).__qualname__}"
