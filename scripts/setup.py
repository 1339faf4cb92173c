"""Makes .venv with hookmap in it. Needs only Python >= 3.11 and pip; `make demo` and `make test` call it.

`make test-clients` has .venv-clients made: environments of programs that use the server.
`make test-oldest` has .venv-oldest made: the same with the oldest transformers that pyproject.toml allows.
`make test-peers` has .venv-peer-NAME made: another program that hookmap is compared with, without hookmap.

PyPI's Linux build of PyTorch brings several GB of CUDA libraries. So, on Linux without an NVIDIA GPU, the CPU build
is installed first and by its exact version: no CUDA build answers to `2.13.0+cpu`. Everywhere else PyPI's is right.
The environment variable TORCH names another requirement, e.g. TORCH="torch==2.14.1".
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

CLIENTS = {
    "litellm": ["litellm>=1.80"],
    "inspect": ["inspect-ai>=0.3.285", "openai>=3.4"],
    "lm_eval": ["lm-eval[api]>=0.4.11", "transformers>=5"],
}
"""programs that use the server, each in an environment of its own: their pins clash"""
ROOT = Path(__file__).resolve().parent.parent
CPU_TORCH = "torch==2.13.0+cpu"
PEERS = {
    "transformer-lens": ("transformer-lens==4.3.0", "transformers==5.23.0"),
    "nnterp": ("nnterp==1.3.0", "nnsight==0.7.0", "transformers==5.23.0"),  # it does not import with nnsight 0.8
}
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", action="store_true", help="also install what the tests need")
    parser.add_argument("--oldest", action="store_true", help="make .venv-oldest, with the oldest transformers")
    parser.add_argument("--peer", choices=PEERS, help="make .venv-peer-NAME, with this program alone")
    parser.add_argument("--clients", action="store_true", help="make .venv-clients, with the server's clients")
    given = parser.parse_args()
    if given.clients:
        make_clients()
        return
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before anything has checked the version
        sys.exit(f"hookmap needs Python 3.11 or later, not {platform.python_version()}: PYTHON=python3.12 make demo")
    venv = ROOT / (f".venv-peer-{given.peer}" if given.peer else ".venv-oldest" if given.oldest else ".venv")
    pip = make_environment(venv)
    install_torch(pip)
    if given.peer:
        say(f"installing {' '.join(PEERS[given.peer])} (a minute or two)")
        run(*pip, "install", "-qq", *PEERS[given.peer])
        (venv / ".ready").touch()
        return
    say("installing hookmap and what it needs (a minute or two)")
    extra = [f"transformers=={oldest_transformers()}", "pytest>=8.2"] if given.oldest else []
    run(*pip, "install", "-qq", "--editable", f"{ROOT}[test]" if given.tests else str(ROOT), *extra)
    # The stamps that the Makefile looks at. The tests' environment is also good enough for the demo.
    (venv / ".ready").touch()
    if given.tests:
        (venv / ".ready-for-tests").touch()


def make_clients() -> None:
    """An environment for each client, without PyTorch."""
    for name, needs in CLIENTS.items():
        venv = ROOT / ".venv-clients" / name
        say(f"installing {name}")
        run(*make_environment(venv), "install", "-qq", *needs)
    (ROOT / ".venv-clients" / ".ready").touch()


def oldest_transformers() -> str:
    """The lower bound in pyproject.toml, read by hand: this file runs before anything is installed."""
    bound = re.search(r'"transformers>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return bound[1] if bound else sys.exit("pyproject.toml names no lower bound of transformers")


def make_environment(venv: Path) -> list[str]:
    """Makes the environment if it is not there; returns the command that is its pip."""
    python = str(venv / "bin" / "python")
    if not Path(python).exists():
        say(f"making {venv} with Python {platform.python_version()}")
        # Debian's python3 without python3-venv can make an environment, only not put pip into it: ours fills it then.
        bare = [] if has_module("ensurepip") else ["--without-pip"]
        run(sys.executable, "-m", "venv", *bare, str(venv))
    own_pip = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0
    return [python, "-m", "pip"] if own_pip else [sys.executable, "-m", "pip", "--python", python]


def install_torch(pip: list[str]) -> None:
    """Chooses the build of PyTorch before anything that depends on it can."""
    chosen = os.environ.get("TORCH")
    if chosen is None and platform.system() == "Linux" and not has_nvidia_gpu():
        say(f"no NVIDIA GPU here: installing {CPU_TORCH}, the build without CUDA (about 200 MB)")
        # Few retries, and its dependencies later from PyPI: where this index cannot be reached, pip soon goes on with
        # the other places that it is configured for.
        index = ("--extra-index-url", CPU_INDEX, "--retries", "1", "--timeout", "20")
        failure = (
            f"pip found no {CPU_TORCH}, which is at {CPU_INDEX} (for CPython 3.11 to 3.14). To choose another build "
            'yourself: TORCH="torch" make demo (PyPI\'s, several GB with its CUDA libraries)'
        )
        run(*pip, "install", "-qq", "--no-deps", CPU_TORCH, *index, failure=failure)
    else:
        run(*pip, "install", "-q", chosen or "torch>=2.4")


def has_nvidia_gpu() -> bool:
    """Whether nvidia-smi is there and lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def has_module(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0


def run(*command: str, failure: str = "") -> None:
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(failure or f"this command failed ({code}): {' '.join(command)}")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
