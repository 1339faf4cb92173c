"""Test on the model whether prompts of different lengths may share a batch: padding must not change their rows.

Two random prompts run alone and in one batch with a longer one, as a capture runs them, and the tensor that the logits
are computed from is compared. Where they differ, both run in float64, whose rounding is about 1e-15: a difference that
remains is a fault, not rounding.
"""

import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor

from hookmap.capture.batches import Generating, Harvesting
from hookmap.capture.engines import Engine
from hookmap.capture.engines.model_lock import lock_of
from hookmap.capture.engines.pass_rows import BatchLayout
from hookmap.capture.rows import RowSelection
from hookmap.capture.run import Run, device_of, running, vocabulary_of
from hookmap.loading import generation as gen
from hookmap.loading.encoder_decoder import is_encoder_decoder
from hookmap.loading.encoder_prompts import as_decoder_reads
from hookmap.loading.float64 import as_it_was, in_float64
from hookmap.loading.further_inputs import signature
from hookmap.loading.memory import MemoryUse
from hookmap.loading.prompts import Prompt
from hookmap.loading.stopping import Finished
from hookmap.loading.wrappers import generation_config_of
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.selectors import select
from hookmap.stores.memory import MemoryStore

_LENGTHS = (3, 40)
"""tokens of the prompts that are padded"""
_LONGEST = 150
"""tokens of the prompt that runs with them, unless a mixer computes in longer chunks, of up to _LONGEST_CHUNK"""
_LONGEST_CHUNK = 512
_CHUNK = re.compile(r"chunk_?(size|length)|block_?size|window")
_SPECIAL = re.compile(r"token_(id|index)s?$")
_STEPS = 3
_SAME = 1e-5
"""relative distance of rows that is accepted without a run in float64: rounding in float32"""
_SAME_IN_FLOAT64 = 1e-7
_NOISE = 8
"""a distance of up to so many times the measured rounding is taken for rounding"""

Rows = Sequence[torch.Tensor]
"""of each prompt, [pos, d_model]"""


class Pads:
    """Results of the padding tests of one opened model, each run when first asked for."""

    def __init__(self, engine: Engine, architecture_map: ArchitectureMap, tokenizer: Any, forces: bool = True) -> None:
        """`forces`: whether a run can be made to generate given tokens; otherwise only the prompts are compared."""
        self._engine, self._map, self._tokenizer, self._forces = engine, architecture_map, tokenizer, forces
        self._found: dict[tuple[bool, bool, frozenset[str]], str | None] = {}
        self._lock = threading.Lock()

    def why_not(self, *, harvest: bool, pattern: bool = False, examples: Sequence[Prompt] = ()) -> str | None:
        """Why prompts of different lengths must not share a batch; None where it was shown that they may.

        A generation is padded on the left, a harvest on the right. pattern: whether the run captures attention weights,
        which needs the eager attention implementation. The first call of each kind runs a few tokens.
        examples: prompts with further inputs, of the same names; the shortest and the longest are tried, as themselves.
        """
        key = (harvest, pattern, signature(examples[0].inputs if examples else None))
        with self._lock:
            if key not in self._found:
                self._found[key] = self._tried(harvest, pattern, examples)
            return self._found[key]

    def _tried(self, harvest: bool, pattern: bool, examples: Sequence[Prompt]) -> str | None:
        if not harvest and not gen.takes(self._engine.root, "attention_mask"):
            return "its forward takes no attention mask"
        try:
            with lock_of(self._engine.module).exclusive(), running(self._engine, pattern):
                return _Trial(self._engine, self._map, self._tokenizer, harvest, self._forces, examples).fault()
        except Exception as error:  # the model's own code may raise anything
            said = " ".join(str(error).split())[:120]
            return f"a padded batch could not be tried ({type(error).__name__}: {said})"


def whole_batch_limit(config: Any) -> int | None:
    """The sequence length beyond which a row changes the other rows of its batch; None where no length does.

    Some rotary embeddings change their frequencies for the whole batch when one row is long.
    """
    text = config.get_text_config()
    found = getattr(text, "rope_parameters", None) or {}
    every = (found, *(value for value in found.values() if isinstance(value, dict)))
    return min(
        (
            each.get("original_max_position_embeddings") or text.max_position_embeddings
            for each in every
            if each.get("rope_type") in ("dynamic", "longrope")
        ),
        default=None,
    )


