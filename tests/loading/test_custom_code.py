"""Models that bring their own code: refused without executing any of it, and with the flag simply captured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support import odd_code
from support.raises import raises
from torch import Tensor

import hookmap
from hookmap.cli.main import main

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    odd_code.write_model(tmp_path / "loom")
    return tmp_path / "loom"


@pytest.mark.parametrize("use", [hookmap.open, hookmap.discover, hookmap.verify, hookmap.load_map])
def test_code_that_is_not_trusted_is_not_executed(use: Any, folder: Path) -> None:
    with pytest.raises(hookmap.HookmapError, match="trust-remote-code" if use is not hookmap.load_map else "no map"):
        use(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("command", ["discover", "show", "verify", "capture"])
def test_every_command_refuses_it_and_names_the_flag(command: str, folder: Path) -> None:
    more = ["--points", "resid_mid", "--layers", "1", "--prompt", "to be"] if command == "capture" else []
    result = CliRunner().invoke(main, [command, str(folder), *more])
    assert result.exit_code == 1 and "--trust-remote-code" in result.output, result.output
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("command", ["discover", "show", "verify"])
def test_every_command_works_with_the_flag(command: str, folder: Path) -> None:
    result = CliRunner().invoke(main, [command, str(folder), "--trust-remote-code"])
    assert result.exit_code == 0, result.output
    assert (folder / "ran").exists()


def test_a_made_up_architecture_is_captured_as_plain_hooks_see_it(folder: Path) -> None:
    """Unfamiliar names, the stream as a keyword, a dictionary out of each block, half of the MLP's branch."""
    hm = hookmap.open(folder, trust_remote_code=True, device="cpu")
    found = hm.map
    assert (found.architecture, found.layers_path, found.num_layers) == ("LoomForCausalLM", "tower.{i}", 3)
    assert found.d_model == 24
    points = ["resid_pre", "mixer_in", "mixer_out", "resid_mid", "mlp_in", "mlp_out", "resid_post"]
    run = hm.capture("to be or not", points, max_new_tokens=4)
    seen: dict[tuple[str, int], Tensor] = {}
    handles = []
    for i, storey in enumerate(hm.model.tower):

        def keep(module: Any, args: Any, kwargs: Any, output: Any, key: tuple[str, int]) -> None:
            name, layer = key
            if name == "storey":
                seen["resid_pre", layer], seen["resid_post", layer] = kwargs["thread"], output["cloth"]
            elif name in ("calm", "cool"):
                seen[{"calm": "mixer_in", "cool": "mlp_in"}[name], layer] = output
                seen[{"calm": "resid_pre", "cool": "resid_mid"}[name], layer] = args[0]
            else:
                seen["mixer_out" if name == "weft" else "mlp_out", layer] = output * (0.5 if name == "slim" else 1)

        for name, module in (("storey", storey), *((n, getattr(storey, n)) for n in ("calm", "weft", "cool", "slim"))):

            def hook(m: Any, a: Any, k: Any, o: Any, key: tuple[str, int] = (name, i), keep: Any = keep) -> None:
                keep(m, a, k, o, key)

            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    ids = torch.tensor([run.tokens[0][:-1]])  # the model keeps no cache: one pass over all tokens shows the same
    with torch.no_grad():
        hm.model(ids)
    for handle in handles:
        handle.remove()
    for point in points:
        for layer in range(3):
            torch.testing.assert_close(run[point, layer], seen[point, layer], msg=f"{point} of layer {layer}")


def test_its_map_without_weights_is_the_map_with_them(folder: Path) -> None:
    without = hookmap.discover(folder, trust_remote_code=True)
    assert without.kinds == hookmap.open(folder, trust_remote_code=True, device="cpu").map.kinds
    assert without.discovered_by == "one forward pass on the meta device, full size"
    assert hookmap.verify(folder, trust_remote_code=True).passed
    assert hookmap.verify(folder, trust_remote_code=True, random_weights=True).passed


def test_broken_code_is_told_in_one_sentence(folder: Path) -> None:
    (folder / "configuration_loom.py").write_text("import no_such_library\n")
    with raises(hookmap.ModelError, "no_such_library"):
        hookmap.discover(folder, trust_remote_code=True)


def test_a_folder_whose_code_is_no_causal_language_model_says_so(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]["AutoModelForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    with raises(hookmap.ModelError, "no language model") as error:
        hookmap.discover(folder, trust_remote_code=True)
    assert len(str(error.value)) < 400
