"""What every test needs: no network, and few threads (two workers share the cores)."""

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before transformers or huggingface_hub is imported: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where transformers copies the code that a model brings.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hookmap-tests-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


# On a busy machine an example may take any time; no random test is about time.
settings.register_profile("hookmap", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hookmap")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutants", action="store_true", help="hold each invented model against its wrong maps: minutes")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where slow tests are left out, a file that has no others is not imported: what it imports may take seconds."""
    if "not slow" not in config.option.markexpr or collection_path.suffix != ".py":
        return None
    return bool(_ALL_SLOW.search(collection_path.read_text(encoding="utf-8"))) or None


_ALL_SLOW = re.compile(r"^pytestmark = (?:|\[[^\]]*)pytest\.mark\.slow\b", re.MULTILINE)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--mutants"):
        from support import mutants

        mutants.asked = True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--mutants"):
        from support import mutants

        terminalreporter.write_line(f"held {len(mutants.HELD)} models against {sum(mutants.HELD)} wrong maps")


@pytest.fixture
def seeded() -> None:
    """The same random numbers in each test."""
    import torch

    torch.manual_seed(3)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hookmap.yaml and no settings in the environment of the person who runs the tests."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("HOOKMAP_"):
            monkeypatch.delenv(name)


@pytest.fixture
def fast_path() -> Iterator[Path]:
    """A folder where hundreds of small captures, each with its fsyncs, take no time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder)
