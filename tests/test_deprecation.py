"""What is retired goes on working, and says at the user's own line what takes its place."""

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from support.raises import raises

import hookmap
from hookmap.activations import Activation, Sample
from hookmap.errors import deprecated
from hookmap.stores.memory import MemoryStore

KEY = ("resid_mid", 0)


def store() -> MemoryStore:
    found = MemoryStore([KEY])
    found.write(Activation(0, *KEY, 0, torch.arange(8.0).reshape(4, 2)))
    found.finish(Sample(0, "prompt", "", (1, 2, 3, 4, 5), 5, 4))
    return found


def test_tokens_in_the_place_of_the_call_are_read_with_a_warning_of_our_own() -> None:
    with pytest.warns(hookmap.HookmapDeprecationWarning, match=r"0\.4.*tokens=tokens") as caught:
        rows = store().read(0, *KEY, [1, 3])  # type: ignore[arg-type]
    assert torch.equal(rows, torch.tensor([[2.0, 3.0], [6.0, 7.0]]))
    assert [each.filename for each in caught] == [__file__], "the line that has to be changed"


def test_the_new_form_and_calls_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(store().read(0, *KEY, tokens=[1]), store().read(0, *KEY, None, slice(1, 2)))


def test_tokens_given_twice_are_refused() -> None:
    with raises(hookmap.SelectionError, "[1]", "[2]", "tokens="):
        store().read(0, *KEY, [1], [2])  # type: ignore[arg-type]


def test_it_is_seen_without_asking_also_in_a_module_of_the_user(tmp_path: Path) -> None:
    """Python hides a DeprecationWarning there."""
    (tmp_path / "theirs.py").write_text("from hookmap.errors import deprecated\ndeprecated('old', 'new', '9.9')\n")
    done = subprocess.run([sys.executable, "-c", "import theirs"], cwd=tmp_path, capture_output=True, text=True)
    assert "theirs.py:2: HookmapDeprecationWarning: old will be gone in hookmap 9.9. Write new instead." in done.stderr


def test_nothing_is_promised_to_be_gone_in_a_version_that_is_out() -> None:
    """Each `gone_in` of the code lies ahead."""
    package = Path(hookmap.__file__).parent
    calls = [
        node
        for file in package.rglob("*.py")
        if f"{deprecated.__name__}(" in (text := file.read_text(encoding="utf-8"))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == deprecated.__name__
    ]
    versions = [keyword.value.value for call in calls for keyword in call.keywords if keyword.arg == "gone_in"]  # type: ignore[attr-defined]
    assert len(versions) == len(calls) > 0
    assert all(Version(version) > Version(hookmap.__version__) for version in versions)
