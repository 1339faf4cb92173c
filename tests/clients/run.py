"""Starts `hookmap serve` with the demo model and lets other people's clients use it, each in an environment of its own.

    make test-clients

--envs: the folder of the environments (`scripts/setup.py --clients` makes them). Names of clients choose some of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from hookmap.demo import MODEL_PATH, sample_problems

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CLIENTS = ("openai", "litellm", "inspect", "lm_eval")
SAMPLES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=", ".join(CLIENTS))
    parser.add_argument("--envs", type=Path, default=ROOT / ".venv-clients")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        problems = Path(folder) / "problems.jsonl"
        write_problems(problems)
        server, url = serve(Path(folder))
        try:
            failed = [name for name in given.clients or CLIENTS if not run(name, given.envs, url, problems)]
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


def serve(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """The server, when it answers, and its address."""
    log = folder / "log"
    command = [sys.executable, "-m", "hookmap.cli", "serve", "--port", "0", "--sessions", str(folder / "sessions")]
    with log.open("wb") as errors:
        server = subprocess.Popen([*command, "--device", "cpu"], stderr=errors, stdout=errors, cwd=folder)
    while " running on http" not in (text := log.read_text(encoding="utf-8")):
        try:
            server.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
        sys.exit(f"the server ended:\n{text}")
    return server, "http://" + text.partition(" running on http://")[2].split()[0]


def run(name: str, envs: Path, url: str, problems: Path) -> bool:
    """One client; what it prints and whether it was content."""
    python = sys.executable if name == "openai" else str(envs / name / "bin" / "python")
    command = [python, str(HERE / f"with_{name}.py"), url, str(problems)]
    command += [str(MODEL_PATH)] if name == "lm_eval" else []
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1", "HF_DATASETS_CACHE": str(problems.parent / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=problems.parent)
    print(done.stdout.strip().splitlines()[-1] if done.returncode == 0 else f"{name}: failed", flush=True)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
    return done.returncode == 0


if __name__ == "__main__":
    main()
