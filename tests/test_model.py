"""`hookmap.open`: what it accepts, one copy of the weights, maps that contradict the model, what cannot be loaded."""

import http.server
import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import plain_hooks
from support.opened import opened
from support.raises import raises
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.loading.checkpoints import load_tokenizer
from hookmap.maps.document import ArchitectureMap
from hookmap.model import HookedModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    plain_hooks.build("qwen3", torch.bfloat16).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def captured(hm: Any) -> torch.Tensor:
    return hm.capture([[5, 17, 3]], ["resid_mid"], [1], max_new_tokens=4)["resid_mid", 1]


@pytest.mark.slow
def test_a_local_folder_opens_in_the_checkpoints_dtype(folder: Path) -> None:
    for x in (folder, str(folder)):
        hm = hookmap.open(x, device="cpu")
        assert hm.map.architecture == "Qwen3ForCausalLM" and hm.tokenizer is not None
        assert captured(hm).dtype == torch.bfloat16
        assert not hm.model.training
    assert captured(hookmap.open(folder, device="cpu", dtype=torch.float32)).dtype == torch.float32


@pytest.mark.slow
def test_nnsight_models_and_modules_share_one_copy_of_the_weights() -> None:
    import nnsight

    model, tokenizer = plain_hooks.build("gpt2"), tiny_tokenizer()
    opened = [
        hookmap.open(model, tokenizer=tokenizer),
        hookmap.open(nnsight.TransformersModel(model, tokenizer=tokenizer)),
        hookmap.open(nnsight.NNsight(model)),
    ]
    assert all(hm.model is model for hm in opened)
    assert opened[1].tokenizer is tokenizer
    first = captured(opened[0])
    assert all(torch.equal(captured(hm), first) for hm in opened)


def test_an_nnsight_model_still_traces_afterwards() -> None:
    import nnsight

    wrapped = nnsight.NNsight(plain_hooks.build("gpt2"))
    captured(hookmap.open(wrapped))
    with wrapped.trace(torch.tensor([[1, 2, 3]])):
        hidden = wrapped.transformer.h[0].output.save()
    assert (hidden[0] if isinstance(hidden, tuple) else hidden).shape[-2:] == (3, 32)


@pytest.mark.slow
def test_the_stored_edits_of_an_nnsight_model_apply() -> None:
    """The edited model is the one that was opened; its edit is seen, and only until it is cleared."""
    import nnsight

    wrapped = nnsight.NNsight(plain_hooks.build("llama"))
    hm = hookmap.open(wrapped)
    with wrapped.edit(inplace=True):
        wrapped.model.layers[0].mlp.output[:] = 0
    edited = hm.capture([[5, 17, 3]], ["resid_mid", "resid_post"], [0], max_new_tokens=1)
    assert torch.equal(edited["resid_post", 0], edited["resid_mid", 0])
    wrapped.clear_edits()
    assert not torch.equal(
        hm.capture([[5, 17, 3]], ["resid_post"], [0], max_new_tokens=1)["resid_post", 0], edited["resid_post", 0]
    )


@pytest.mark.slow
def test_a_truthful_map_is_kept_and_a_file_of_it_too(tmp_path: Path) -> None:
    model = plain_hooks.build("llama")
    found = hookmap.discover(model)
    found.save(tmp_path / "map.json")
    for given in (found, tmp_path / "map.json", str(tmp_path / "map.json")):
        assert hookmap.open(model, map=given).map.kinds == found.kinds


@pytest.mark.slow
def test_a_map_of_another_size_of_the_architecture_serves() -> None:
    config = plain_hooks.FAMILIES["llama"].config()
    config.num_hidden_layers, config.hidden_size, config.head_dim = 5, 48, 12
    larger = transformers.LlamaForCausalLM(config)
    given = hookmap.discover(larger).model_copy(update={"scope": "architecture"})
    opened = hookmap.open(plain_hooks.build("llama"), map=given)
    assert opened.map.num_layers == 3
    own = hookmap.discover(plain_hooks.build("llama"))
    points = [name for name in own.points if name in given.points]
    assert opened.map.selectors(points, "all") == own.selectors(points, "all"), "heads lie as they do in this model"


