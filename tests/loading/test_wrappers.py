"""What a user's object does around its model is part of the run, or it is refused by name.

Each is held against plain PyTorch hooks around the object's own `forward` and `generate`.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from support import plain_hooks
from support.raises import raises
from support.served import serving
from support.tiny_tokenizer import tiny_tokenizer
from torch import nn

import hookmap

pytestmark = [
    pytest.mark.slow,
    # PEFT reads a name that transformers 5.23 has renamed, and warns of what tiny random models have no use for.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The distutils package:DeprecationWarning"),  # setuptools, which BOFT imports
]

IDS = [5, 17, 3, 60, 22, 9, 11, 12, 41, 8]
OTHER = [7, 30, 11, 12, 2]
NEW = 3
LAYER = 1
Q, QV = ["q_proj"], ["q_proj", "v_proj"]
Forward = Callable[[nn.Module], Any]


def adapters() -> dict[str, Callable[[], Any]]:
    """A configuration of each kind of adapter that runs on token ids alone, by the name that docs/loading.md has."""

    def of(name: str, **settings: Any) -> Callable[[], Any]:
        return lambda: getattr(peft, name)(task_type="CAUSAL_LM", **settings)

    return {
        "LORA": of("LoraConfig", r=4, target_modules=QV),
        "LORA with use_dora": of("LoraConfig", r=4, target_modules=QV, use_dora=True),
        "LORA with alora_invocation_tokens": of("LoraConfig", r=4, target_modules=QV, alora_invocation_tokens=[11, 12]),
        "LORA with modules_to_save": of("LoraConfig", r=4, target_modules=QV, modules_to_save=["lm_head"]),
        "LORA with trainable_token_indices": of("LoraConfig", r=4, target_modules=QV, trainable_token_indices=[5, 17]),
        "LORA with layer_replication": of("LoraConfig", r=4, target_modules=QV, layer_replication=[[0, 2], [1, 3]]),
        "LORA with target_parameters": of("LoraConfig", r=4, target_parameters=["mlp.gate_proj.weight"]),
        "ADALORA": of("AdaLoraConfig", target_modules=QV, total_step=10),
        "ADAMSS": of("AdamssConfig", target_modules=QV),
        "ADAPTION_PROMPT": of("AdaptionPromptConfig", adapter_len=4, adapter_layers=2),
        "BEFT": of("BeftConfig", target_modules=QV),
        "BOFT": of("BOFTConfig", target_modules=QV, boft_block_size=4),
        "C3A": of("C3AConfig", target_modules=Q, block_size=8),
        "CARTRIDGE": of("CartridgeConfig", num_virtual_tokens=4),
        "DEFT": of("DeftConfig", target_modules=QV),
        "DELORA": of("DeloraConfig", r=4, target_modules=QV),
        "FOURIERFT": of("FourierFTConfig", n_frequency=10, target_modules=Q),
        "FROD": of("FrodConfig", target_modules=Q),
        "GLORA": of("GloraConfig", target_modules=QV),
        "GRALORA": of("GraloraConfig", r=4, target_modules=Q),
        "HIRA": of("HiraConfig", r=4, target_modules=QV),
        "HRA": of("HRAConfig", r=4, target_modules=QV),
        "IA3": of("IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "LILY": of("LilyConfig", target_modules=QV),
        "LN_TUNING": of("LNTuningConfig", target_modules=["input_layernorm"]),
        "LOHA": of("LoHaConfig", r=4, target_modules=QV),
        "LOKR": of("LoKrConfig", r=4, target_modules=QV),
        "MISS": of("MissConfig", r=4, target_modules=QV),
        "OFT": of("OFTConfig", target_modules=QV, oft_block_size=4),
        "OSF": of("OSFConfig", target_modules=QV),
        "PEANUT": of("PeanutConfig", target_modules=QV),
        "PREFIX_TUNING": of("PrefixTuningConfig", num_virtual_tokens=4),
        "PSOFT": of("PsoftConfig", r=4, target_modules=QV),
        "PVERA": of("PveraConfig", r=4, target_modules=Q),
        "RANDLORA": of("RandLoraConfig", r=4, target_modules=Q),
        "ROAD": of("RoadConfig", target_modules=Q, group_size=4),
        "SHIRA": of("ShiraConfig", r=2, target_modules=QV),
        "SUPERTUNING": of("SupertuningConfig", target_modules=QV),
        "TINYLORA": of("TinyLoraConfig", target_modules=QV),
        "TRAINABLE_TOKENS": of("TrainableTokensConfig", target_modules=["embed_tokens"], token_indices=[5, 17]),
        "UNILORA": of("UniLoraConfig", target_modules=Q),
        "VBLORA": of("VBLoRAConfig", r=4, target_modules=Q, num_vectors=8, vector_length=8, topk=2),
        "VERA": of("VeraConfig", r=4, target_modules=Q),
        "WAVEFT": of("WaveFTConfig", n_frequency=10, target_modules=Q),
    }


def refused() -> dict[str, tuple[Callable[[], Any], str]]:
    """A configuration of each kind that cannot be captured from, and what is said."""

    def of(name: str, **settings: Any) -> Callable[[], Any]:
        return lambda: getattr(peft, name)(task_type="CAUSAL_LM", **settings)

    more = r"\({}\) runs its LlamaForCausalLM on {} positions for 6 tokens"
    task = r"\({}\) did not run on .* task_ids"
    return {
        "CPT": (
            of("CPTConfig", cpt_token_ids=[3, 4, 5], cpt_mask=[1] * 3, cpt_tokens_type_mask=[1, 2, 2]),
            more.format("CPT", 9),
        ),
        "MULTITASK_PROMPT_TUNING": (
            of("MultitaskPromptTuningConfig", num_virtual_tokens=4, num_tasks=2),
            task.format("MULTITASK_PROMPT_TUNING"),
        ),
        "P_TUNING": (
            of("PromptEncoderConfig", num_virtual_tokens=4, encoder_hidden_size=16),
            more.format("P_TUNING", 10),
        ),
        "POLY": (of("PolyConfig", r=4, target_modules=QV, n_tasks=2), task.format("POLY")),
        "PROMPT_TUNING": (of("PromptTuningConfig", num_virtual_tokens=4), more.format("PROMPT_TUNING", 10)),
        "SHADOW": (of("ShadowConfig"), r"\(SHADOW\) shows, .*shadow_backbone.* are not of the LlamaForCausalLM in it"),
        "XLORA": (_xlora, r"\(LORA, XLORA\) runs its LlamaForCausalLM, or parts of it, 2 times in one pass"),
    }


def _xlora() -> Any:
    folder = tempfile.mkdtemp()
    for name in ("0", "1"):
        wrapped(adapters()["LORA"]).save_pretrained(f"{folder}/{name}")
    paths = {name: f"{folder}/{name}" for name in ("0", "1")}
    return peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=2, adapters=paths)


def wrapped(make: Callable[[], Any], **settings: Any) -> Any:
    """A PEFT model whose adapter matters: its weights are drawn anew."""
    config, base = make(), plain_hooks.build("llama")
    base.config.use_cache = not isinstance(config, peft.XLoraConfig)
    model = peft.get_peft_model(base, config, **settings)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad and weight.is_floating_point():
                weight += (0.3 * torch.randn(weight.shape, generator=draw)).to(weight.dtype)
    return model.eval()


def rows_of(x: nn.Module, run: Callable[[], Any]) -> tuple[Any, torch.Tensor]:
    """What `run` returns, and what one decoder layer gave meanwhile, as a plain hook sees it."""
    root = next(each for each in x.modules() if isinstance(each, transformers.PreTrainedModel))
    seen: list[torch.Tensor] = []
    hook = root.model.layers[LAYER].register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    try:
        with torch.no_grad():
            returned = run()
    finally:
        hook.remove()
    return returned, torch.cat(seen, 1)


def generated(x: Any, ids: list[int] = IDS) -> tuple[tuple[int, ...], torch.Tensor]:
    tokens = torch.tensor([ids])
    mask = torch.ones_like(tokens)
    settings = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    returned, rows = rows_of(x, lambda: x.generate(input_ids=tokens, **settings))
    return tuple(returned[0].tolist()), rows


def read(x: nn.Module, ids: list[int] = IDS) -> torch.Tensor:
    return rows_of(x, lambda: x(torch.tensor([ids])))[1]


def check(x: nn.Module, engine: Any = "hooks", hm: Any = None) -> None:
    """Both runs give the object's own rows, and its own tokens."""
    hm = hm or hookmap.open(x)
    harvest = hm.capture([IDS], "resid_post", LAYER, max_new_tokens=0, engine=engine)
    assert harvest["resid_post", LAYER].equal(read(x))
    run, (tokens, rows) = hm.capture([IDS], "resid_post", LAYER, max_new_tokens=NEW, engine=engine), generated(x)
    assert run.tokens[0] == tokens
    assert run["resid_post", LAYER].equal(rows)


