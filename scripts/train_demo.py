"""Train the bundled demo model, or measure one: ``python scripts/train_demo.py --help``.

A net of 20 narrow layers learns slowly from scratch on a processor, so it is grown: five layers learn the bare
calculations first, then each is followed by three copies of itself whose output projections are zero, so that the
20 layers compute what the five did, and all of them learn whole answers from there. Everything is seeded.
"""

import json
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hookmap.demo import MODEL_PATH
from hookmap.demo.problems import final_answer, sample_problems, stream

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CONTEXT = 1024

Row = tuple[list[int], int]

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Stage:
    """A stretch of training at one depth, with an optimizer of its own."""

    layers: int
    steps: int
    batch: int
    rate: float
    two_step_share: float
    #: Whether answers are bare calculations, without the words around them or system messages before them.
    bare: bool


#: The stages that made the bundled model.
STAGES: tuple[Stage, ...] = (
    Stage(layers=5, steps=500, batch=64, rate=3e-3, two_step_share=0.2, bare=True),
    Stage(layers=5, steps=1500, batch=64, rate=3e-3, two_step_share=0.6, bare=True),
    Stage(layers=20, steps=400, batch=32, rate=1.5e-3, two_step_share=0.6, bare=False),
)
#: A few examples open with a system message, so that one does not put the model off.
SYSTEM_SHARE = 0.1
SYSTEMS: tuple[str, ...] = ("You are a helpful assistant.", "Solve the problem step by step.", "Be brief.")
WARMUP = 50
#: The questions count a little: predicting them is how the first layers learn to read numbers and words.
QUESTION_WEIGHT = 0.1


