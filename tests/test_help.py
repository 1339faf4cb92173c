"""Help shows what each public method takes; each result says in a line what it is."""

import inspect
from typing import Any

import pytest
from support import plain_hooks
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.analysis.sweeps import Sweep
from hookmap.capture.result import Capture
from hookmap.maps.document import ArchitectureMap
from hookmap.model import HookedModel
from hookmap.services.ray.model import RayModel
from hookmap.stores.reader import CaptureStore
from hookmap.vllm.model import VllmModel

CLASSES = (HookedModel, RayModel, VllmModel, Capture, CaptureStore, ArchitectureMap, Sweep)
OPEN = {"generation", "settings", "opening"}
"""what stands for the arguments of others, as help says: transformers' GenerationConfig, vLLM's LLM, hookmap.open"""
SCREEN = 400


def public() -> dict[str, Any]:
    found = {name: getattr(hookmap, name) for name in hookmap.__all__ if inspect.isfunction(getattr(hookmap, name))}
    found |= {f"metrics.{name}": getattr(hookmap.metrics, name) for name in hookmap.metrics.__all__}
    for owner in CLASSES:
        for name, value in inspect.getmembers(owner, inspect.isfunction):
            if not name.startswith("_") and value.__module__.startswith("hookmap"):
                found[f"{owner.__name__}.{name}"] = value
    refused = HookedModel.sweep is not VllmModel.sweep and VllmModel.sweep  # one that says so, in place of several
    return {name: each for name, each in found.items() if inspect.isfunction(each) and each is not refused}


@pytest.mark.parametrize("name", public())
def test_help_shows_every_parameter_of_a_public_function(name: str) -> None:
    function = public()[name]
    signature = inspect.signature(function)
    bare = [each.name for each in signature.parameters.values() if each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    assert set(bare) <= OPEN, f"{name}{signature}"
    assert function.__doc__, name


def results() -> dict[str, Any]:
    hm = hookmap.open(plain_hooks.build("llama"), tokenizer=tiny_tokenizer())
    text, other = [5, 17, 3, 60, 22], [5, 17, 40, 60, 22]
    metric = hookmap.metrics.logit_difference(7, 9)
    run = hm.capture([text, other], max_new_tokens=3)
    read = hm.capture([text], ["resid_pre", "mixer_out", "mlp_out", "resid_post", "z"], max_new_tokens=0)
    vector = hm.steering_vector([text], [other])
    found = {
        "a model": hm,
        "a map": hm.map,
        "a capture": run,
        "a store": run.store,
        "an estimate": hm.estimate([text]),
        "gradients": hm.gradients([text], metric),
        "an estimate of gradients": hm.estimate_gradients([text], metric),
        "a sweep": hm.sweep(text, other, 7, 9),
        "a sweep of pairs": hm.sweep([hookmap.Pair(text, other, 7, 9)] * 3, point="z", over="heads"),
        "a grid": hm.sweep(text, other, 7, 9).effect,
        "a lens": hm.lens(text),
        "an attribution": hm.attribute([text]),
        "scores of heads": hm.head_scores(length=5),
        "a vector": vector,
        "a stack": read.accumulated_resid(),
        "the parts of the stream": read.decompose_resid(),
        "results of heads": hm.stack_head_results(read),
        "flat rows": read.rows("resid_post", 1),
        "a selector": hm.selectors("resid_post", 1)[0],
        "a weight": hm.weights("z", 1)[0],
        "a metric": metric,
        "a pair": hookmap.Pair(text, other, 7, 9),
    }
    return found


@pytest.mark.slow
def test_every_result_says_what_it_is_in_a_few_lines() -> None:
    long = {name: repr(value) for name, value in results().items() if len(repr(value)) > SCREEN}
    assert not long, {name: f"{len(text)}: {text[:300]}" for name, text in long.items()}
