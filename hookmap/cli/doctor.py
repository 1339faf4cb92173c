"""Examine this installation: versions, devices, memory and disk, the hub, extras, and one capture as a test.

The checks are independent. An error in one of them becomes a line of the report, never an exception.
"""

import os
import platform
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import hookmap

CAPTURES = Path("captures")
"""where `hookmap capture` writes by default"""
HUB_SECONDS = 3
LITTLE_MEMORY, LITTLE_DISK = 2 * 10**9, 10**9
WITHOUT = {
    "data": "prompts from Parquet files and Hugging Face data sets, exports to them",
    "eval": "hookmap eval, hookmap experiment, hookmap probe",
    "gguf": "control vectors as GGUF",
    "grammar": "response_format with a JSON schema, in hookmap serve",
    "scale": "captures on Ray (--engine ray)",
    "server": "hookmap serve",
    "stats": "quantiles of activations",
    "vision": "prompts with images",
    "viz": "pictures (--png, --html)",
    "vllm": "captures on vLLM (--engine vllm)",
}
"""extra -> what needs it"""
COLLECTIONS = ("all", "docs", "test")
"""extras that combine others, or that only contributors need"""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    state: Literal["ok", "note", "broken"]
    """note: an optional part does not work; broken: hookmap does not work here"""
    found: str
    remedy: str = ""


def examine(*checks: str) -> Iterator[Finding]:
    """Yield each finding as it is made. The last check loads the bundled model and captures, which takes seconds.

    `checks`: keys of CHECKS; all of them unless given.
    """
    for name in checks or CHECKS:
        try:
            yield from CHECKS[name]()
        except Exception as error:  # a broken installation may raise anything
            yield Finding(name, "broken", f"{type(error).__name__}: {str(error).strip() or 'no message'}")


def _python() -> Iterator[Finding]:
    found = f"{platform.python_implementation()} {platform.python_version()} on {platform.platform()}"
    yield Finding("python", "ok", found)


def _requirements() -> Iterator[Finding]:
    """hookmap itself and its required packages."""
    try:
        needs, _ = _needs()
    except metadata.PackageNotFoundError:
        yield Finding("hookmap", "note", f"{hookmap.__version__}, run from a folder", "to install it: pip install -e .")
        return
    yield Finding("hookmap", "ok", f"{hookmap.__version__} in {Path(hookmap.__file__).parent}")
    for need in needs:
        version, wrong = _installed(need)
        remedy = f'pip install "{need.name}{need.specifier}"'
        yield Finding(need.name, "broken", wrong, remedy) if wrong else Finding(need.name, "ok", version)


def _imports() -> Iterator[Finding]:
    """An installed package may still fail to import: a system library is missing, or two builds clash."""
    for name in ("torch", "transformers", "nnsight"):
        try:
            import_module(name)
        except Exception as error:
            yield Finding(f"import {name}", "broken", f"{type(error).__name__}: {error}", f"pip install -U {name}")


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("cpu", "ok", f"{os.cpu_count()} cores, of which torch uses {torch.get_num_threads()}")
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        yield Finding(f"cuda:{number}", "ok", f"{name}, {_gb(free)} of {_gb(total)} free")
    if torch.backends.mps.is_available():
        yield Finding("mps", "ok", "Apple's GPU")
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        build = f"torch {torch.__version__}" + ("" if torch.version.cuda else ", a build without CUDA,")
        yield Finding("cuda", "note", f"nvidia-smi is there, and {build} finds no GPU", "https://pytorch.org: install")


