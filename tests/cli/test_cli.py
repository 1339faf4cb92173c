"""The command line as a person and a program meet it: what is on stdout, what on stderr, and the exit code."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from support.documents import hybrid

import hookmap
from hookmap.cli import capture_run
from hookmap.cli.main import main
from hookmap.cli.parsing import parse_layers
from hookmap.demo import MODEL_PATH
from hookmap.maps.parsing import parse
from hookmap.stores import reader

CHECKOUT = Path(__file__).resolve().parents[2]


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_folder")]


def run(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def config_folder(folder: Path, **changes: Any) -> Path:
    """A model folder with a config and nothing else: enough for discover, show and verify --random."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes, **heads, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def capture_demo(folder: str, *more: str) -> Result:
    return run(
        "capture", "--points", "resid_pre,resid_mid", "--layers", "8,-4", "--max-new-tokens", "4", "-o", folder, *more
    )


# The main job ---------------------------------------------------------------------------------------------------------


def test_discover_prints_the_map_for_programs_and_the_table_for_people(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "llama")
    piped = run("discover", str(folder))
    assert piped.exit_code == 0, piped.output
    assert parse(piped.stdout) == hookmap.discover(str(folder))
    assert "post_attention_layernorm.input[0]" in piped.stderr

    only_json = run("discover", str(folder), "--json")
    assert only_json.stdout == piped.stdout
    assert only_json.stderr == ""

    written = run("discover", str(folder), "-o", "map.json", "--quiet")
    assert (written.stdout, written.stderr) == ("", "wrote map.json\n")
    assert hookmap.load_map("map.json") == parse(piped.stdout)


def test_capture_prints_its_folder_and_inspect_shows_it(tmp_path: Path) -> None:
    captured = capture_demo("run", "--prompt", "2 and 3?", "--prompt", "Tom has 3 apples.")
    assert captured.exit_code == 0, captured.output
    assert captured.stdout == "run\n"
    assert "the bundled demo model" in captured.stderr
    assert "2 samples, 4 tensors" in captured.stderr, "the size is told before it begins"

    store = hookmap.open_store("run")
    assert store.keys == (("resid_pre", 8), ("resid_mid", 8), ("resid_pre", 16), ("resid_mid", 16))
    assert store.samples[0].prompt == "2 and 3?", "a text is read as it is"

    shown = run("inspect", "run", "--verify")
    assert shown.exit_code == 0 and shown.stdout == ""
    for part in ("finished", "2 and 3?", "resid_mid", "F32", "× 64", "mean norm", "sound"):
        assert part in shown.stderr
    found = json.loads(run("inspect", "run", "--json").stdout)
    assert (found["samples"], found["layers"], found["finished"]) == (2, [8, 16], True)
    norm = store.read(0, "resid_mid", 8).norm(dim=1).sum() + store.read(1, "resid_mid", 8).norm(dim=1).sum()
    mean = next(t["mean_norm"] for t in found["tensors"] if t["name"] == "resid_mid.8")
    assert mean == pytest.approx(float(norm) / found["rows"], rel=1e-5)


def test_capture_without_a_folder_makes_a_new_one_each_time() -> None:
    args = ("capture", "--points", "embed", "--prompt", "a", "--max-new-tokens", "1", "--no-chat")
    assert [run(*args).stdout for _ in range(2)] == ["captures/0001\n", "captures/0002\n"]
    assert hookmap.open_store("captures/0001").samples[0].prompt == "a", "--no-chat sends it as it is"


def test_the_same_seed_samples_the_same_text() -> None:
    texts = []
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2"), ("d", "3")):
        args = ("--temperature", "3", "--seed", seed, "--prompt", "x", "--max-new-tokens", "12")
        done = run("capture", "--points", "embed", "-o", folder, *args)
        assert done.exit_code == 0, done.output
        texts.append(hookmap.open_store(folder).tokens[0])
    assert texts[0] == texts[1]
    # At temperature 3 over 259 characters, that three seeds give the same 12 tokens is less likely than 1e-6.
    assert len(set(texts)) > 1


