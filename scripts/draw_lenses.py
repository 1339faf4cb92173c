"""Draws the pictures of docs/lenses.md that are of the bundled demo model: `python scripts/draw_lenses.py`."""

from pathlib import Path
from typing import Any

import hookmap
from hookmap.analysis.charts import attention, bars, save_picture
from hookmap.demo import MODEL_PATH

QUESTION = "Tom has 3 apples. He buys 4 more. How many apples does Tom have?"
ANSWER = "Tom has 3+4=<<3+4="
LAYER = 12


def tokens(hm: Any) -> list[int]:
    """The question through the chat template, and the answer up to where the model has to know the sum."""
    chat = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    return list(hm.encode(chat, continue_final_message=True)[0].token_ids)


def charts() -> dict[str, Any]:
    """File name -> chart."""
    hm = hookmap.open(MODEL_PATH)
    prompt = tokens(hm)
    run = hm.capture([prompt], "pattern", LAYER, max_new_tokens=0)
    weights, letters = run["pattern", LAYER][0], [hm.tokenizer.decode([token]) for token in prompt]
    shown = weights[:, -18:, -18:]
    return {
        "attribution.svg": bars(hm.attribute(prompt, against="8")),
        "attention.svg": attention(shown, letters[-18:], title=f"Attention of layer {LAYER}, the last 18 tokens"),
    }


if __name__ == "__main__":
    folder = Path(__file__).resolve().parent.parent / "docs" / "images"
    for name, chart in charts().items():
        print(save_picture(chart, folder / name))