def byte_symbols() -> list[str]:
    """The printable character that byte-level tokenizers write for each of the 256 bytes, in the bytes' order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: token ``i`` is byte ``i``, no merges, and three special tokens above."""
    core = Tokenizer(BPE(vocab={symbol: byte for byte, symbol in enumerate(byte_symbols())}, merges=[]))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = ByteLevelDecoder()
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (PAD, START, END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(layers: int, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A fresh model of the demo's width."""
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            initializer_range=0.1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            dtype="float32",
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # what a layer adds to the residual stream starts small, the smaller the more layers add to it
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.div_(math.sqrt(2 * layers))
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def grow(model: Qwen3ForCausalLM, layers: int, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A model of ``layers`` layers, a multiple of those there are, that computes what ``model`` does."""
    times, rest = divmod(layers, model.config.num_hidden_layers)
    if rest or times < 1:
        raise ValueError(f"cannot grow {model.config.num_hidden_layers} layers to {layers}")
    grown = build_model(layers, tokenizer)
    grown.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    grown.model.norm.load_state_dict(model.model.norm.state_dict())
    with torch.no_grad():
        for index, layer in enumerate(grown.model.layers):
            layer.load_state_dict(model.model.layers[index // times].state_dict())
            if index % times:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
    return grown


def without_words(answer_text: str) -> str:
    """A worked answer as bare calculations: ``Tom has 3+4=<<3+4=7>>7 apples.`` becomes ``3+4=<<3+4=7>>7``."""
    return re.sub(r"^\w+ (?:has|have) (\S+) .*$", r"\1", answer_text, flags=re.MULTILINE)


def encode(question: str, answer_text: str, tokenizer: PreTrainedTokenizerFast, system: str | None) -> Row:
    """The tokens of a question with its answer, and how many of them are the prompt's."""
    prompt_ids = tokenizer.encode(render(question, tokenizer, system), add_special_tokens=False)
    answer_ids = tokenizer.encode(answer_text + END, add_special_tokens=False)
    return prompt_ids + answer_ids, len(prompt_ids)


def render(question: str, tokenizer: PreTrainedTokenizerFast, system: str | None = None) -> str:
    """The chat prompt that asks a question."""
    chat = [{"role": "user", "content": question}]
    if system is not None:
        chat.insert(0, {"role": "system", "content": system})
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def rows(seed: int, stage: Stage, tokenizer: PreTrainedTokenizerFast) -> Iterator[Row]:
    """Yield the encoded training problems of a stage without end."""
    rng = random.Random(seed)
    for problem in stream(seed, "train", stage.two_step_share):
        if stage.bare:
            yield encode(problem.question, without_words(problem.answer_text), tokenizer, None)
        else:
            system = rng.choice(SYSTEMS) if rng.random() < SYSTEM_SHARE else None
            yield encode(problem.question, problem.answer_text, tokenizer, system)


def batches(seed: int, stage: Stage, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and loss weights without end, in batches of like length."""
    source = rows(seed, stage, tokenizer)
    rng = random.Random(seed)
    pad = tokenizer.pad_token_id
    while True:
        pool = sorted(islice(source, 32 * stage.batch), key=lambda row: len(row[0]))
        chunks = [pool[start : start + stage.batch] for start in range(0, len(pool), stage.batch)]
        rng.shuffle(chunks)
        for chunk in chunks:
            width = max(len(ids) for ids, _ in chunk)
            # padded on the right: with causal attention nothing before the padding can see it
            ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in chunk])
            weights = torch.tensor(
                [
                    [QUESTION_WEIGHT] * prompt + [1.0] * (len(row) - prompt) + [0.0] * (width - len(row))
                    for row, prompt in chunk
                ]
            )
            yield ids, weights


def train(model: Qwen3ForCausalLM, stage: Stage, seed: int, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Train ``model`` in place through one stage, saving it to ``out`` now and then."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=stage.rate,
        betas=(0.9, 0.98),
        fused=True,
    )

    def factor(step: int) -> float:
        """Linear warm-up, then a cosine down to a twentieth."""
        if step < WARMUP:
            return (step + 1) / WARMUP
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, stage.steps - WARMUP)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    began, mean = time.monotonic(), math.nan
    for step, (ids, weights) in enumerate(islice(batches(seed, stage, tokenizer), stage.steps), start=1):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        counted = weights[:, 1:].flatten()
        loss = (losses * counted).sum() / counted.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        answers = counted == 1.0
        answer_loss = float(losses.detach()[answers].mean())
        mean = answer_loss if math.isnan(mean) else 0.95 * mean + 0.05 * answer_loss
        if step % 20 == 0 or step == stage.steps:
            rate = (time.monotonic() - began) / step
            click.echo(
                f"layers {stage.layers} step {step}/{stage.steps} loss {float(loss.detach()):.4f} "
                f"answer loss {mean:.4f} {rate:.2f} s/step"
            )
        if step % 50 == 0 or step == stage.steps:
            save(model, tokenizer, out)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model and its tokenizer as one loadable folder."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def generate(
    model: Any, tokenizer: Any, questions: list[str], batch_size: int = 64, max_new_tokens: int = 128
) -> list[str]:
    """Greedy answers to questions, special tokens kept so that a missing end of text shows."""
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        prompts = [render(question, tokenizer) for question in questions[start : start + batch_size]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        answers.extend(tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=False))
    return answers


def evaluate(folder: Path, count: int, seed: int) -> dict[str, float | int]:
    """Measure a saved model on ``count`` different held-out problems; shares of them, not percentages."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    asked = sample_problems(count, seed, "heldout")
    answers = generate(model, tokenizer, [problem.question for problem in asked])
    right = [
        END in answer and final_answer(answer) == problem.answer for problem, answer in zip(asked, answers, strict=True)
    ]
    whole = sum(answer.split(END)[0] == problem.answer_text for problem, answer in zip(asked, answers, strict=True))
    # the best that can be done without reading the question: always give the commonest answer of the training data
    known = [problem.answer for problem in sample_problems(20_000, seed, "train")]
    commonest = max(sorted(set(known)), key=known.count)
    result: dict[str, float | int] = {
        "problems": count,
        "accuracy": sum(right) / count,
        "whole_answer_right": whole / count,
        "stopped_by_itself": sum(END in answer for answer in answers) / count,
        "chance_commonest_answer": sum(problem.answer == commonest for problem in asked) / count,
    }
    for steps in (1, 2):
        of_steps = [ok for problem, ok in zip(asked, right, strict=True) if problem.steps == steps]
        result[f"accuracy_{steps}_step"] = sum(of_steps) / max(1, len(of_steps))
    return result


@click.command(help=__doc__)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder to write the trained model to.")
@click.option("--seed", default=0, show_default=True, help="Seeds the weights and the problems.")
@click.option(
    "--first-stage",
    type=click.IntRange(1, len(STAGES)),
    default=1,
    show_default=True,
    help="Start from the model that the stage before has left in --out.",
)
@click.option("--threads", default=1, show_default=True, help="Threads; another number rounds differently.")
@click.option("--evaluate", "only_evaluate", is_flag=True, help="Measure a model instead of training one.")
@click.option(
    "--model", type=click.Path(path_type=Path), default=MODEL_PATH, help="The model to measure (default: the bundled)."
)
@click.option("--problems", "count", default=1000, show_default=True, help="How many held-out problems to measure on.")
@click.option("--problem-seed", default=12345, show_default=True, help="Seeds the held-out problems.")
def main(
    out: Path | None,
    seed: int,
    first_stage: int,
    threads: int,
    only_evaluate: bool,
    model: Path,
    count: int,
    problem_seed: int,
) -> None:
    """Command line of the module."""
    torch.set_num_threads(threads)
    if not only_evaluate:
        if out is None:
            raise click.UsageError("give --out DIR, or --evaluate")
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        if first_stage == 1:
            trained = build_model(STAGES[0].layers, tokenizer)
        else:
            trained = Qwen3ForCausalLM.from_pretrained(out)
        for number, stage in enumerate(STAGES[first_stage - 1 :], start=first_stage - 1):
            trained = grow(trained, stage.layers, tokenizer)
            train(trained, stage, 1000 * seed + number, tokenizer, out)
        model = out
    click.echo(json.dumps(evaluate(model, count, problem_seed), indent=2))


if __name__ == "__main__":
    main()