def test_prompts_come_from_a_file_of_json_lines() -> None:
    lines = [
        '"one"',
        '{"prompt": "two"}',
        '{"question": "three"}',
        "",
        '{"messages": [{"role": "user", "content": "four"}]}',
    ]
    Path("p.jsonl").write_text("\n".join(lines))
    done = capture_demo("run", "--prompts", "p.jsonl", "--batch-size", "3")
    assert done.exit_code == 0, done.output
    prompts = [sample.prompt for sample in hookmap.open_store("run").samples]
    assert [word in prompt for word, prompt in zip(("one", "two", "three", "four"), prompts, strict=True)] == [True] * 4


def test_show_draws_each_point_next_to_its_module(tmp_path: Path) -> None:
    done = run("show", str(config_folder(tmp_path / "llama")))
    assert done.exit_code == 0, done.output
    lines = [line.strip("│├└─ ") for line in done.stdout.splitlines()]
    place = {line.split("  ")[0]: number for number, line in enumerate(lines)}
    in_order = [
        "layers 0–2: LlamaDecoderLayer", "● resid_pre", "input_layernorm", "● mixer_in = attn_in", "self_attn",
        "● mixer_out = attn_out = mixer_out_raw = attn_out_raw", "● resid_mid", "post_attention_layernorm", "● mlp_in",
        "mlp", "● resid_post", "norm", "● final_norm", "lm_head", "● logits = logits_raw",
    ]  # fmt: skip
    assert [place[text] for text in in_order] == sorted(place[text] for text in in_order)
    assert lines.count("q_proj  Linear") == 1, "layers of one kind are one branch"


def test_show_needs_no_model_beside_a_map() -> None:
    parse(hybrid()).save("map.json")
    done = run("show", "map.json")
    assert done.exit_code == 0 and done.stderr == ""
    for part in ("layers 0–1, 4: Block", "layers 2, 5: Block", "layer 3: ParallelBlock", "0.5 × self_attn.output[0]"):
        assert part in done.stdout
    assert "○ no resid_mid, resid_mid_sum  attention and MLP run in parallel" in done.stdout


def test_verify_passes_on_a_true_map_and_exits_1_on_a_false_one(tmp_path: Path) -> None:
    folder = str(config_folder(tmp_path / "llama"))
    good = run("verify", folder, "--random")
    assert good.exit_code == 0 and good.stdout == "" and "the map tells the truth" in good.stderr

    document = json.loads(run("discover", folder, "--json").stdout)
    points = document["kinds"]["attention+dense"]["points"]
    points["resid_mid"] = points["resid_pre"]
    Path("false.json").write_text(json.dumps(document))
    bad = run("verify", folder, "--random", "--map", "false.json", "--json")
    assert bad.exit_code == 1 and bad.stderr == ""
    assert [c for c in json.loads(bad.stdout)["checks"] if not c["passed"]]


# Which model ----------------------------------------------------------------------------------------------------------


def test_the_model_is_the_typed_one_then_the_environment_then_the_file_then_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {name: number for number, name in enumerate(("typed", "environment", "file"), start=1)}
    for name, layers in sizes.items():
        config_folder(tmp_path / "models" / name, num_hidden_layers=layers)
    (tmp_path / "below").mkdir()

    def layers(*args: str) -> tuple[int, str]:
        done = run("discover", "--quiet", *args)
        assert done.exit_code == 0, done.output
        return parse(done.stdout).num_layers, done.stderr

    assert layers() == (20, f"model: {MODEL_PATH} (the bundled demo model)\n")
    (tmp_path / "hookmap.yaml").write_text("model: models/file\n")
    monkeypatch.chdir(tmp_path / "below")
    number, note = layers()
    assert number == 3 and "named by hookmap.yaml" in note, "found upwards; its paths are relative to itself"
    monkeypatch.setenv("HOOKMAP_MODEL", str(tmp_path / "models" / "environment"))
    number, note = layers()
    assert number == 2 and "named by HOOKMAP_MODEL" in note
    assert layers(str(tmp_path / "models" / "typed")) == (1, "")


