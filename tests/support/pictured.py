"""Tiny models that read images, as folders that save_pretrained wrote, each with its real processor; and images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from PIL import Image
from support.plain_hooks import VOCABULARY, redrawn
from support.tiny_tokenizer import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> "
    "{% if m['content'] is string %}{{ m['content'] }} {% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %} {% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_EYE = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
    "num_hidden_layers": 1,
}  # fmt: skip
_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SIZE = {"height": 16, "width": 16}


def image(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    """Random colours."""
    numbers = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(numbers)


def message(*parts: Any, role: str = "user") -> list[dict[str, Any]]:
    """One message of texts and images: a str is a text, all else an image."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return [{"role": role, "content": content}]


def tokenizer(**special: str) -> Any:
    """Of whole words; the names of the special tokens that a processor asks for, with ids from 80 on."""
    tokens = [*special.values(), *_IDEFICS_MARKS]
    names = ["<pad>", "<s>", "</s>", *WORDS]
    names += [f"w{n}" for n in range(80 - len(names))] + list(dict.fromkeys(tokens))
    names += [f"v{n}" for n in range(VOCABULARY - len(names))]
    core = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>",
        extra_special_tokens=special,
    )  # fmt: skip
    made.add_special_tokens({"additional_special_tokens": list(_IDEFICS_MARKS)}, replace_extra_special_tokens=False)
    return made


_IDEFICS_MARKS = (
    "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
    *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)),
)  # fmt: skip


def _llava() -> tuple[Any, Any]:
    own = tokenizer(image_token="<image>")
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=_SIZE), own, patch_size=4,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )  # fmt: skip
    eye = {**_EYE, "model_type": "clip_vision_model", "num_hidden_layers": 2, "projection_dim": 32}
    config = tf.LlavaConfig(
        text_config={**_TEXT, "model_type": "llama"}, vision_config=eye, image_token_index=own.image_token_id,
        image_seq_length=16,
    )  # fmt: skip
    return config, processor


def _gemma3() -> tuple[Any, Any]:
    own = tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    processor = tf.Gemma3Processor(
        tf.Gemma3ImageProcessorPil(size=_SIZE), own, image_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "<start_of_image>"),
    )  # fmt: skip
    config = tf.Gemma3Config(
        text_config={**_TEXT, "sliding_window": 16}, vision_config=_EYE, mm_tokens_per_image=4,
        boi_token_index=own.boi_token_id, eoi_token_index=own.eoi_token_id, image_token_index=own.image_token_id,
    )  # fmt: skip
    return config, processor


def _idefics3() -> tuple[Any, Any]:
    own = tokenizer(image_token="<image>")
    pictures = tf.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = tf.Idefics3Processor(pictures, own, image_seq_len=4, chat_template=TEMPLATE.replace("IMAGE", "<image>"))
    config = tf.Idefics3Config(
        text_config={**_TEXT, "model_type": "llama"}, vision_config=_EYE, image_token_id=own.image_token_id,
        scale_factor=2,
    )  # fmt: skip
    return config, processor


def _paligemma() -> tuple[Any, Any]:
    own = tokenizer(image_token="<image>")
    pictures = tf.SiglipImageProcessorPil(size=_SIZE)
    pictures.image_seq_length = 16
    processor = tf.PaliGemmaProcessor(pictures, own)
    config = tf.PaliGemmaConfig(
        text_config={**_TEXT, "model_type": "gemma"}, vision_config={**_EYE, "model_type": "siglip_vision_model"},
        image_token_index=own.image_token_id, projection_dim=32,
    )  # fmt: skip
    return config, processor


PICTURED: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": _llava,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "paligemma": _paligemma,
}


def save(name: str, folder: Path) -> Path:
    """The family's checkpoint: model, tokenizer and processor."""
    config, processor = PICTURED[name]()
    torch.manual_seed(7)
    redrawn(tf.AutoModelForImageTextToText.from_config(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
