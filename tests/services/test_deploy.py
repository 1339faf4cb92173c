"""`hookmap deploy` against a real sshd on this machine, with the demo model; the environment is the tests' own."""

import contextlib
import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from packaging.requirements import Requirement
from support.loopback import Loopback, loopback
from support.ports import free_port
from support.raises import raises

import hookmap
from hookmap.services.deploy.bundle import bundle, locked, program, requirements
from hookmap.services.deploy.on_host.folder import Folder
from hookmap.services.deploy.on_host.process import pid_of
from hookmap.services.deploy.on_host.request import Request
from hookmap.services.deploy.on_host.runners import unit_file
from hookmap.services.deploy.over_ssh import ssh_command

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parents[2]
HERE = ("--python", sys.executable)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with loopback(tmp_path_factory.mktemp("sshd")) as found:
        yield found


def health(port: int) -> Any:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").json()
    except httpx.HTTPError:
        return None


def wait_for(what: Any, seconds: float = 240) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return found


def command_lines() -> str:
    lines = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(process.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(lines)


def deploy_and_lose_the_connection(box: Loopback, *args: str) -> tuple[int, str]:
    """Kills ssh when the server has been started and does not answer yet."""
    command = [sys.executable, str(CHECKOUT / "cli.py"), "deploy", *args]
    environment = {**os.environ, "HOOKMAP_SSH": box.ssh, "PYTHONPATH": str(CHECKOUT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    with process.stderr:
        for line in process.stderr:
            if line.startswith("started"):
                for child in psutil.Process(process.pid).children():
                    child.send_signal(signal.SIGKILL)
                break
        told = process.stderr.read()
    return process.wait(), told


def test_a_server_from_its_first_deployment_to_its_stop(box: Loopback) -> None:
    port, folder = free_port(), box.home / "hookmap-server"
    first = box.run("box", *HERE, "--port", str(port), "--runner", "detached", "--json", "--", "--points", "resid_mid")
    assert first.exit_code == 0, first.output
    told = json.loads(first.stdout)
    assert (told["model"], told["port"], told["answers"], told["runner"]) == ("hookmap-demo", port, True, "detached")
    assert "✓ delete: 0 sessions left" in first.stderr, "the smoke test came to its end"
    assert health(port) == {"status": "ok", "version": hookmap.__version__, "models": ["hookmap-demo"]}

    key = box.run("box", "--show-key").stdout.strip()
    assert len(key) == 32 and (folder / "key").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o77 == 0, "activations are for their owner"
    assert "hookmap.cli" in command_lines() and key not in command_lines() and key not in first.output
    models = f"http://127.0.0.1:{port}/v1/models"
    assert httpx.get(models).status_code == 401
    assert httpx.get(models, headers={"Authorization": f"Bearer {key}"}).status_code == 200
    server = psutil.Process(told["pid"])
    assert server.environ()["PYTHONPATH"].startswith(str(folder / "releases")), "it is the code that was sent"

    code, said = deploy_and_lose_the_connection(box, "box", *HERE, "--port", str(port))
    assert code == 1 and "A server that was started there" in said
    with contextlib.suppress(psutil.NoSuchProcess):
        assert server.status() == psutil.STATUS_ZOMBIE, "the old one made room"
    wait_for(lambda: health(port))
    after = json.loads(box.run("box", "--status", "--json").stdout)
    assert after["running"] and after["pid"] != told["pid"] and after["runner"] in ("tmux", "systemd", "detached")
    assert box.run("box", "--show-key").stdout.strip() == key, "it is kept"
    shown = box.run("box", "--status").stderr
    assert f"-N -L {port}:127.0.0.1:{port} box" in shown and "--stop" in shown and "tail -f" in shown

    # The deployment that lost its connection may still be at work there.
    stopped = wait_for(lambda: done if "is at work" not in (done := box.run("box", "--stop")).output else None)
    assert stopped.exit_code == 0, stopped.output
    assert f"stopped (pid {after['pid']})" in stopped.stderr
    assert health(port) is None
    assert "it was not running" in box.run("box", "--stop").stderr
    assert box.run("box", "--status").exit_code == 1
    assert not list(folder.glob("incoming.*")), "what was sent is not left lying about"


class _Speaker(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.sendall(b"SSH-2.0-another\r\n")


class _Stranger(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answer = json.dumps({"status": "ok", "version": "0.1.0", "models": ["hookmap-demo"]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_port_of_somebody_else_is_refused_and_they_are_left_alone(box: Loopback) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        refused = box.run("box", *HERE, "--port", str(port), "--folder", "strangers")
        assert refused.exit_code == 1
        assert f"port {port} is taken by another program; it is left alone" in refused.stderr
        socket.create_connection(("127.0.0.1", port)).close()
    with socketserver.TCPServer(("127.0.0.1", 0), _Speaker) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        refused = box.run("box", *HERE, "--port", str(server.server_address[1]), "--folder", "strangers")
        assert "is taken by another program" in refused.stderr, "one that speaks no HTTP"
        server.shutdown()
    with HTTPServer(("127.0.0.1", 0), _Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        refused = box.run("box", *HERE, "--port", str(server.server_port), "--folder", "strangers")
        assert "taken by a hookmap server that this folder did not start" in refused.stderr
        assert health(server.server_port)
        server.shutdown()
    assert not (box.home / "strangers" / "releases").exists(), "refused before anything was changed"


def test_a_process_that_only_has_the_number_of_our_server_is_not_stopped(box: Loopback) -> None:
    folder = box.home / "reused"
    folder.mkdir()
    with subprocess.Popen(["sleep", "60"]) as innocent:
        (folder / "pid").write_text(str(innocent.pid))
        (folder / "server.json").write_text(json.dumps({"port": 1, "model": "m", "runner": "tmux", "version": "0"}))
        stopped = box.run("box", "--stop", "--folder", "reused")
        assert stopped.exit_code == 0 and "it was not running" in stopped.stderr, stopped.output
        assert innocent.poll() is None
        innocent.terminate()


def test_a_server_that_does_not_start_shows_the_end_of_its_log(box: Loopback) -> None:
    (box.home / "empty").mkdir()
    failed = box.run("box", "~/empty", *HERE, "--port", str(free_port()), "--folder", "fails")
    assert failed.exit_code == 1
    assert "the server ended before it answered" in failed.stderr and "  | error: " in failed.stderr
    assert f"{box.home}/empty" in failed.stderr and "Traceback" not in failed.stderr
    state = json.loads(box.run("box", "--status", "--folder", "fails", "--json").stdout)
    assert not state["running"]
    missing = box.run("box", "/no/such/model", *HERE, "--port", str(free_port()), "--folder", "fails")
    assert missing.exit_code == 1 and "there is no folder /no/such/model on this host" in missing.stderr


def test_what_a_host_lacks_is_named(box: Loopback, tmp_path: Path) -> None:
    gone = box.run("nobody-there", "--status")
    assert gone.exit_code == 1 and "no connection to nobody-there" in gone.stderr
    assert "Connection refused" in gone.stderr, "ssh's own words"
    assert "there is no /no/python on its PATH" in box.run("box", "--python", "/no/python", "--status").stderr
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    assert "older than Python 3.11" in box.run("box", "--python", str(old), "--status").stderr
    skipped = box.run("box", "--sync", "skip", "--folder", "bare", "--port", str(free_port()))
    assert skipped.exit_code == 1 and "is not there yet: deploy once without it" in skipped.stderr
    script = shlex.split(ssh_command(["ssh"], "box", "f", None)[-1])[2]
    bare = subprocess.run(["/bin/sh", "-c", script, "sh", "f", ""], env={"PATH": "/nowhere", "HOME": str(tmp_path)})
    assert bare.returncode == 41, "no Python at all"


def test_a_folder_with_files_of_another_kind_is_left_alone(box: Loopback) -> None:
    project = box.home / "project"
    (project / "venv").mkdir(parents=True)
    (project / "src").touch()
    refused = box.run("box", "--fresh", "--folder", "project", "--port", str(free_port()))
    assert refused.exit_code == 1 and "it holds src" in refused.stderr
    assert {"src", "venv"} <= {each.name for each in project.iterdir()}


def test_two_folders_never_share_what_keeps_a_server(tmp_path: Path) -> None:
    """A unit's or a tmux server's name: stopping one would stop the other; a socket's path is short."""
    names = {Folder(tmp_path / name).unit for name in ("gpu-1", "gpu_1", "gpu 1", "x" * 200, "y" + "x" * 199)}
    assert len(names) == 5 and all(len(name) < 60 for name in names)


def test_a_folder_of_any_name_is_one_word_for_the_hosts_shell(box: Loopback) -> None:
    name = 'it\'s "one"; touch pwned; $(touch pwned) `touch pwned`'
    told = box.run("box", "--status", "--folder", name)
    assert told.exit_code == 1 and f"nothing was deployed to {box.home / name}" in told.stderr
    assert not (box.home / "pwned").exists() and not (box.home / name).exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--", "-oProxyCommand=touch pwned"], "Missing argument"),
        (["a b"], "is no name of a host"),
        (["box;ls"], "is no name of a host"),
        (["box", "not a model"], "a hub id has no spaces"),
        (["box", "--folder", "-x"], "is no path"),
        (["box", "--python", "p", "--fresh"], "leave --sync and --fresh out"),
        (["box", "--sync", "skip", "--fresh"], "leave one out"),
        (["box", "--ssh", "ssh 'x"], "No closing quotation"),
        (["box", "--folder", "~"], "write it from your home"),
        (["box", "--folder", "~/"], "is no path"),
        (["box", "--wait", "nan"], "not a finite number"),
        (["box", "--", "--max-bytes", "inf"], "not a finite number"),
        (["box", "--", "--pionts", "resid_mid"], "Did you mean"),
        (["box", "--", "--port", "1", "--key", "k", "m"], "MODEL, --port, --key behind --"),
        (["box", "--", "--host", "0.0.0.0"], "listens on 127.0.0.1"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_run(args: list[str], said: str) -> None:
    refused = Loopback(Path(), "false").run(*args)
    assert refused.exit_code == 2 and said in refused.stderr


def test_a_dry_run_prints_the_command_and_runs_nothing() -> None:
    shown = Loopback(Path(), "/no/such/ssh").run("box", "org/model", "--dry-run", *HERE, "--", "--layers", "3")
    assert shown.exit_code == 0 and shown.stdout.startswith("/no/such/ssh -T")
    asked = json.loads(shown.stdout.partition("request.json:\n")[2])
    assert (asked["model"], asked["options"], asked["python"]) == ("org/model", ["--layers", "3"], sys.executable)
    real = Loopback(Path(), "/no/such/ssh").run("box", "org/model", *HERE)
    assert real.exit_code == 1 and "cannot run /no/such/ssh" in real.stderr


def test_the_same_code_gives_the_same_bundle_with_the_servers_requirements_and_an_exact_lock() -> None:
    first, again = bundle(), bundle()
    assert first == again
    names = zipfile.ZipFile(io.BytesIO(first.code)).namelist()
    assert {"hookmap/cli/main.py", "hookmap/mappings/Qwen3ForCausalLM.json"} <= set(names)
    assert "hookmap/demo/model/model.safetensors" in names and not any("__pycache__" in name for name in names)
    wanted = {Requirement(line).name for line in first.requirements.splitlines()}
    assert {"torch", "transformers", "uvicorn", "fastapi"} <= wanted and "inspect-ai" not in wanted
    lock = dict(line.split("==") for line in first.lock.splitlines())
    assert {name.replace("_", "-") for name in wanted} <= lock.keys() and {"starlette", "numpy"} <= lock.keys()
    assert re.fullmatch(r"[\d.]+", lock["torch"]), "not the build of this machine"


def test_requirements_keep_the_markers_of_the_host_and_lose_those_of_other_extras() -> None:
    told = ["click", "tomli; python_version < '3.11'", "uvicorn>=0.30; extra == 'server'", "ruff; extra == 'test'"]
    assert [str(each) for each in requirements(told)] == ["click", 'tomli; python_version < "3.11"', "uvicorn>=0.30"]
    with pytest.raises(hookmap.DeployError, match=r"cannot be locked|can be locked.*no-such-package"):
        locked([Requirement("no-such-package")])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    folder = tmp_path / 'a "folder" of 100% $HOME'
    folder.mkdir()
    (folder / "run.sh").touch()
    (tmp_path / "hookmap-test.service").write_text(unit_file(folder, 30))
    command = ["systemd-analyze", "--user", "verify", "--man=no", str(tmp_path / "hookmap-test.service")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)})
    assert (done.returncode, [line for line in done.stderr.splitlines() if "hookmap" in line]) == (0, [])


def test_a_server_that_starts_is_never_taken_for_one_that_has_ended(tmp_path: Path) -> None:
    """However the moments of its start are met: the pid file is being written, the shell becomes the server."""
    folder = Folder(tmp_path)
    folder.key()
    for _ in range(20):
        folder.write_launcher(sys.executable, CHECKOUT, "any", 1, ["--help"])
        seen = []
        with subprocess.Popen(["sh", str(tmp_path / "run.sh")]) as server:
            while not folder.pid_file.exists():
                pass
            while (found := pid_of(folder)) is not None:
                seen.append(found)
            assert server.wait(timeout=0.5) == 0, f"seen {len(seen)} times, it was said to have ended"
        assert set(seen) == {server.pid}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_shellcheck_finds_nothing_in_the_script() -> None:
    script = CHECKOUT / "hookmap" / "services" / "deploy" / "enter.sh"
    done = subprocess.run(["shellcheck", "-s", "sh", script], capture_output=True, text=True)
    assert done.stdout == ""


@pytest.mark.skipif("HOOKMAP_LONG" not in os.environ, reason="minutes long: HOOKMAP_LONG=1 runs it")
def test_an_environment_is_made_once_and_made_anew_when_asked(box: Loopback) -> None:
    port = ["--port", str(free_port()), "--folder", "whole"]
    port += ["--torch", os.environ["TORCH"]] if "TORCH" in os.environ else []
    try:
        runs = [
            ("--fresh", "making "),
            ("--json", "dependencies: as locked already"),
            ("--sync=skip", "left as they are"),
        ]
        for more, said in runs:
            done = box.run("box", *port, more)
            assert done.exit_code == 0 and said in done.stderr, done.output
        pip = [box.home / "whole" / "venv" / "bin" / "python", "-m", "pip", "freeze"]
        frozen = subprocess.run(pip, capture_output=True, text=True, check=True).stdout
        versions = dict(line.split("==") for line in frozen.splitlines() if "==" in line)
        for line in bundle().lock.splitlines():
            name, version = line.split("==")
            found = {key.lower().replace("_", "-"): value for key, value in versions.items()}.get(name)
            assert found is None or found.partition("+")[0] == version, line
    finally:
        box.run("box", "--stop", "--folder", "whole")


# Looked up without the import system: setuptools puts distutils aside for whoever looks for pip, in the whole process.
@pytest.mark.skipif(not any(importlib.metadata.distributions(name="pip")), reason="no pip in this environment")
def test_a_release_is_what_pip_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "hookmap-9.9.9-py3-none-any.whl", "w") as wheel:
        told = "Metadata-Version: 2.1\nName: hookmap\nVersion: 9.9.9\nRequires-Dist: torch>=2.4\n"
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        for name, text in (("METADATA", told), ("WHEEL", tags), ("RECORD", "")):
            wheel.writestr(f"hookmap-9.9.9.dist-info/{name}", text)
    lock = tmp_path / "lock.txt"
    lock.write_text("torch==2.13.0\n")
    found = bundle("9.9.9", lock)
    assert (found.version, found.requirements, found.lock) == ("9.9.9", "torch>=2.4\n", "torch==2.13.0\n")
    with raises(hookmap.DeployError, "hookmap 9.9.8 cannot be had:", "Leave --release out"):
        bundle("9.9.8")
    lock.write_text("numpy==2.0\n")
    with raises(hookmap.DeployError, "names no exact torch"):
        bundle("9.9.9", lock)


def test_the_name_that_clients_use_is_expected_of_the_server(tmp_path: Path) -> None:
    shown = Loopback(tmp_path, "ssh").run(
        "box", *HERE, "--dry-run", "--", "--served-model-name", "mine", "--drain", "5"
    )
    asked = json.loads(shown.stdout.partition("request.json:\n")[2])
    assert (asked["name"], asked["drain"]) == ("mine", 5), shown.output


def test_the_program_for_the_host_needs_the_standard_library_only(tmp_path: Path) -> None:
    (tmp_path / "on_host.pyz").write_bytes(program())
    (tmp_path / "incoming").mkdir()
    asked = Request("status", "hookmap deploy box", "ssh box")
    (tmp_path / "incoming" / "request.json").write_text(asked.to_json(), encoding="utf-8")
    command = [sys.executable, "-I", "-S", tmp_path / "on_host.pyz", tmp_path / "incoming"]  # -S: no site-packages
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout)["error"].startswith(f"nothing was deployed to {tmp_path.resolve()}.")
