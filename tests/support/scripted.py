"""A model that says, at each position, what a table says: a real one, whose weights are set by hand.

Its blocks add nothing to the stream, its token embedding is zero, and each position's embedding is the token to say.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import hookmap
from hookmap.demo import MODEL_PATH
from hookmap.model import HookedModel

TOOL_TEMPLATE = """\
{%- if tools %}<|im_start|>system
Tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}
Write <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>
{% endif -%}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def scripted(answers: Mapping[str, str], positions: int = 2048) -> HookedModel:
    """`answers`: prompt, as the template writes it -> what is said behind it. The prompts differ in length."""
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_PATH)
    tokenizer.chat_template, size = TOOL_TEMPLATE, 260
    config = GPT2Config(
        vocab_size=size, n_embd=size, n_layer=1, n_head=4, n_positions=positions, tie_word_embeddings=False
    )
    config.bos_token_id = config.pad_token_id = None
    config.eos_token_id = tokenizer.eos_token_id
    model = GPT2LMHeadModel(config).eval()
    says = torch.zeros(positions, size)
    for prompt, answer in answers.items():
        place = len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) - 1
        tokens = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert not says[place : place + len(tokens)].any(), "two answers at one position"
        says[torch.arange(place, place + len(tokens)), tokens] = 1.0
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "ln_" not in name:
                weights.zero_()
        model.transformer.wpe.weight.copy_(says)
        model.lm_head.weight.copy_(3 * torch.eye(size))
    return hookmap.open(model, tokenizer=tokenizer)