def _with_point(m: ArchitectureMap, point: str, **change: Any) -> ArchitectureMap:
    kind = m.kinds[0]
    template = kind.points[point]
    term = template.terms[0].model_copy(update=change)
    points = {**kind.points, point: template.model_copy(update={"terms": (term,)})}
    return m.model_copy(update={"kinds": (kind.model_copy(update={"points": points}), *m.kinds[1:])})


def test_every_contradiction_is_in_one_message() -> None:
    model = plain_hooks.build("llama")
    wrong = _with_point(hookmap.discover(model), "resid_mid", module="model.layers.{i}.input_layernorm")
    wrong = wrong.model_copy(update={"d_model": 64, "config_hash": "0" * 64, "layers_path": "model.blocks.{i}"})
    with pytest.raises(hookmap.MapMismatchError) as error:
        hookmap.open(model, map=wrong)
    for part in (
        "d_model",
        "64",
        "32",
        "config_hash",
        "layers_path",
        "resid_mid",
        "input_layernorm",
        "hookmap discover",
    ):
        assert part in str(error.value)


def test_contradictions_of_many_layers_and_of_one_tensors_names_are_one_line() -> None:
    model = plain_hooks.build("llama", num_hidden_layers=3)
    wrong = hookmap.discover(model)
    for name in ("mlp_out", "mlp_out_raw"):
        wrong = _with_point(wrong, name, module="model.layers.{i}")
    with pytest.raises(hookmap.MapMismatchError) as error:
        hookmap.open(model, map=wrong)
    (line,) = [line for line in str(error.value).splitlines() if line.startswith("  - ")]
    assert line.startswith("  - mlp_out_raw, mlp_out: the map says model.layers.{i}.output")
    assert line.endswith("the model has it at model.layers.{i}.mlp.output (layers 0–2)")


@pytest.mark.parametrize("other", ["gpt2", "qwen3", "gemma2"])
def test_a_map_of_another_architecture_is_refused(other: str) -> None:
    with raises(hookmap.MapMismatchError, "architecture"):
        hookmap.open(plain_hooks.build("llama"), map=hookmap.discover(plain_hooks.build(other)))


@pytest.mark.parametrize(
    "change", [{"side": "output"}, {"scale": 0.5}, {"module": "model.layers.{i}"}, {"index": "hidden_states"}]
)
def test_a_point_in_the_wrong_place_is_refused(change: dict[str, Any]) -> None:
    """Decisive: each of these has the right shape, and the wrong numbers or none."""
    model = plain_hooks.build("llama")
    with raises(hookmap.MapMismatchError, "resid_mid"):
        hookmap.open(model, map=_with_point(hookmap.discover(model), "resid_mid", **change))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ("./no/such/folder", "there is no folder"),
        (3, "cannot open a int"),
        (torch.nn.Linear(2, 2), "holds no transformers model"),
    ],
)
def test_what_is_no_model_is_refused(x: Any, message: str) -> None:
    with pytest.raises(hookmap.ModelError, match=message):
        hookmap.open(x)


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        weightless = transformers.LlamaForCausalLM(plain_hooks.FAMILIES["llama"].config())
    with raises(hookmap.ModelError, "no weights"):
        hookmap.open(weightless)


def test_a_folder_that_is_no_model_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with raises(hookmap.ModelError, "notes.txt"):
        hookmap.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with raises(hookmap.ModelError, "JSON"):
        hookmap.open(tmp_path)