def test_hookmap_yaml_gives_the_options_that_are_not_typed() -> None:
    Path("hookmap.yaml").write_text("points: [resid_pre, embed]\nlayers: [3, -1]\nmax_new_tokens: 1\n")
    done = run("capture", "--prompt", "a", "-o", "run")
    assert done.exit_code == 0, done.output
    assert hookmap.open_store("run").keys == (("embed", None), ("resid_pre", 3), ("resid_pre", 19))


BY_POINT = (("embed", None), ("z", 2), ("z", 3), ("resid_post", 3), ("resid_post", 5), ("resid_post", 19))


@pytest.mark.parametrize(
    ("typed", "file"),
    [
        (("--points", "resid_post@3,5,-1,z@2-3,embed"), ""),
        (("--points", "resid_post, z@2-3, embed", "--layers", "3,5,-1"), ""),
        (("--points", "resid_post@3,5,-1,z@2-3,embed"), "layers: 7\n"),
        ((), "points: {resid_post: [3, 5, -1], z: 2-3, embed: }\n"),
        ((), "points: 'resid_post@3,5,-1,z@2-3,embed'\n"),
    ],
)
def test_each_point_may_have_layers_of_its_own(typed: tuple[str, ...], file: str, tmp_path: Path) -> None:
    Path("hookmap.yaml").write_text(file)
    done = run("capture", *typed, "--prompt", "1+2=3", "--max-new-tokens", "0", "-o", "run")
    assert done.exit_code == 0, done.output
    store, hm = hookmap.open_store("run"), hookmap.open(MODEL_PATH, device="cpu")
    assert store.keys == BY_POINT and not store.verify()
    direct = hm.capture("1+2=3", {"resid_post": [3, 5, -1], "z": [2, 3], "embed": None}, max_new_tokens=0)
    whole = hm.capture("1+2=3", ["resid_post", "z", "embed"], max_new_tokens=0)
    expected = hm.estimate("1+2=3", {"resid_post": [3, 5, -1], "z": [2, 3], "embed": None}, max_new_tokens=0)
    assert direct.keys == BY_POINT and expected.tensors == 6
    assert direct.to_xarray("z").coords["layer"].values.tolist() == [2, 3]
    for key in BY_POINT:
        assert torch.equal(store.read(0, *key), whole.read(0, *key)) and torch.equal(
            direct.read(0, *key), whole.read(0, *key)
        )
    batch = next(iter(store.dataset({"resid_post": [3, 5], "z": None}, batch_size=2)))
    assert set(batch) >= {"resid_post.3", "resid_post.5", "z.2", "z.3"} and "resid_post.19" not in batch


@pytest.mark.parametrize(
    ("points", "layers", "message"),
    [
        ("resid_post@3,z@8", "3", "each names its layers: leave layers (3) out"),
        ("resid_post,3", None, "unknown point '3'"),
        ("3,z@8", None, "write layers behind a point's name"),
        ("z@", None, "has no layers behind its @"),
        ("z@8,z@9", None, "is there twice"),
        ("z@a", None, "'a' is no layer"),
        ("embed@3", None, "embed says itself where it is"),
        ("z@99", None, "99 is out of range"),
    ],
)
def test_layers_that_are_no_points_are_wrong_usage(points: str, layers: str | None, message: str) -> None:
    done = run("capture", "--points", points, *(["--layers", layers] if layers else []), "--prompt", "1", "-o", "run")
    assert done.exit_code in (1, 2) and message in done.stderr and "Traceback" not in done.output


def test_hookmap_yaml_may_ask_for_a_harvest_and_a_selection() -> None:
    Path("hookmap.yaml").write_text("points: embed\nmax_new_tokens: 0\npositions: [0, -1]\nbatch_tokens: 64\n")
    done = run("capture", "--prompt", "1+2=3", "-o", "run")
    assert done.exit_code == 0, done.output
    sample = hookmap.open_store("run").samples[0]
    assert sample.prompt == "1+2=3" and sample.positions == (0, sample.prompt_tokens - 1)


