"""vLLM's settings of a request, which hookmap gives in full. Imports vLLM."""

from typing import Any

from vllm import SamplingParams


class OwnParameters(SamplingParams):  # type: ignore[misc]  # vLLM is not typed
    """Nothing of vLLM's own defaults is added to them."""

    def update_from_generation_config(self, generation_config: dict[str, Any], eos_token_id: int | None = None) -> None:
        """Not the ends of the model and its tokenizer, which `min_tokens` would forbid where others were given."""
