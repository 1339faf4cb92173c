"""Interventions on other families than Llama: in float32 the tokens and rows that they give on transformers."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support import vllm_families
from support.on_vllm import SCARCE, SETTINGS
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.errors import HookmapError, InterventionError

FAMILIES = ("qwen3", "gemma2", "gpt2", "olmo2", "exaone4")
"""with norms of heads; in a sandwich of norms; with one projection for q, k and v and biases; transformers' modules;
vLLM's own without a norm before a branch"""
BARE = ("olmo2", "exaone4")
"""their branches read the stream itself"""
RUN_IN_FLOAT32 = tuple(name for name in vllm_families.FAMILIES if name != "qwen3_next")
ASKED = [[1, 4, 9, 77, 31], [2, 5, 8, 200, 11, 13, 90, 54], [3] * 30]
NEW = 6
WATCHED = ["resid_pre", "resid_mid", "mixer_out", "mlp_out", "resid_post"]


def numbers(seed: int, *shape: int) -> Any:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2).tolist()


EDITS: dict[str, list[dict[str, Any]]] = {
    "stream": [
        {"do": "steer", "point": "resid_post", "layers": [1], "vector": numbers(1, 64), "strength": 3},
        {"do": "project_out", "point": "resid_mid", "layers": "all", "direction": numbers(2, 64)},
        {"do": "scale", "point": "resid_pre", "layers": [2], "factor": 0.5, "positions": "generated"},
    ],
    "branches": [
        {"do": "ablate", "point": "mixer_out", "layers": [0]},
        {"do": "noise", "point": "mlp_out", "layers": [1], "std": 1.0},
    ],
    "what the mixer reads": [{"do": "scale", "point": "mixer_in", "layers": [1], "factor": -0.4}],
    "what the MLP reads": [{"do": "scale", "point": "mlp_in", "layers": [2], "factor": 2.0}],
    "inside": [
        {"do": "scale", "point": "z", "layers": [0, 2], "heads": [1], "factor": -3.0},
        {"do": "clamp", "point": "mlp_post", "layers": "all", "feature": 5, "value": 4.0},
    ],
    "q": [{"do": "noise", "point": "q", "layers": [1], "std": 2.0}],
    "k": [{"do": "scale", "point": "k", "layers": [0], "factor": -2.0, "positions": [1, 2]}],
    "v": [{"do": "steer", "point": "v", "layers": [2], "vector": numbers(3, 32), "strength": 2}],
    "skip": [{"do": "skip", "what": "block", "layers": [1]}],
}


def scaled(point: str) -> list[dict[str, Any]]:
    return [{"do": "scale", "point": point, "layers": [1], "factor": -0.4}]


def by_hooks(family: str, folders: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint of this family, and the model as the hooks engine reads it."""
    from transformers import AutoModelForCausalLM

    folder = vllm_families.save(family, folders.mktemp(family) / family)
    tiny_tokenizer().save_pretrained(folder)
    # Other kinds of attention in transformers leave out the cap on Gemma 2's scores.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    return folder, hookmap.open(model, check=False)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """By the hooks engine: transformers loads no model in a process where vLLM runs one of its models."""
    found = {}
    for family in FAMILIES:
        folder, own = by_hooks(family, tmp_path_factory)
        runs = {
            name: own.generate(ASKED, edits, {"points": WATCHED}, max_new_tokens=NEW, batch_size=1)
            for name, edits in {"none": [], **EDITS}.items()
        }
        found[family] = folder, runs
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_are_those_of_the_hooks_engine(expected: Any, family: str) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    folder, runs = expected[family]
    settings = {**SETTINGS, **SCARCE, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 24}
    with hookmap.open_on_vllm(folder, eager=True, **settings) as model:
        for name, run in runs.items():
            if family in BARE and name == "what the MLP reads":
                with pytest.raises(InterventionError, match=r"mlp_in of layer 2 .* the same tensor as resid_mid\.2"):
                    model.generate(ASKED, EDITS[name], max_new_tokens=2)
                continue
            found = model.generate(ASKED, EDITS.get(name, []), {"points": WATCHED}, max_new_tokens=NEW)
            assert found.tokens == run.tokens, name
            far = 0.0
            for key in run.keys:
                for sample in range(len(ASKED)):
                    wanted = run.store.read(sample, *key)
                    off = (found.store.read(sample, *key) - wanted).norm(dim=-1)
                    assert float((off / wanted.norm(dim=-1).clamp_min(1e-3)).max()) < 1e-4, (name, key, sample)
                    plain = runs["none"].store.read(sample, *key)[: len(ASKED[sample])]
                    far = max(far, float((wanted[: len(plain)] - plain).abs().max()))
            assert (far > 0.05) == (name != "none"), name
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def by_points(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Of each family that vLLM runs in float32, by the hooks engine: one layer of each point that it writes, scaled."""
    found = {}
    for family in RUN_IN_FLOAT32:
        folder, own = by_hooks(family, tmp_path_factory)
        watched, runs = [point for point in WATCHED if point in own.map.points], dict[str, Any]()
        for point in own.map.points:
            with contextlib.suppress(HookmapError):  # it is not there, or not written
                runs[point] = own.generate(ASKED, scaled(point), {"points": watched}, max_new_tokens=NEW, batch_size=1)
        found[family] = folder, runs
    return found


@pytest.mark.many
@pytest.mark.parametrize("family", RUN_IN_FLOAT32)
def test_each_point_is_written_as_the_hooks_engine_writes_it(by_points: Any, family: str) -> None:
    """Above all where two points are one tensor: what a branch without a norm reads, and the stream."""
    from vllm.distributed import cleanup_dist_env_and_memory

    folder, runs = by_points[family]
    settings = {**SETTINGS, **SCARCE, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 24}
    written = 0
    with vllm_families.repaired(family), hookmap.open_on_vllm(folder, eager=True, **settings) as model:
        for point, run in runs.items():
            if point not in model.map.points:
                continue
            watched = [name for name in WATCHED if name in model.map.points and name in {key[0] for key in run.keys}]
            if family in BARE and point == "mlp_in":
                with pytest.raises(InterventionError, match=r"the same tensor as resid_mid\.1"):
                    model.generate(ASKED, scaled(point), max_new_tokens=2)
                continue
            found = model.generate(ASKED, scaled(point), {"points": watched}, max_new_tokens=NEW)
            assert found.tokens == run.tokens, point
            for key in found.keys:
                for sample in range(len(ASKED)):
                    wanted = run.store.read(sample, *key)
                    off = (found.store.read(sample, *key) - wanted).norm(dim=-1)
                    assert float((off / wanted.norm(dim=-1).clamp_min(1e-3)).max()) < 1e-4, (point, key, sample)
            written += 1
    cleanup_dist_env_and_memory()
    assert written >= 9
