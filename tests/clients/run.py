"""Starts a server with the demo model and lets other people's clients use it, each in an environment of its own.

    make test-clients
    make test-clients-vllm

--server: hookmap's own; hookmap's on vLLM; or vLLM's, with the plugin. --envs: the folder of the environments
(`scripts/setup.py --clients` makes them). Names of clients choose some of them.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

from support import wide_demo  # noqa: E402 - in the folder above

from hookmap.demo import MODEL_PATH, sample_problems  # noqa: E402 - behind the path

CLIENTS = {
    "hooks": ("openai", "litellm", "inspect", "lm_eval", "langchain", "ai_sdk"),
    "vllm": ("openai", "litellm", "inspect"),
    "vllm-serve": ("litellm", "inspect"),
}
"""of each server, those that use it"""
NAME = "hookmap-demo"
SAMPLES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=", ".join(CLIENTS["hooks"]))
    parser.add_argument("--server", choices=CLIENTS, default="hooks")
    parser.add_argument("--envs", type=Path, default=ROOT / ".venv-clients")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        problems = Path(folder) / "problems.jsonl"
        write_problems(problems)
        server, url = serve(given.server, Path(folder))
        try:
            clients = given.clients or CLIENTS[given.server]
            if "ai_sdk" in clients and not given.clients and shutil.which("node") is None:
                clients = [name for name in clients if name != "ai_sdk"]
                print("ai_sdk: left out, there is no node")
            failed = [name for name in clients if not run(name, given.envs, url, problems)]
        finally:
            server.terminate()
            server.wait(60)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def write_problems(path: Path) -> None:
    """The demo's problems: question, the number asked for, and four worked answers of which the first is right."""
    with path.open("w", encoding="utf-8") as file:
        for problem in sample_problems(SAMPLES, 12345):
            wrong = [problem.answer_text.replace(str(problem.answer), str(problem.answer + n)) for n in (1, 2, 10)]
            row = {"question": problem.question, "target": str(problem.answer)}
            file.write(json.dumps({**row, "choices": [problem.answer_text, *wrong]}) + "\n")


def command_of(kind: str, folder: Path) -> list[str]:
    """What starts a server of this kind, but for its port."""
    own, sessions = ["-m", "hookmap.cli", "serve"], str(folder / "sessions")
    if kind == "hooks":
        return [*own, "--sessions", sessions, "--device", "cpu"]
    model = str(wide_demo.save(folder / "model"))
    if kind == "vllm":
        return [*own, model, f"--served-model-name={NAME}", "--sessions", sessions, "--engine", "vllm", "--eager"]
    asked = json.dumps({"hookmap": {"serving": {"sessions": sessions}}})
    vllm = ["-m", "vllm.entrypoints.openai.api_server", "--model", model, f"--served-model-name={NAME}"]
    return [*vllm, "--enforce-eager", "--additional-config", asked]


def serve(kind: str, folder: Path) -> tuple["subprocess.Popen[bytes]", str]:
    """The server, when it answers, and its address."""
    log = folder / "log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, *command_of(kind, folder), "--port", str(port)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as errors:
        server = subprocess.Popen(command, stderr=errors, stdout=errors, cwd=folder, env=environment)
    url = f"http://127.0.0.1:{port}"
    while server.poll() is None:
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{url}/health"):
            return server, url
        time.sleep(0.2)
    sys.exit(f"the server ended:\n{log.read_text(encoding='utf-8')}")


def run(name: str, envs: Path, url: str, problems: Path) -> bool:
    """One client; what it prints and whether it was content."""
    python = sys.executable if name == "openai" else str(envs / name / "bin" / "python")
    program = ["node", str(HERE / "with_ai_sdk.mjs")] if name == "ai_sdk" else [python, str(HERE / f"with_{name}.py")]
    command = [*program, url, str(problems)]
    command += [str(MODEL_PATH)] if name == "lm_eval" else []
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {
        "NODE_FOLDER": str((envs / name).resolve()),
        "HF_HUB_OFFLINE": "1",
        "NO_PROXY": "127.0.0.1",
        "HF_DATASETS_CACHE": str(problems.parent / "cache"),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=problems.parent)
    print(done.stdout.strip().splitlines()[-1] if done.returncode == 0 else f"{name}: failed", flush=True)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
    return done.returncode == 0


if __name__ == "__main__":
    main()
