"""hookmap.yaml, the environment and what is typed: which is the stronger, and what is refused."""

import json
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from click.testing import CliRunner, Result
from support.pages import blocks

from hookmap.cli.configuration import SECTIONS, Serving, Settings, fields, read_section, schema
from hookmap.cli.main import main
from hookmap.cli.settings import load_settings
from hookmap.stores import open_store
from hookmap.stores.reader import CaptureStore

DOCS = Path(__file__).resolve().parents[2] / "docs"


pytestmark = pytest.mark.usefixtures("own_folder")


def run(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def shown() -> dict[str, Any]:
    done = run("config", "show", "--json")
    assert done.exit_code == 0, done.output
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def captured(*args: str) -> CaptureStore:
    done = run("capture", "--prompt", "1+2=3", "-o", "run", *args)
    assert done.exit_code == 0, done.output
    return open_store("run")


def test_show_says_each_value_and_where_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hookmap.yaml").write_text("every: 2\nseed: 1\nprompts: q.txt\nmap: not-there.json\n")
    (tmp_path / "q.txt").write_text("a\n")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    monkeypatch.setenv("HOOKMAP_SEED", "3")
    monkeypatch.setenv("HOOKMAP_TOP_P", "0.5")
    monkeypatch.setenv("HOOKMAP_MEAN", "")
    found, file = shown(), str(tmp_path / "hookmap.yaml")
    assert list(found) == list(fields())
    assert found["every"] == {"value": 2, "source": file}
    assert found["seed"] == {"value": 3, "source": "HOOKMAP_SEED"}
    assert found["top_p"] == {"value": 0.5, "source": "HOOKMAP_TOP_P"}
    assert found["prompts"] == {"value": str(tmp_path / "q.txt"), "source": file}
    assert found["map"] == {"value": "not-there.json", "source": file}
    assert found["mean"] == {"value": False, "source": "default"}
    table = run("config", "show")
    assert table.stdout == "" and "HOOKMAP_SEED" in table.stderr


@pytest.mark.slow
def test_what_is_typed_is_stronger_than_a_variable_and_that_than_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("hookmap.yaml").write_text("points: embed\nmax_new_tokens: 0\nevery: 2\nmean: true\nfeatures: [5]\n")
    monkeypatch.setenv("HOOKMAP_POSITIONS", "0,1,2")
    monkeypatch.setenv("HOOKMAP_FEATURES", "3,7")
    store = captured("--no-mean", "--positions", "0,1,2,4")
    assert store.samples[0].positions == (0, 1, 2, 4) and store["embed"].shape == (1, 4, 2)


def test_the_numbers_of_a_file_are_those_that_are_written() -> None:
    """To YAML 1.1, which PyYAML reads, 2:12 is 132 and 010 is 8."""
    Path("hookmap.yaml").write_text("positions: 2:12\nkeep_dtype: float16\nseed: 10\nlayers: [3, -1]\n")
    found = load_settings()
    assert found == {"positions": "2:12", "keep_dtype": "float16", "seed": 10, "layers": "3,-1"}
    Path("hookmap.yaml").write_text("seed: 010\n")
    assert "seed: expected a whole number, found '010'" in run("config", "show").stderr


@pytest.mark.slow
def test_sampling_of_the_file_counts_where_something_is_drawn() -> None:
    Path("hookmap.yaml").write_text("points: embed\ntemperature: 0.5\ntop_k: 3\nseed: 7\nmax_new_tokens: 2\n")
    generation = captured().manifest.settings
    assert generation["seed"] == 7 and generation["generation"]["temperature"] == 0.5
    assert run("capture", "--prompt", "1", "--temperature", "0", "-o", "greedy").exit_code == 0
    assert run("capture", "--prompt", "1", "--max-new-tokens", "0", "-o", "harvest").exit_code == 0


def test_a_model_of_the_file_may_bring_code_and_a_flag_forbids_it() -> None:
    from hookmap.cli.model_options import trusted

    Path("hookmap.yaml").write_text("trust_remote_code: true\n")
    settings = load_settings()
    assert trusted(None, settings) and not trusted(False, settings) and not trusted(None, {})


def test_all_that_is_wrong_in_the_file_and_the_environment_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("hookmap.yaml").write_text(
        "polnts: embed\nlayers: 3-1\nevery: true\ntop_p: 0\ndtype: fp16\nfeatures: [-1]\n1: 2\n"
        "serve: {queue: 0, prot: 1, allow: [3]}\neval: 3\n"
    )
    monkeypatch.setenv("HOOKMAP_SERVE_PORT", "tcp://10.0.0.1:8000")
    monkeypatch.setenv("HOOKMAP_CHAT", "perhaps")
    done = run("config", "show")
    assert done.exit_code == 2
    for part in (
        "unknown key 'polnts': did you mean points",
        "unknown key 1: the keys are model, map,",
        "layers: expected a list, or one text such as '8,12,16', '0-3', '-1' or 'all', found '3-1'",
        "every: expected a whole number, at least 1, found True",
        "top_p: expected a number, above 0, at most 1, found 0",
        "dtype: expected one of auto, float32, bfloat16, float16, found 'fp16'",
        "features: expected a whole number, at least 1, or a list of whole numbers",
        "unknown key 'serve.prot': did you mean serve.port",
        "serve.queue: expected a whole number, at least 1, found 0",
        "serve.allow: expected a text or a list of texts, found [3]",
        "eval: expected keys and values, found 3",
        "the environment:",
        "HOOKMAP_SERVE_PORT: expected a whole number, at least 0, at most 65535, found 'tcp://10.0.0.1:8000'",
        "HOOKMAP_CHAT: expected true or false, found 'perhaps'",
    ):
        assert part in done.stderr


def test_the_published_schema_is_that_of_the_settings_and_takes_the_example_of_the_docs() -> None:
    published = json.loads((DOCS / "hookmap.schema.json").read_text("utf-8"))
    assert published == schema(), "write it again: make schema"
    assert json.loads(run("config", "schema").stdout) == schema()
    (example,) = [block.text for block in blocks((DOCS / "cli.md").read_text("utf-8")) if block.language == "yaml"]
    check = jsonschema.Draft202012Validator(published)
    assert list(check.iter_errors(yaml.safe_load(example))) == []
    assert list(check.iter_errors({"every": 0})) and list(check.iter_errors({"evry": 1}))


def test_every_setting_is_an_option_of_a_command() -> None:
    def options(*names: str) -> set[str | None]:
        command: Any = main
        for name in names:
            command = command.get_command(click.Context(command), name)
        return {parameter.name for parameter in command.params}

    assert set(Settings.model_fields) - {"map", *SECTIONS} <= options("capture") | {"model"}
    assert set(SECTIONS["serve"].model_fields) <= options("serve")
    assert set(SECTIONS["eval"].model_fields) <= options("eval", "gsm8k")


def test_a_section_is_of_one_command_and_what_is_typed_is_stronger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hookmap.yaml").write_text("serve:\n  queue: 3\n  sessions: kept\n  allow: [a/b]\n  drain: 5\neval:\n")
    monkeypatch.setenv("HOOKMAP_SERVE_QUEUE", "4")
    monkeypatch.setenv("HOOKMAP_SERVE_ALLOWED_HOST", "box, box.lan")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    found = shown()
    assert found["serve.queue"] == {"value": 4, "source": "HOOKMAP_SERVE_QUEUE"}
    assert found["serve.sessions"] == {"value": str(tmp_path / "kept"), "source": str(tmp_path / "hookmap.yaml")}
    typed: dict[str, Any] = dict.fromkeys(Serving.model_fields) | {"drain": 7, "allow": ()}
    serving = read_section(Serving, "serve", load_settings(), typed)
    assert (serving.queue, serving.drain, serving.port) == (4, 7, 8000) and typed == {}
    assert serving.allow == ["a/b"] and serving.allowed_host == ["box", "box.lan"]


def test_the_help_of_an_option_names_the_default_of_its_setting() -> None:
    """Said twice, because help imports nothing that validates."""
    for section, *names in (("serve", "serve"), ("eval", "eval", "gsm8k")):
        command: Any = main
        for name in names:
            command = command.get_command(click.Context(command), name)
        help_of = {option.name: option.help or "" for option in command.params if isinstance(option, click.Option)}
        for key, field in SECTIONS[section].model_fields.items():
            if field.default not in (None, []):
                assert f"[default: {field.default}]" in help_of[key]


@pytest.mark.slow
def test_an_evaluation_opens_its_model_as_the_settings_say() -> None:
    pytest.importorskip("inspect_ai", reason='pip install "hookmap[eval]"')
    Path("hookmap.yaml").write_text("device: nowhere\nengine: vllm\n")
    done = run("eval", "gsm8k", "--samples", "1", "-o", "results")
    assert done.exit_code == 1 and "nowhere" in done.stderr
    assert "note: an evaluation runs on hooks; engine: vllm is for captures" in done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_an_evaluation_takes_its_section_and_what_is_kept_and_drawn_of_the_settings() -> None:
    pytest.importorskip("inspect_ai", reason='pip install "hookmap[eval]"')
    Path("hookmap.yaml").write_text(
        "points: mlp_out\nlayers: 3\nseed: 5\ntemperature: 0.5\neval: {samples: 2, parallel: 1, max_new_tokens: 4}\n"
    )
    done = run("eval", "gsm8k", "-o", "results", "--json", "--seed", "6")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["samples"], said["settings"]["seed"], said["settings"]["temperature"]) == (2, 6, 0.5)
    manifest = open_store("results/activations").manifest
    assert [(tensor.point, tensor.layer) for tensor in manifest.tensors] == [("mlp_out", 3)]


@pytest.mark.parametrize("key", ["schl\u00fcssel", "a b", "a\n"])
def test_a_key_that_no_header_holds_is_refused_before_the_server_starts(key: str) -> None:
    for option in ("--key", "--admin-key"):
        refused = run("serve", option, key)
        assert refused.exit_code == 2 and "letters, digits and signs of ASCII" in " ".join(refused.stderr.split())


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    "words", ["serve --max-bytes", "serve --max-age", "smoke http://127.0.0.1:1 --timeout", "capture --temperature"]
)
def test_what_is_no_finite_number_is_refused(words: str, value: str) -> None:
    refused = run(*words.split(), value)
    assert refused.exit_code == 2 and "not a finite number" in " ".join(refused.stderr.split())


@pytest.mark.parametrize("text", ["serve: {max_bytes: .inf}", "temperature: .inf"])
def test_a_file_holds_no_infinity_either(text: str) -> None:
    Path("hookmap.yaml").write_text(text)
    refused = run("config", "show")
    assert refused.exit_code == 2 and "found inf" in refused.output