class _Trial:
    """Compares short prompts that run alone with the same prompts in a batch with a longer one."""

    def __init__(
        self,
        engine: Engine,
        architecture_map: ArchitectureMap,
        tokenizer: Any,
        harvest: bool,
        forces: bool = True,
        examples: Sequence[Prompt] = (),
    ) -> None:
        self._engine, self._tokenizer, self._harvest, self._forces = engine, tokenizer, harvest, forces
        read = "final_norm" if "final_norm" in architecture_map.model_points else "resid_post"
        self._selector = select(architecture_map, [read], [architecture_map.num_layers - 1], "last")[0]
        *self._short, self._long = _apart(examples) if examples else trial_prompts(engine)

    def fault(self) -> str | None:
        """How padding changes the rows, in words; None where it does not."""
        with _Widths() as chosen:
            alone = self._alone()
        if {len(prompt.encoder_token_ids or prompt.token_ids) for prompt in self._short} <= chosen.widths:
            return "its attention chooses among the keys, and pads change which of equal ones it takes"
        beside = self._beside()
        if _distance(beside, alone) <= _SAME:
            return None
        try:
            with in_float64(self._engine.root):
                exact, exact_beside = self._alone(), self._beside()
        except Exception:  # an operation has no float64: measure the rounding by a batch without pads
            return _beyond(_distance(beside, alone), _distance(self._twins(), alone), alone[0].dtype)
        seen = _distance(exact_beside, exact)
        if not seen <= _SAME_IN_FLOAT64:
            return f"pads change its rows by {seen:.1e} of their size, computed in float64"
        return _beyond(_distance(beside, exact), _distance(alone, exact), alone[0].dtype)

    def _alone(self) -> Rows:
        return self._rows(self._short, [[number] for number in range(len(self._short))])

    def _beside(self) -> Rows:
        every = [*self._short, self._long]
        return self._rows(every, [range(len(every))])[:-1]

    def _twins(self) -> Rows:
        count = len(self._short)
        return self._rows([*self._short, *self._short], [[n, n + count] for n in range(count)])[:count]

    def _rows(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[int]]) -> Rows:
        key = self._selector.key
        store, run = MemoryStore([key]), self._run(prompts)
        device = device_of(self._engine)
        cuda = range(torch.cuda.device_count()) if device.type == "cuda" else ()
        # Some models draw random numbers in forward, and hold state from their last run.
        with as_it_was(self._engine.module), torch.random.fork_rng(devices=list(cuda)):
            torch.manual_seed(0)
            for group in groups:
                run.batch(group, store)
        return [store.read(number, *key) for number in range(len(prompts))]

    def _run(self, prompts: Sequence[Prompt]) -> Run:
        selectors, memory = (self._selector,), MemoryUse()
        common = (self._engine, None, selectors, prompts, RowSelection(), frozenset[int](), None, memory)
        if self._harvest:
            return Harvesting(*common)
        new = _STEPS if self._forces else 1
        own = generation_config_of(self._engine.runner, self._engine.root)
        config = gen.settings(own, self._tokenizer, max_new_tokens=new, do_sample=False, options={})
        config.eos_token_id = None
        if not self._forces:
            return Generating(*common, max_new_tokens=new, config=config)
        return _Forced(*common, max_new_tokens=new, config=config)


class _Widths(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not type it
    """Notes how long the last axis is, of each tensor whose largest numbers are picked.

    Where it is as long as each prompt, keys are picked (DeepSeek's sparse attention). Scores behind a ReLU are often
    equal, and which of equal ones are picked depends on where they stand: too seldom for a trial of a few prompts.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.widths: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.topk.default, torch.ops.aten.sort.default, torch.ops.aten.sort.stable):
            self.widths.add(args[0].shape[-1])
        return func(*args, **(kwargs or {}))


class _Forced(Generating):
    """Generates the same tokens in every batch, so that a near tie of two logits cannot make two runs differ."""

    def _inputs(self, prompts: Sequence[Prompt], layout: BatchLayout, finished: Finished) -> dict[str, Any]:
        tokens = [prompt.token_ids[0] for prompt in prompts]
        return super()._inputs(prompts, layout, finished) | {"logits_processor": [_Only(tokens)]}


class _Only(LogitsProcessor):  # type: ignore[misc]  # transformers' base is not typed
    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        found = torch.full_like(scores, -float("inf"))
        found[range(len(self._tokens)), list(self._tokens)] = 0.0
        return found


def _apart(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The shortest and the longest, and the shortest again to run with them."""
    ordered = sorted(prompts, key=lambda prompt: prompt.size)
    return [ordered[0], ordered[-1], ordered[0]]


def trial_prompts(engine: Engine) -> list[Prompt]:
    """Two short prompts and a long one, of random tokens without special ones."""
    config: Any = engine.root.config
    settings = list(_settings(config.to_dict()))
    chunks = [n for name, n in settings if _CHUNK.search(name) and n <= _LONGEST_CHUNK]
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9
    longest = min(max([_LONGEST, *(n * 5 // 4 for n in chunks)]), most - _STEPS)
    special = {n for name, n in settings if _SPECIAL.search(name)}
    plain = [token for token in range(vocabulary_of(engine)) if token not in special]
    draw = torch.Generator().manual_seed(0)
    lengths = sorted({*(min(length, longest // 2) for length in _LENGTHS), longest})
    drawn = [torch.randint(len(plain), (length,), generator=draw).tolist() for length in lengths]
    prompts = [Prompt("", tuple(plain[n] for n in numbers)) for numbers in drawn]
    return [as_decoder_reads(each, engine.root) for each in prompts] if is_encoder_decoder(engine.root) else prompts


def _settings(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Name and value of every integer in a config."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _settings(item, str(key))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _settings(item, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


def _distance(found: Rows, expected: Rows) -> float:
    """The largest relative distance of a row. Each feature is scaled by its own size: a few features are far larger."""
    a, b = (torch.cat([rows.flatten(1) for rows in each]).double() for each in (found, expected))
    size = b.square().mean(0).sqrt().clamp_min(1e-30)
    return float((((a - b) / size).norm(dim=-1) / (b / size).norm(dim=-1).clamp_min(1e-30)).max())


def _beyond(found: float, noise: float, dtype: torch.dtype) -> str | None:
    if found <= _NOISE * noise:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"in {name} pads move its rows by {found:.1e} of their size, and rounding alone by {noise:.1e}"