def test_a_large_capture_is_timed_on_what_runs_together_and_keeps_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trial once held every row of the first prompts in memory, and timed eight texts for a batch of many."""
    monkeypatch.setattr(capture_run, "LARGE_BYTES", 0)
    prompts = [part for n in range(20) for part in ("--prompt", f"{n}+{n}=")]
    for tokens, harvest in (("0", True), ("3", False)):
        done = run("capture", "--points", "pattern,embed", "--layers", "3", "--max-new-tokens", tokens,
                   *prompts, "-o", f"run{tokens}")  # fmt: skip
        assert done.exit_code == 0, done.output
        assert ", at most about " in done.stderr
        store = hookmap.open_store(f"run{tokens}")
        assert len(store) == 20 and all(sample.positions is None for sample in store.samples), harvest


def test_one_feature_is_a_list_of_one() -> None:
    done = run(
        "capture", "--points", "embed", "--max-new-tokens", "0", "--features", "3,", "--prompt", "1", "-o", "run"
    )
    assert done.exit_code == 0, done.output
    assert hookmap.open_store("run")["embed"].shape[-1] == 1


def test_resuming_needs_room_for_what_is_left_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command once refused to go on with a capture that was nearly done, on a disk that was nearly full."""
    arguments = ("capture", "--points", "embed", "--max-new-tokens", "0", "--prompt", "1+2=3", "-o", "run")
    assert run(*arguments).exit_code == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 0))  # type: ignore[attr-defined]
    done = run(*arguments, "--resume")
    assert done.exit_code == 0, done.output
    assert "has room for 0 B" in run(*arguments[:-1], "run2").stderr


def test_every_wrong_key_of_hookmap_yaml_is_named() -> None:
    Path("hookmap.yaml").write_text("modle: x\nmax_new_tokens: many\nlayers: []\nnonsense: 1\n")
    done = run("discover")
    assert done.exit_code == 2
    for part in (
        "unknown key 'modle': did you mean model?",
        "max_new_tokens: expected a whole number, at least 0, found 'many'",
        "layers: expected a list",
        "unknown key 'nonsense': the keys are model, map,",
    ):
        assert part in done.stderr


@pytest.mark.parametrize("text", ["a: [", "- a\n- b\n"])
def test_a_hookmap_yaml_that_cannot_be_read_is_wrong_usage(text: str) -> None:
    Path("hookmap.yaml").write_text(text)
    assert run("discover").exit_code == 2