@pytest.mark.parametrize("kind", adapters())
def test_an_adapter_is_part_of_what_is_captured(kind: str) -> None:
    x = wrapped(adapters()[kind])
    assert not read(x).equal(read(plain_hooks.build("llama"))) or kind == "LORA with layer_replication"
    check(x)


@pytest.mark.parametrize("kind", ["LORA with alora_invocation_tokens", "PREFIX_TUNING", "ADALORA"])
def test_and_with_nnsight(kind: str) -> None:
    check(wrapped(adapters()[kind]), "nnsight")


@pytest.mark.parametrize("kind", refused())
def test_an_adapter_that_cannot_be_captured_is_named(kind: str) -> None:
    make, said = refused()[kind]
    x = wrapped(make)
    for ask in (hookmap.open, hookmap.discover):
        with pytest.raises(hookmap.HookmapError, match=said):
            ask(x)


def test_the_documented_table_has_every_kind() -> None:
    page = (Path(__file__).parents[2] / "docs" / "loading.md").read_text()
    for kind in peft.PeftType:
        assert f"`{kind.value}`" in page, kind
    right, _, wrong = page.partition("| refused |")
    for kind in adapters():
        assert f"`{kind.split(' ')[0]}`" in right
    for kind in refused():
        assert f"`{kind}`" in wrong