def _room() -> Iterator[Finding]:
    from hookmap.loading.memory import available

    free = available()
    yield Finding("memory", "ok" if free > LITTLE_MEMORY else "note", f"{_gb(free)} free")
    folder = CAPTURES.resolve()
    there = next(each for each in (folder, *folder.parents) if each.is_dir())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        yield Finding("disk", "note", f"{there} cannot be written", "write captures elsewhere: -o DIR")
    else:
        yield Finding("disk", "ok" if free > LITTLE_DISK else "note", f"{_gb(free)} free for {folder}")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "note", "offline mode (HF_HUB_OFFLINE): only models of the cache and of folders")
        return
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with suppress(urllib.error.HTTPError):  # an error status is an answer too
            urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
        token = "a token is set" if get_token() else "no token: gated models need one (hf auth login)"
        yield Finding("hub", "ok", f"{constants.ENDPOINT} answers; {token}")
    except (OSError, ValueError) as error:  # URLError and time-outs are OSErrors
        reason = getattr(error, "reason", None) or error
        remedy = "models of folders and of the cache work; HF_HUB_OFFLINE=1 does not ask"
        yield Finding("hub", "note", f"{constants.ENDPOINT} does not answer: {reason}", remedy)


def _settings() -> Iterator[Finding]:
    import click

    from hookmap.cli.configuration import find

    try:
        sources = dict.fromkeys(setting.source for setting in find().values())
        del sources["default"]
        yield Finding("settings", "ok", ", ".join(sources) or "none but the defaults")
    except click.UsageError as error:
        yield Finding(
            "settings", "broken", error.message, "correct the settings that are named; all keys: hookmap config schema"
        )


def _maps() -> Iterator[Finding]:
    from hookmap.maps.shipped import shipped_architectures

    count = len(shipped_architectures())
    remedy = "" if count else "install hookmap again: its maps are not there"
    yield Finding("maps", "ok" if count else "broken", f"{count} shipped architectures", remedy)


def _demo() -> Iterator[Finding]:
    """Open the bundled model, generate, and capture."""
    from hookmap.demo import MODEL_PATH

    start = perf_counter()
    run = hookmap.open(MODEL_PATH, device="cpu").capture("1+2=", points=["resid_post"], layers=[-1], max_new_tokens=2)
    rows: Any = run["resid_post", -1]
    if not rows.isfinite().all() or rows.shape[-1] != run.map.d_model:
        yield Finding("capture", "broken", f"the demo model gives {tuple(rows.shape)}, or numbers that are not finite")
        return
    seconds = perf_counter() - start
    yield Finding("capture", "ok", f"the demo model runs: {rows.shape[1]} rows of resid_post in {seconds:.1f} s")


def _extras() -> Iterator[Finding]:
    try:
        _, extras = _needs()
    except metadata.PackageNotFoundError:
        return
    for extra, needs in sorted(extras.items()):
        found = {need.name: _installed(need) for need in needs}
        if wrong := [f"{name} {problem}" for name, (_, problem) in found.items() if problem]:
            lost = f"; without it no {WITHOUT[extra]}" if extra in WITHOUT else ""
            yield Finding(f"[{extra}]", "note", ", ".join(wrong) + lost, f'pip install "hookmap[{extra}]"')
        else:
            yield Finding(f"[{extra}]", "ok", ", ".join(f"{name} {version}" for name, (version, _) in found.items()))


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "python": _python,
    "hookmap": _requirements,
    "import": _imports,
    "devices": _devices,
    "room": _room,
    "hub": _hub,
    "settings": _settings,
    "maps": _maps,
    "extras": _extras,
    "capture": _demo,
}


def _needs() -> tuple[list[Any], dict[str, list[Any]]]:
    """The requirements of the installed hookmap on this platform, and those of each extra."""
    from packaging.requirements import Requirement

    extras: dict[str, list[Any]] = {
        name: [] for name in metadata.metadata("hookmap").get_all("Provides-Extra") or [] if name not in COLLECTIONS
    }
    core = []
    for need in map(Requirement, metadata.requires("hookmap") or []):
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            core.append(need)
            continue
        for extra, needs in extras.items():
            if need.marker.evaluate({"extra": extra}):
                needs.append(need)
    return core, extras


def _installed(need: Any) -> tuple[str, str]:
    """The installed version, and what is wrong with it."""
    try:
        version = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return "", "is not installed"
    fits = need.specifier.contains(version, prereleases=True)
    return version, "" if fits else f"{version} is installed, and {need.specifier} is needed"


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