# Layers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("8,12,16", [8, 12, 16]),
        ("0-3", [0, 1, 2, 3]),
        ("0–2", [0, 1, 2]),
        ("-1", [-1]),
        ("-3--1, 5", [-3, -2, -1, 5]),
        ("all", "all"),
    ],
)
def test_layers_are_numbers_ranges_negatives_or_all(text: str, layers: Any) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["8;12", "3-1", "a", "", "1.5", ","])
def test_layers_that_are_none_are_wrong_usage(text: str) -> None:
    done = run("capture", "--points", "resid_pre", "--layers", text)
    assert done.exit_code == 2
    assert "--layers" in done.stderr or "which" in done.stderr


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("capture", "--prompt", "a"), "which points? For example: --points resid_pre,resid_mid"),
        (("capture", "--points", "embed", "--max-new-tokens", "-1"), "x>=0"),
        (("capture", "--points", "embed", "--features", "a"), "write how many, or a list"),
        (("capture", "--points", "embed", "--dtype", "int7"), "bfloat16"),
        (("capture", "--points", "embed", "--resume"), "-o DIR"),
        (("capture", "--points", "embed", "--temperature", "0", "--top-k", "3"), "greedy"),
        (("capture", "--points", "embed", "--max-new-tokens", "0", "--seed", "3"), "generates nothing"),
        (("capture", "--points", "embed", "--max-new-tokens", "0", "--top-p", "0.5"), "generates nothing"),
        (("capture", "--points", "embed", "--prompts", "none.jsonl"), "none.jsonl cannot be read"),
        (("inspect",), "Missing argument 'DIR'"),
        (("discovr",), "No such command 'discovr'. Did you mean discover?"),
        (("inspect", "run", "--texts", "-1"), "x>=0"),
        (("capture", "--points", "embed", "--prompt", "a", "--prompts", "p.jsonl"), "not both"),
        (("discover", "--jsn"), "--json"),
        (("lens", "--prompt", ""), "--prompt is empty"),
        (("attribute", "--prompt", ""), "--prompt is empty"),
        (("saliency", "--prompt", "", "--target", "a"), "--prompt is empty"),
        (("capture", "--points", "embed", "--address", "auto"), "--address needs --engine ray or remote or vllm"),
        (("capture", "--points", "embed", "--workers", "2", "--eager"), "needs --engine ray or vllm, --eager needs"),
        (("serve", "m", "--engine", "vllm", "--vllm", "dtype=float32"), "--vllm dtype: give --dtype"),
        (
            ("serve", "m", "--engine=vllm", '--vllm=taps={"z": [1]}', "--vllm=shared=true"),
            "Error: --vllm shared: leave it",
        ),
        (("capture", "m", "--engine=vllm", "--points=z", "--vllm=taps=1"), "--vllm taps: give --points and --layers"),
        (("capture", "m", "--engine=vllm", "--points=z", "--no-check"), "--no-check: a model on vLLM is always tested"),
        (("serve", "m", "--engine=vllm", "--batch=1"), "--batch: vLLM makes the batches; give --vllm max_num_seqs=N"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_is_right(args: tuple[str, ...], message: str) -> None:
    done = run(*args)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_every_wrong_line_of_a_prompts_file_is_named() -> None:
    Path("p.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\nnot json\n{"prompt": 3}\n')
    done = capture_demo("run", "--prompts", "p.jsonl")
    assert done.exit_code == 2
    for part in ("line 2: expected one of the fields prompt", "line 3: column 1: not JSON", "line 4: expected a text"):
        assert part in done.stderr


def failed(*args: str) -> str:
    """Runs, expects exit code 1 and one message without a traceback; returns it."""
    done = run(*args)
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    assert "error: " in done.stderr and "Traceback" not in done.stderr
    return done.stderr


def test_what_no_model_has_is_said_before_one_is_loaded() -> None:
    no_model = ("nobody/nothing", "--positions", "lst")
    for args in (
        ("capture", *no_model, "--points", "resid_mdi"),
        ("lens", *no_model, "--point", "resid_mdi"),
        ("patch", *no_model, "--point", "resid_mdi", "--clean", "a", "--corrupted", "b"),
    ):
        message = failed(*args)
        assert "unknown point 'resid_mdi': did you mean resid_mid" in message
        assert "positions 'lst': expected \"all\"" in message and "nobody" not in message


def test_what_the_model_has_not_is_said_before_its_weights_are_loaded(tmp_path: Path) -> None:
    """The folders hold no weights: with them loaded first, that would be the error."""
    llama = str(config_folder(tmp_path / "llama"))
    parallel = {"architectures": ["PhiForCausalLM"], "model_type": "phi", "num_key_value_heads": 4}
    phi = str(config_folder(tmp_path / "phi", **parallel))
    capture = ("capture", "--prompt", "a", "--points")
    assert "layer 99 is out of range: the model has layers 0 to 2" in failed(*capture, "embed", "--layers", "99", llama)
    assert "no resid_mid: attention and MLP run in parallel" in failed(*capture, "resid_mid", phi)
    assert "layer 3 is out of range" in failed("lens", llama, "--prompt", "a", "--layers", "3")
    assert "layer 3 is out of range" in failed("patch", llama, "--clean", "a", "--corrupted", "b", "--layers", "3")
    for command in ((*capture, "q", "--layers", "1"), ("lens", "--prompt", "a")):
        assert "holds no tokenizer" in failed(*command, llama)
    Path("ids.jsonl").write_text("[7]\n")
    assert "tokenizer" not in failed("capture", llama, "--prompts", "ids.jsonl", "--points", "q")


def test_a_device_that_is_not_here_is_no_fault_of_the_model() -> None:
    message = failed("capture", "--points", "embed", "--prompt", "a", "--device", "cuda:99")
    assert "cannot use the device 'cuda:99'" in message and "Give cpu" in message and "save_pretrained" not in message


def test_pictures_that_cannot_be_drawn_are_said_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "altair", None)  # as where it is not installed
    for command in ("lens", "attribute"):
        assert 'pip install "hookmap[viz]"' in failed(command, "nobody/nothing", "--png", "a.png")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    message = failed("capture", "nobody/nothing", "--points", "embed", "-o", "new/run")
    tmp_path.chmod(0o700)
    assert f"cannot write to new/run: no permission in {tmp_path}" in message and "nobody" not in message


def test_a_model_of_images_is_said_to_be_no_language_model(tmp_path: Path) -> None:
    from transformers import ViTConfig

    ViTConfig(hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path / "vit")
    message = failed("capture", "--points", "resid_mid", str(tmp_path / "vit"))
    assert "(vit) is no language model" in message and "Unrecognized configuration class" not in message


def test_a_folder_that_is_not_there_is_told_with_those_beside_it() -> None:
    config_folder(Path("runs/model"))
    assert "The folder runs is here, and in it model." in failed("discover", "runs/modle")


def program(*args: str, **variables: str) -> "subprocess.Popen[bytes]":
    """The command line as a process of its own, its output in pipes."""
    command = [sys.executable, "-m", "hookmap", *args]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), **variables}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def test_a_pipe_gets_utf8_whatever_the_locale() -> None:
    ascii_only = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    tree, said = program("show", "LlamaForCausalLM", **ascii_only).communicate()
    assert "├── ● resid_pre" in tree.decode("utf-8"), said.decode()


