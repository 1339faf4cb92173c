"""The really trained model of these tests: `make real` names its folder."""

import os
from typing import Any

import pytest
import torch

import hookmap


@pytest.fixture(scope="module")
def source() -> str:
    if "HOOKMAP_REAL_MODEL" not in os.environ:
        pytest.skip("no real model here: run `make real`")
    return os.environ["HOOKMAP_REAL_MODEL"]


@pytest.fixture(scope="module")
def hm(source: str) -> Any:
    return hookmap.open(source, device="cpu")


@pytest.fixture(scope="module")
def exact(source: str) -> Any:
    """In float32: the model's own rounding is out of the way."""
    return hookmap.open(source, device="cpu", dtype=torch.float32)