def test_a_folder_without_a_tokenizer_takes_token_ids_and_refuses_text(tmp_path: Path) -> None:
    plain_hooks.build("gpt2").save_pretrained(tmp_path)
    hm = hookmap.open(tmp_path, device="cpu")
    assert captured(hm).shape == (1, 6, 32)
    with raises(hookmap.TokenizerError, "holds no tokenizer"):
        hm.capture("to be", ["resid_mid"], [1])
    with raises(hookmap.TokenizerError, "holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_weights_of_other_sizes_than_the_config_says_are_named(tmp_path: Path) -> None:
    """transformers says this in a log, and refers to it in its error."""
    plain_hooks.build("gpt2").save_pretrained(tmp_path)
    plain_hooks.build("gpt2", n_embd=64).config.save_pretrained(tmp_path)
    with pytest.raises(hookmap.ModelError, match=r"of other sizes.*c_proj.weight is \[32, 32\], expected \[64, 64\]"):
        hookmap.open(tmp_path, device="cpu")


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """transformers fills them with random numbers and a warning; a capture would look as good as any."""
    model = plain_hooks.build("llama")
    kept = {name: weight for name, weight in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    with raises(hookmap.ModelError, "no weights for 3 parameters", "layers.1.mlp", "random"):
        hookmap.open(tmp_path, device="cpu")


@pytest.mark.slow
def test_weights_that_the_model_has_no_place_for_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers says it in a log that is silent here; a Llama of Qwen3's weights would compute anything."""
    model = plain_hooks.build("qwen3")
    model.save_pretrained(tmp_path)
    hookmap.open(tmp_path, device="cpu")
    assert not caplog.records
    layers, same = model.config.num_hidden_layers, model.config.to_dict()
    del same["model_type"], same["architectures"]
    transformers.LlamaConfig(**same, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    hookmap.open(tmp_path, device="cpu")
    (said,) = [record.getMessage() for record in caplog.records]
    assert (
        f"LlamaForCausalLM has no place for {2 * layers} of the weights" in said and "layers.0.self_attn.k_norm" in said
    )


def test_a_folders_own_code_does_not_run_unless_it_is_trusted(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    (model / "configuration_own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (model / "config.json").write_text(json.dumps(config))
    for use in (hookmap.open, hookmap.discover):
        with raises(hookmap.ModelError, "--trust-remote-code"):
            use(model)
    assert not ran.exists()


def test_a_pickle_that_holds_more_than_tensors_does_not_run(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"weight": _Touch(tmp_path / "ran")}, tmp_path / "model" / "pytorch_model.bin")
    with raises(hookmap.ModelError, "safetensors"):
        hookmap.open(tmp_path / "model", device="cpu")
    assert not (tmp_path / "ran").exists()


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does: every repository called `gated/...` is gated, every other is not there."""

    def do_HEAD(self) -> None:
        gated = self.path.startswith("/gated/")
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "endpoint", "message"),
    [
        ("gated/model", "hub", "hf auth login"),
        ("nobody/nothing", "hub", "no such repository"),
        ("nobody/nothing", "http://127.0.0.1:9", "cannot be reached"),
        ("nobody/nothing", "offline", "hf download nobody/nothing"),
    ],
)
@pytest.mark.slow
def test_what_the_hub_refuses_is_one_sentence(name: str, endpoint: str, message: str, hub: str, tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads its settings when it is imported."""
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1" if endpoint == "offline" else "0"}
    env["HF_ENDPOINT"] = hub if endpoint in ("hub", "offline") else endpoint
    code = f"import hookmap\ntry: hookmap.open({name!r})\nexcept hookmap.ModelError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert message in done.stdout
    assert "Retrying" not in done.stderr and "Traceback" not in done.stderr


METHODS = (
    "capture",
    "generate",
    "estimate",
    "sweep",
    "lens",
    "attribute",
    "head_scores",
    "to_str_tokens",
    "steering_vector",
    "measure",
    "loss",
    "gradients",
)


@pytest.mark.parametrize("name", METHODS)
def test_help_shows_the_parameters_of_each_method(name: str) -> None:
    shown = inspect.signature(getattr(HookedModel, name)).parameters
    assert "options" not in shown and "chat" in shown


@pytest.mark.slow
def test_every_result_fits_a_line() -> None:
    hm = opened("llama")
    results = (
        hm.capture([[1, 2, 3]], max_new_tokens=0),
        hm.lens([1, 2, 3]),
        hm.lens([1, 2, 3]).grid(),
        hm.attribute([1, 2, 3]),
        hm.attribute([1, 2, 3], 5, 9),
        hm.head_scores([[1, 2, 3]]),
        hm.sweep([1, 2, 3], [4, 2, 3], 5, 9),
        hm.gradients([[1, 2, 3]], hookmap.metrics.loss()),
        hm.steering_vector([[1, 2]], [[3, 2]]),
        hm,
    )
    for result in results:
        assert repr(result).startswith("<") and len(repr(result)) < 300 and "\n" not in repr(result), repr(result)
