"""What is in the wheel: everything that an installation without the checkout needs, and little more."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.without_torch import without_heavy

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parent.parent
LARGEST = 10 * 10**6
"""bytes of the wheel"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built by the build backend that pyproject.toml names, as pip would call it."""
    pytest.importorskip("hatchling", reason='pip install "hookmap[test]"')
    folder = tmp_path_factory.mktemp("wheel")
    code = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, folder], cwd=CHECKOUT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    assert file.stat().st_size < LARGEST
    return zipfile.ZipFile(file)


@pytest.fixture(scope="module")
def from_sdist(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel that the source distribution builds, unpacked in a folder where nothing of the checkout is."""
    folder = tmp_path_factory.mktemp("sdist")
    code = "import sys; from hatchling.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, folder], cwd=CHECKOUT, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    code = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    (unpacked,) = (each for each in folder.iterdir() if each.is_dir())
    subprocess.run([sys.executable, "-c", code, folder], cwd=unpacked, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_source_distribution_builds_the_same_wheel(wheel: zipfile.ZipFile, from_sdist: zipfile.ZipFile) -> None:
    ours, theirs = ({each.filename: each.CRC for each in file.infolist()} for file in (wheel, from_sdist))
    assert ours == theirs


def test_maps_are_had_from_the_wheel_where_torch_is_not_installed(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Away from the checkout, so that the maps are those inside the wheel."""
    wheel.extractall(tmp_path)
    done = without_heavy("Qwen3ForCausalLM", str(tmp_path))
    assert done.stdout.splitlines()[1:] == ["model.layers.8.self_attn.o_proj.weight", ""], done.stderr


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (cited["title"], cited["version"]) == (project["name"], project["version"])
    assert {"cff-version", "message", "authors", "type", "license"} <= set(cited)


def test_inspect_finds_the_provider_of_an_installation(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """In a process that imports nothing of hookmap itself, with the wheel's metadata beside the checkout."""
    pytest.importorskip("inspect_ai", reason='pip install "hookmap[eval]"')
    for name in wheel.namelist():
        if ".dist-info/" in name:
            wheel.extract(name, tmp_path)
    code = "from inspect_ai.model import get_model; print(get_model('hookmap/demo').api.max_connections())"
    path = os.pathsep.join([str(tmp_path), str(CHECKOUT)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout == "8\n", done.stderr


def test_the_wheel_holds_every_file_of_the_package_and_every_map(wheel: zipfile.ZipFile) -> None:
    held = set(wheel.namelist())
    tracked = subprocess.run(["git", "ls-files", "hookmap", "mappings"], cwd=CHECKOUT, capture_output=True, text=True)
    wanted = {f"hookmap/{name}" if name.startswith("mappings/") else name for name in tracked.stdout.splitlines()}
    assert sorted(wanted - held) == []
    for name in (
        "hookmap/py.typed",
        "hookmap/mappings/Qwen3ForCausalLM.json",
        "hookmap/mappings/architecture-map.schema.json",
        "hookmap/demo/model/model.safetensors",
        "hookmap/demo/model/tokenizer.json",
        "hookmap/demo/emotions.yaml",
        "hookmap/services/server/static/page.js",
        "hookmap/services/deploy/enter.sh",
    ):
        assert name in held, name


def test_the_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    others = [name for name in wheel.namelist() if not name.startswith("hookmap/")]
    assert {name.rpartition("/")[2] for name in others} == {
        "METADATA",
        "WHEEL",
        "RECORD",
        "entry_points.txt",
        "LICENSE",
    }
    assert [name for name in wheel.namelist() if name.endswith((".pyc", ".so")) or "test" in name.lower()] == []


def test_the_extras_are_those_of_the_docs_and_all_holds_each(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    document = message_from_bytes(wheel.read(name))
    extras = set(document.get_all("Provides-Extra", []))
    assert extras == {
        "all",
        "data",
        "docs",
        "eval",
        "gguf",
        "grammar",
        "scale",
        "server",
        "stats",
        "test",
        "vision",
        "viz",
        "vllm",
    }
    needs = [Requirement(line) for line in document.get_all("Requires-Dist", [])]
    core = {need.name for need in needs if need.marker is None}

    def brought(extra: str) -> set[str]:
        return {need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})} - core

    assert brought("all") == set().union(*(brought(extra) for extra in extras - {"all", "docs", "test", "vllm"}))
    assert {"fastapi", "inspect-ai", "ray", "altair"} <= brought("all") < brought("test")


def test_every_requirement_has_a_tested_version_that_it_allows(wheel: zipfile.ZipFile) -> None:
    lines = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines if "==" in line}
    tested["vllm"] = re.findall(r'^VLLM = "(.*)"$', (CHECKOUT / "scripts/setup.py").read_text("utf-8"), re.MULTILINE)[0]
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    needs = [Requirement(line) for line in message_from_bytes(wheel.read(name)).get_all("Requires-Dist", [])]
    build = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    for need in (*needs, *map(Requirement, build)):
        if need.name != "hookmap":
            assert need.specifier.contains(tested[canonicalize_name(need.name)]), need


COMPLETION = """
import os, sys
os.environ |= {"_HOOKMAP_COMPLETE": "bash_complete", "COMP_WORDS": sys.argv[1], "COMP_CWORD": sys.argv[2]}
from hookmap.cli.main import main
main(prog_name="hookmap")
"""


def completed(words: str, number: int) -> list[str]:
    """What the shell is offered for this word of the line."""
    done = subprocess.run([sys.executable, "-c", COMPLETION, words, str(number)], capture_output=True, text=True)
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_the_shell_completes_commands_options_and_choices() -> None:
    assert completed("hookmap disc", 1) == ["discover"] and completed("hookmap config s", 2) == ["schema", "show"]
    assert completed("hookmap capture --max", 2) == ["--max-new-tokens"]
    assert completed("hookmap capture --keep-dtype b", 3) == ["bfloat16"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_printed_for_each_shell(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from hookmap.cli.main import main; main(['completion', sys.argv[1]])".replace(
            "from", "import sys; from", 1), shell],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "_HOOKMAP_COMPLETE" in done.stdout and "hookmap" in done.stdout