# The rest of the library, on an adapter whose work is done by the wrapper ---------------------------------------------

ALORA = "LORA with alora_invocation_tokens"


def test_prompts_of_a_batch_are_as_alone() -> None:
    x = wrapped(adapters()[ALORA])
    run = hookmap.open(x).capture([IDS, OTHER], "resid_post", LAYER, max_new_tokens=NEW)
    for row, ids in enumerate((IDS, OTHER)):
        tokens, rows = generated(x, ids)
        assert run.tokens[row] == tokens
        torch.testing.assert_close(run.read(row, "resid_post", LAYER), rows[0])
    harvest = hookmap.open(x).capture([IDS, OTHER], "resid_post", LAYER, max_new_tokens=0)
    torch.testing.assert_close(harvest.read(1, "resid_post", LAYER), read(x, OTHER)[0])


def test_an_edit_is_made_in_the_wrapper_s_run() -> None:
    x = wrapped(adapters()[ALORA])
    hm = hookmap.open(x)
    mlp = x.get_base_model().model.layers[LAYER].mlp
    hook = mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    expected, _ = generated(x)
    hook.remove()
    assert expected != generated(x)[0]
    run = hm.generate([IDS], [{"do": "ablate", "point": "mlp_out", "layers": LAYER}], max_new_tokens=NEW)
    assert run.tokens[0] == expected


def test_the_lens_reads_the_wrapper_s_stream() -> None:
    x = wrapped(adapters()[ALORA])
    with torch.no_grad():
        best = x(torch.tensor([IDS])).logits[0].argmax(-1).tolist()
    assert hookmap.open(x).lens([IDS], layers=[-1], top=1).top_ids[0, :, 0].tolist() == best


