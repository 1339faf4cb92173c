"""`import hookmap` and `hookmap --help` are light, and the public names are the ones that are written down."""

import os
import subprocess
import sys

import pytest
from support.raises import raises

import hookmap

HEAVY = ("torch", "transformers", "nnsight", "numpy", "pydantic", "jsonschema", "safetensors", "rich", "yaml")

PUBLIC = {
    "ArchitectureMap", "Capture", "CaptureError", "DataError", "DeployError", "DiscoveryError",
    "HookmapDeprecationWarning", "HookmapError",
    "InterventionError", "MapError", "MapMismatchError", "MapNotFoundError", "ModelError", "SelectionError", "Selector",
    "StoreError", "TokenizerError", "__version__", "discover", "load_map", "load_prompts", "open", "open_on_ray",
    "open_on_vllm", "open_remote", "open_store", "verify", "apply", "watch", "metrics", "Pair",
    "load_pairs", "open_statistics", "open_examples", "load_dictionary", "load_jacobian_lens",
}  # fmt: skip


def heavy_after(code: str) -> list[str]:
    """Which heavy packages are imported after `code` ran in a fresh interpreter."""
    check = f"\nimport sys; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


def test_importing_hookmap_imports_nothing_heavy() -> None:
    assert heavy_after("import hookmap; hookmap.HookmapError; dir(hookmap)") == []


def test_the_help_of_every_command_imports_nothing_heavy() -> None:
    run = "from hookmap.cli.main import main\nmain.main(['--help'], standalone_mode=False)\n"
    each = "for name in main.list_commands(None): main.main([name, '--help'], standalone_mode=False)"
    assert heavy_after(run + each) == []


@pytest.mark.slow
def test_the_tests_above_can_fail() -> None:
    assert "pydantic" in heavy_after("import hookmap; hookmap.ArchitectureMap")
    assert "torch" in heavy_after("import hookmap; hookmap.discover")


@pytest.mark.slow
def test_help_answers_well_under_a_second() -> None:
    def once() -> float:
        start = os.times()
        subprocess.run([sys.executable, "-m", "hookmap.cli", "--help"], check=True, capture_output=True)
        end = os.times()
        return end.children_user - start.children_user + end.children_system - start.children_system

    # Seconds of processor, the best of five: a machine that is busy is not what is measured. It takes about 0.1 s.
    assert min(once() for _ in range(5)) < 0.5


def test_the_public_names_are_those_that_are_written_down() -> None:
    assert set(hookmap.__all__) == PUBLIC
    assert list(hookmap.__all__) == sorted(hookmap.__all__)
    assert set(dir(hookmap)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_every_public_name_is_there_and_documented(name: str) -> None:
    found = getattr(hookmap, name)
    assert found.__doc__
    assert found.__name__.removeprefix("hookmap.") == name  # `metrics` is a module


def test_an_unknown_name_is_an_attribute_error() -> None:
    with raises(AttributeError, "no attribute 'discovr'"):
        _ = hookmap.discovr  # type: ignore[attr-defined]


def test_every_error_of_the_tree_is_public_and_in_the_drawing() -> None:
    from hookmap import errors

    own = {name: value for name, value in vars(errors).items() if getattr(value, "__module__", "") == errors.__name__}
    tree = {name for name, value in own.items() if isinstance(value, type) and not issubclass(value, Warning)}
    assert tree <= set(hookmap.__all__)
    assert all(name in str(errors.__doc__) for name in tree)
    assert all(issubclass(getattr(errors, name), hookmap.HookmapError) for name in tree)
