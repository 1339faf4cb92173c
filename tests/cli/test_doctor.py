"""`hookmap doctor` tells the truth about an installation, a broken one too."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from hookmap.cli import doctor

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parents[2]


def diagnosed(folder: Path, first: str = "", **environment: str) -> tuple[int, dict[str, dict[str, Any]], str]:
    """Exit code, findings by name, and stderr, of a process of its own in `folder`; `first` leads the import path."""
    path = os.pathsep.join(filter(None, [first, str(CHECKOUT)]))
    given = {name: value for name, value in os.environ.items() if not name.startswith("HOOKMAP_")}
    done = subprocess.run(
        [sys.executable, "-m", "hookmap.cli", "doctor", "--json"],
        cwd=folder,
        env={**given, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    document = json.loads(done.stdout)
    assert document["works"] == (done.returncode == 0)
    return done.returncode, {finding["name"]: finding for finding in document["findings"]}, done.stderr


def test_a_sound_installation_works_and_offline_mode_is_said(tmp_path: Path) -> None:
    code, found, _ = diagnosed(tmp_path, HF_HUB_OFFLINE="1")
    assert code == 0 and [name for name, finding in found.items() if finding["state"] == "broken"] == []
    for name in ("torch", "transformers", "nnsight", "pydantic"):
        assert found[name]["found"] == metadata.version(name)
    assert "offline mode" in found["hub"]["found"] and found["capture"]["state"] == "ok"
    assert str(tmp_path / "captures") in found["disk"]["found"]
    assert found["[server]"]["found"].startswith(f"fastapi {metadata.version('fastapi')}")


def test_a_broken_installation_is_one_exit_code_and_no_traceback(tmp_path: Path) -> None:
    """A package that does not start, a wrong setting, and a hub that nobody answers for."""
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "nnsight.py").write_text("raise ImportError('libsomething.so: no such file')\n")
    (tmp_path / "hookmap.yaml").write_text("evry: 1\n")
    hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    code, found, stderr = diagnosed(tmp_path, str(tmp_path / "first"), **hub)
    assert code == 1 and "Traceback" not in stderr
    assert found["import nnsight"]["state"] == "broken" and "libsomething.so" in found["import nnsight"]["found"]
    assert found["settings"]["state"] == "broken" and "did you mean every?" in found["settings"]["found"]
    assert found["hub"]["state"] == "note" and "refused" in found["hub"]["found"]
    assert found["import nnsight"]["remedy"] == "pip install -U nnsight"


def test_a_hub_that_answers_is_found_whatever_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(405)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        (found,) = doctor.examine("hub")
        thread.join()
    assert found.state == "ok" and f"{server.server_port} answers" in found.found


def test_missing_and_old_packages_are_named_with_what_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are read from the installed hookmap's own metadata, here one that asks for more than there is."""
    information = tmp_path / "hookmap-9.dist-info"
    information.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: hookmap", "Version: 9", "Provides-Extra: server", "Provides-Extra: all"]
    needs = ["click>=99", "rich", "no-such-package; python_version < '3'", "no-such-server; extra == 'server'"]
    needs += ["no-such-server; extra == 'all'"]
    (information / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {need}" for need in needs)]) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = {finding.name: finding for finding in doctor.examine("hookmap", "extras")}
    assert found.keys() == {"hookmap", "click", "rich", "[server]"}
    assert found["click"].state == "broken" and ">=99 is needed" in found["click"].found
    assert found["click"].remedy == 'pip install "click>=99"' and found["rich"].state == "ok"
    assert found["[server]"].found == "no-such-server is not installed; without it no hookmap serve"
    assert found["[server]"].state == "note" and found["[server]"].remedy == 'pip install "hookmap[server]"'


def test_what_is_lost_is_said_of_every_extra() -> None:
    extras = set(metadata.metadata("hookmap").get_all("Provides-Extra") or [])
    assert extras - set(doctor.COLLECTIONS) == set(doctor.WITHOUT)