def test_the_server_answers_as_the_wrapper_does(tmp_path: Path) -> None:
    x, tokenizer = wrapped(adapters()[ALORA]), tiny_tokenizer()
    tokens, _ = generated(x)
    hm = hookmap.open(x, tokenizer=tokenizer)
    with serving(tmp_path, hm, points=("resid_post",), layers=(LAYER,)) as server:
        for more in ({}, {"hookmap": {"points": "resid_post", "layers": [LAYER]}}):
            asked = {"prompt": IDS, "max_tokens": NEW, "temperature": 0, **more}
            answer = server.post("/v1/completions", **asked).json()
            assert answer["choices"][0]["text"] == tokenizer.decode(tokens[len(IDS) :], skip_special_tokens=True)


# Other wrappers ------------------------------------------------------------


class Doubled(nn.Module):
    """Runs its model with one weight twice as large."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.lm, self.config = model, model.config

    def forward(self, tokens: torch.Tensor) -> Any:
        return self._doubled(lambda: self.lm(input_ids=tokens))

    def _doubled(self, run: Callable[[], Any]) -> Any:
        weight = self.lm.model.layers[0].mlp.down_proj.weight
        weight.data.mul_(2)
        try:
            return run()
        finally:
            weight.data.div_(2)


class Generating(Doubled):
    def generate(self, **settings: Any) -> Any:
        return self._doubled(lambda: self.lm.generate(**settings))


class Louder(transformers.LlamaForCausalLM):
    """A subclass with a forward of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["inputs_embeds"] = self.model.embed_tokens(kwargs.pop("input_ids", *args)) * 1.5
        return super().forward(**kwargs)


class Backwards(transformers.LlamaForCausalLM):
    """A subclass whose generate reads other tokens than it is given."""

    def generate(self, input_ids: torch.Tensor, **settings: Any) -> Any:
        return super().generate(input_ids=input_ids.flip(1), **settings)


def of_class(kind: Any) -> Any:
    plain = plain_hooks.build("llama")
    model = kind(plain.config)
    model.load_state_dict(plain.state_dict())
    return model.eval()


@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
def test_a_module_s_own_forward_and_generate_run(engine: str) -> None:
    plain = plain_hooks.build("llama")
    for x in (Generating(plain_hooks.build("llama")), of_class(Louder)):
        assert not read(x).equal(read(plain))
        check(x, engine)


def test_a_compiled_wrapper_runs_as_the_wrapper() -> None:
    x = wrapped(adapters()[ALORA])
    check(x, hm=hookmap.open(torch.compile(x, backend="eager")))


def test_a_mixed_peft_model_runs() -> None:
    x = wrapped(adapters()["LORA"], mixed=True)
    check(x)
    check(x, "nnsight")


def test_a_wrapper_without_generate_reads_and_does_not_generate() -> None:
    x = Doubled(plain_hooks.build("llama"))
    hm = hookmap.open(x)
    assert hm.capture([IDS], "resid_post", LAYER, max_new_tokens=0)["resid_post", LAYER].equal(read(x))
    with raises(hookmap.CaptureError, "Doubled", "`generate`", "LlamaForCausalLM"):
        hm.capture([IDS], "resid_post", LAYER, max_new_tokens=1)


def test_a_generate_that_reads_other_tokens_is_refused() -> None:
    with pytest.raises(hookmap.CaptureError, match=r"Backwards.generate ran on other tokens than the prompt's"):
        hookmap.open(of_class(Backwards)).capture([IDS], "resid_post", LAYER, max_new_tokens=1)


class Tempered(Doubled):
    def forward(self, tokens: torch.Tensor) -> Any:
        output = self.lm(input_ids=tokens)
        output.logits = output.logits / 2
        return output


