"""A model that runs elsewhere: the same rows, out of what is saved and of nothing else."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.schema.request import RequestModel
from support import plain_hooks
from support.raises import raises
from transformers import AutoTokenizer

import hookmap
from hookmap.demo import MODEL_PATH
from hookmap.errors import CaptureError, ModelError

pytestmark = pytest.mark.slow

PROMPTS = ["Tom has 3 apples. He buys 4 more. How many apples does Tom have?", "Hi", "A"]
RUNS: list[dict[str, Any]] = [
    {"points": ["resid_pre", "resid_mid", "z", "logits"], "layers": [8, 12], "max_new_tokens": 40},
    {"points": ["resid_mid", "mlp_post"], "layers": [3], "max_new_tokens": 0},
    {"points": ["mlp_out"], "layers": [3], "positions": "last", "max_new_tokens": 9, "stop": "9", "batch_size": 2},
]


def assert_same(found: Any, expected: Any) -> None:
    assert found.tokens == expected.tokens
    for sample in expected.samples:
        assert found.samples[sample.sample] == sample
        for point, layer in expected.keys:
            assert torch.equal(found.read(sample.sample, point, layer), expected.read(sample.sample, point, layer))


@pytest.mark.parametrize("run", RUNS)
def test_the_simulation_brings_what_hooks_see(run: dict[str, Any]) -> None:
    there = hookmap.open_remote(MODEL_PATH, "local")
    assert all(parameter.is_meta for parameter in there.model.parameters())
    assert_same(there.capture(PROMPTS, **run), hookmap.open(MODEL_PATH).capture(PROMPTS, **run))


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe", "gpt_neox", "olmo2"])
def test_on_blocks_of_each_kind(family: str, tmp_path: Path) -> None:
    """Tuples, experts, parallel branches (a sum of two boundaries), norms behind the branches."""
    model = plain_hooks.build(family)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL_PATH).save_pretrained(tmp_path)
    there, here = hookmap.open_remote(tmp_path, "local"), hookmap.open(tmp_path)
    run = {"points": "all", "layers": "all", "max_new_tokens": 5}
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    assert_same(there.capture(prompts, **run), here.capture(prompts, **run))


SERVER = """
import sys
sys.modules["hookmap"] = None  # a server does not have it
import torch
from nnsight import TransformersModel
from nnsight.schema.request import RequestModel
from nnsight.tracing import tracer as tracing
from transformers import AutoTokenizer
folder, blob, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = TransformersModel(folder, task="text-generation", tokenizer=tokenizer, dispatch=True)
request = RequestModel.deserialize(open(blob, "rb").read(), model._remoteable_persistent_objects())
tracing.inc()
request.execute(request.info.code)
saved = {name: value for name, value in request.info.frame.f_locals.items() if id(value) in tracing._saves()}
torch.save(saved, out)
"""


class Elsewhere(RemoteBackend):  # type: ignore[misc]
    """What a server would be sent goes to another process, and its saves come back: the network is all that lacks."""

    def __init__(self, folder: Path) -> None:
        super().__init__("a model")
        self.folder = folder
        self.sent: list[bytes] = []

    def __call__(self, tracer: Any = None) -> Any:
        blob, out = self.folder / "blob", self.folder / "saved"
        self.sent.append(RequestModel.serialize(tracer))
        blob.write_bytes(self.sent[-1])
        subprocess.run([sys.executable, "-c", SERVER, str(MODEL_PATH), str(blob), str(out)], check=True)
        self._push(torch.load(out, weights_only=False), tracer)


class ElsewhereModel(nnsight.TransformersModel):  # type: ignore[misc]
    backend: Elsewhere

    def _remote_backend(self, *_: Any, **__: Any) -> Elsewhere:
        return self.backend


def test_everything_comes_back_through_saves_alone(tmp_path: Path) -> None:
    """In the simulation a list of the caller's would be filled too; in another process it would not."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    model = ElsewhereModel(str(MODEL_PATH), task="text-generation", tokenizer=tokenizer)
    model.backend = Elsewhere(tmp_path)
    there = hookmap.open_remote(model)
    assert_same(there.capture(PROMPTS, **RUNS[0]), hookmap.open(MODEL_PATH).capture(PROMPTS, **RUNS[0]))
    assert all(parameter.is_meta for parameter in there.model.parameters())


def test_what_needs_weights_here_is_refused() -> None:
    there = hookmap.open_remote(MODEL_PATH, "local")
    for call in (lambda: there.lens("Hi"), lambda: there.attribute("Hi"), lambda: there.proofs):
        with raises(ModelError, "no weights here"):
            call()
    with raises(ModelError, "no weights here"):
        there.generate("Hi", [{"do": "ablate", "point": "mlp_out", "layers": [1]}])
    with raises(CaptureError, "remotely only"):
        there.capture("Hi", ["resid_mid"], [1], engine="hooks")
    with raises(CaptureError, "seed"):
        there.capture("Hi", ["resid_mid"], [1], do_sample=True, seed=1)


def test_a_request_that_cannot_be_sent_is_told() -> None:
    """nnsight asks the hub for the model's name before it asks the server."""
    with raises(CaptureError, "failed on http"):
        hookmap.open_remote(MODEL_PATH, "http://127.0.0.1:9").capture("Hi", ["resid_mid"], [1], max_new_tokens=2)


@pytest.mark.parametrize("remote", [False, None, "", 5])
def test_what_names_no_server_is_refused_and_does_not_run_here(remote: Any) -> None:
    with raises(CaptureError, "expected True"):
        hookmap.open_remote(MODEL_PATH, remote)


def test_what_is_no_model_is_refused() -> None:
    with raises(ModelError, "cannot open a int remotely"):
        hookmap.open_remote(5, "local")