@pytest.mark.parametrize("typed", ["inspect ru", "capture runs/mo", "capture --prompts q", "store verify ru"])
def test_shells_complete_files_and_folders(typed: str) -> None:
    words = f"hookmap {typed}"
    asked = {"_HOOKMAP_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    found, said = program(**asked).communicate()
    assert found.decode().strip() == f"file,{words.split()[-1]}", said.decode()


def test_a_taken_port_is_said_before_the_model_is_loaded() -> None:
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = failed("serve", "nobody/nothing", "--port", str(port))
    assert f"cannot listen at 127.0.0.1:{port}: Address already in use" in message and "nobody" not in message


def test_an_unknown_model_without_a_network_says_all_that_was_tried() -> None:
    start = time.perf_counter()
    message = failed("discover", "nobody/nothing")
    assert "nobody/nothing" in message and "hookmap ships no map that could stand in" in message
    assert time.perf_counter() - start < 15, "no long retries"


def test_a_known_model_without_a_network_is_read_from_the_shape_it_was_published_with(
    caplog: pytest.LogCaptureFixture,
) -> None:
    done = run("discover", "willcb/Qwen3-0.6B")
    assert done.exit_code == 0, done.output
    found = parse(done.stdout)
    assert (found.num_layers, found.transformers_version) == (28, version("transformers"))
    assert "full size" in found.discovered_by and not found.proved_on, "the dataflow was read, not a file"
    assert "The one inside its shipped map is read instead" in caplog.text
    assert run("show", "willcb/Qwen3-0.6B").exit_code == 0


def test_an_architecture_alone_is_answered_from_its_shipped_map_and_says_so() -> None:
    done = run("discover", "Qwen3ForCausalLM")
    assert done.exit_code == 0, done.output
    assert parse(done.stdout).architecture == "Qwen3ForCausalLM"
    assert "the map that ships with hookmap" in done.stderr


def test_a_folder_that_is_no_model_is_told_apart_from_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in failed("discover", str(tmp_path / "empty"))
    assert "config.json" in failed("capture", str(tmp_path / "empty"), "--points", "embed", "--prompt", "a")


def test_a_broken_map_names_the_field_and_the_command() -> None:
    document = hybrid()
    document["d_model"] = "wide"
    Path("broken.json").write_text(json.dumps(document))
    message = failed("show", "broken.json")
    assert 'd_model: expected a whole number, at least 1, found "wide"' in message
    assert "hookmap discover MODEL -o broken.json" in message


def test_a_map_of_another_model_is_refused() -> None:
    parse(hybrid()).save("other.json")
    message = failed("capture", "--map", "other.json", "--points", "resid_pre", "--prompt", "a", "-o", "run")
    assert "HybridForCausalLM" in message and "Qwen3ForCausalLM" in message
    assert not Path("run").exists()


def test_layer_99_and_a_misspelt_point_are_told_together() -> None:
    message = failed("capture", "--points", "resid_midd", "--layers", "3,99", "--prompt", "a", "-o", "run")
    assert "did you mean resid_mid" in message and "layer 99 is out of range" in message
    assert not Path("run").exists()


def test_a_folder_that_is_no_capture_says_how_to_make_one(tmp_path: Path) -> None:
    assert "hookmap capture" in failed("inspect", str(tmp_path))
    assert "nothing there" in failed("inspect", "nowhere")


def test_a_damaged_capture_fails_inspect_verify() -> None:
    assert capture_demo("run", "--prompt", "a").exit_code == 0
    shard = next(Path("run").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    assert "is damaged" in failed("inspect", "run", "--no-norms", "--verify")


def test_a_folder_in_a_file_s_place_is_called_a_folder() -> None:
    Path("dir.safetensors").mkdir()
    for command in (("vector", "show", "dir.safetensors"), ("steer", "--vector", "dir.safetensors")):
        assert "dir.safetensors is a folder: expected a file" in failed(*command)


def test_a_file_in_a_folder_s_place_is_told_before_the_model_is_loaded() -> None:
    Path("file").write_text("kept")
    for command in (("stats",), ("examples", "--features", "0")):
        done = run(*command, "--points", "resid_post", "--layers", "3", "--prompt", "a", "-o", "file")
        told = done.stderr
        assert done.exit_code == 2 and "file is a file: expected a folder" in told and "loading" not in told
    assert Path("file").read_text() == "kept"


def test_a_used_folder_is_not_written_over() -> None:
    assert capture_demo("run", "--prompt", "a").exit_code == 0
    assert "--resume" in failed("capture", "--points", "embed", "--prompt", "b", "-o", "run")
    assert hookmap.open_store("run").points == ("resid_pre", "resid_mid")


def test_an_unwritable_output_is_one_line() -> None:
    Path("file").touch()
    told = failed("discover", "-q", "-o", "file/map.json")
    assert "cannot write file/map.json: " in told and "foresaw" not in told


def test_a_map_file_is_not_taken_for_a_model() -> None:
    """transformers reads any JSON with a model_type as a config, and fills in the sizes of another model."""
    assert run("discover", "-q", "-o", "map.json").exit_code == 0
    for command in ("discover", "verify", "capture"):
        more = ("--points", "embed", "--prompt", "a") if command == "capture" else ()
        assert "map.json is a file: expected a model folder" in failed(command, "map.json", *more)


def test_a_folder_in_use_is_told_before_the_model_is_loaded() -> None:
    assert capture_demo("run", "--prompt", "a").exit_code == 0
    assert "loading" not in failed("capture", "no/such-model", "--points", "embed", "--prompt", "b", "-o", "run")
    assert "loading" not in failed("capture", "no/such-model", "--points", "embed", "--resume", "-o", "none")


def test_a_model_without_a_tokenizer_takes_another_or_token_ids(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL_PATH, model, ignore=shutil.ignore_patterns("tokenizer*"))
    args = ("capture", str(model), "--points", "embed", "--max-new-tokens", "1")
    assert "--tokenizer" in failed(*args, "--prompt", "a", "-o", "a")
    done = run(*args, "--prompt", "a", "--no-chat", "--tokenizer", str(MODEL_PATH), "-o", "b")
    assert done.exit_code == 0, done.output
    Path("p.jsonl").write_text('[97, 98]\n{"token_ids": [97]}\n')
    assert run(*args, "--prompts", "p.jsonl", "-o", "c").exit_code == 0
    assert [sample.token_ids[: sample.prompt_tokens] for sample in hookmap.open_store("c").samples] == [(97, 98), (97,)]


def test_the_summary_of_the_help_is_whole_at_80_columns() -> None:
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["--help"]).stdout
    assert "..." not in shown.partition("Commands:")[2]


def test_debug_shows_the_traceback_wherever_it_is_typed() -> None:
    for args in (("--debug", "inspect", "nowhere"), ("inspect", "nowhere", "--debug")):
        done = run(*args)
        assert isinstance(done.exception, hookmap.StoreError)


# As a program is run ------------------------------------------------------------------------------------------------


def start(*args: str, **options: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, str(CHECKOUT / "cli.py"), *args]
    # A test run started in the background of a shell ignores Ctrl-C, and so would its children.
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_the_version_and_the_exit_codes_of_the_real_program() -> None:
    version = start("--version")
    assert version.communicate()[0] == f"hookmap, version {hookmap.__version__}\n"
    wrong = start("inspect")
    assert "Usage" in wrong.communicate()[1] and wrong.returncode == 2
    broken = start("inspect", "nowhere")
    assert "Traceback" not in broken.communicate()[1] and broken.returncode == 1


def test_a_reader_that_goes_away_is_no_error() -> None:
    folder = config_folder(Path("llama"))
    with start("discover", str(folder), "--json") as program:
        assert program.stdout is not None and program.stderr is not None
        program.stdout.close()
        assert program.stderr.read() == ""


def test_ctrl_c_keeps_the_finished_samples_and_resume_goes_on_with_them() -> None:
    Path("p.jsonl").write_text("\n".join(json.dumps(f"Tom has {n} apples.") for n in range(400)))
    args = ("capture", "--points", "resid_pre", "--layers", "3", "--prompts", "p.jsonl", "--max-new-tokens", "8")
    more = ("--batch-size", "4", "-o", "run")
    program = start(*args, *more)
    samples = Path("run") / "samples.jsonl"
    deadline = time.monotonic() + 240
    while not (samples.exists() and samples.stat().st_size > 0):
        assert program.poll() is None and time.monotonic() < deadline, program.communicate()[1]
        time.sleep(0.02)
    os.kill(program.pid, signal.SIGINT)
    stdout, stderr = program.communicate(timeout=240)
    assert (program.returncode, stdout) == (130, "")
    assert "finished samples are kept in run" in stderr and "--resume -o run" in stderr
    kept = hookmap.open_store("run")
    assert 0 < len(kept) < 400 and not kept.finished
    first = kept.read(0, "resid_pre", 3)

    again = run(*args, *more, "--resume")
    assert again.exit_code == 0, again.output
    whole = hookmap.open_store("run")
    assert whole.finished and len(whole) == 400
    assert whole.read(0, "resid_pre", 3).equal(first)


def test_inspect_reads_the_tensors_of_a_large_capture_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert capture_demo("run", "--prompt", "2 and 3?", "--prompt", "Tom has 3 apples.").exit_code == 0
    assert "mean_norm" in json.loads(run("inspect", "run", "--json").stdout)["tensors"][0]
    monkeypatch.setattr(reader, "NORM_SAMPLES", 1)
    assert "mean_norm" not in json.loads(run("inspect", "run", "--json").stdout)["tensors"][0]
    assert "no norms: --norms reads every tensor for them" in run("inspect", "run").stderr
    asked = run("inspect", "run", "--norms")
    assert "no norms" not in asked.stderr and "█" in asked.stderr