def test_a_wrapper_with_other_logits_than_its_model_is_refused() -> None:
    with raises(hookmap.ModelError, "Tempered", "logits", "LlamaForCausalLM"):
        hookmap.open(Tempered(plain_hooks.build("llama")))


def test_a_wrapper_s_own_generation_settings_apply() -> None:
    x = wrapped(adapters()["LORA"])
    first = generated(x)[0][len(IDS)]
    x.generation_config = transformers.GenerationConfig(eos_token_id=first, pad_token_id=0)
    assert generated(x)[0] == (*IDS, first)
    assert hookmap.open(x).capture([IDS], (), max_new_tokens=NEW).tokens[0] == (*IDS, first)


def test_copies_on_several_devices_are_refused() -> None:
    with raises(hookmap.DiscoveryError, "a DataParallel runs copies of its model"):
        hookmap.open(nn.DataParallel(plain_hooks.build("llama")))


class OwnLoop(nn.Module):
    """Generates with a loop of its own, which draws from torch's generators."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.lm, self.config = model, model.config

    def forward(self, **inputs: Any) -> Any:
        return self.lm(**inputs)

    def generate(
        self, input_ids: torch.Tensor, generation_config: Any, stopping_criteria: Any, **_: Any
    ) -> torch.Tensor:
        for _step in range(generation_config.max_new_tokens):
            probabilities = self.lm(input_ids=input_ids).logits[:, -1].softmax(-1)
            input_ids = torch.cat([input_ids, torch.multinomial(probabilities, 1)], 1)
            stopping_criteria[0](input_ids, None)
        return input_ids


class StrictLoop(OwnLoop):
    """The same, without arguments that it does not know."""

    def generate(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: Any, generation_config: Any, stopping_criteria: Any
    ) -> torch.Tensor:
        return super().generate(input_ids, generation_config, stopping_criteria)


@pytest.mark.parametrize("kind", [OwnLoop, StrictLoop])
def test_a_loop_of_its_own_that_cannot_draw_with_a_seed_is_refused(kind: Any) -> None:
    hm = hookmap.open(kind(plain_hooks.build("llama")))
    with pytest.raises(hookmap.CaptureError, match=f"{kind.__name__}.generate has a loop of its own(.|\n)*seed"):
        hm.capture([IDS], ["resid_mid"], [1], max_new_tokens=NEW, do_sample=True, seed=1)


@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
@pytest.mark.parametrize("rows", [{}, {"positions": "last"}, {"mean": True}], ids=["all", "last", "mean"])
def test_a_loop_of_its_own_that_runs_with_a_graph_is_captured_without_it(engine: str, rows: dict[str, Any]) -> None:
    points = ["resid_mid", "attn_out", "attn_result", *([] if rows else ["pattern"])]

    def run(graph: bool, settings: dict[str, Any]) -> hookmap.Capture:
        torch.manual_seed(1)
        hm = hookmap.open(OwnLoop(plain_hooks.build("llama")))
        with torch.set_grad_enabled(graph):
            return hm.capture([IDS], points, [LAYER], max_new_tokens=8, engine=engine, **settings, **rows)

    vector = torch.linspace(-3, 3, 32).tolist()
    steer = {"do": "steer", "point": "resid_mid", "layers": LAYER, "vector": vector}
    settings: dict[str, Any]
    for settings in ({}, {"interventions": [steer]}):
        found, without = run(True, settings), run(False, settings)
        assert found.tokens == without.tokens
        for point in points:
            assert found[point, LAYER].equal(without[point, LAYER])
            assert not found[point, LAYER].requires_grad


def test_an_adapter_draws_with_a_seed_as_its_own_generate_does() -> None:
    model = peft.get_peft_model(plain_hooks.build("llama"), adapters()["LORA"]())
    settings = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5}
    run = hookmap.open(model).capture([IDS], ["resid_mid"], [1], seed=5, **settings)
    torch.manual_seed(5)
    tokens = torch.tensor([IDS])
    plain = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **settings)
    assert run.tokens[0] == tuple(plain[0].tolist())
