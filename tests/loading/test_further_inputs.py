"""What a sample brings besides its token ids, laid out for a batch: against the padded arrays written out by hand."""

import torch
from support import plain_hooks
from support.raises import raises

import hookmap
from hookmap.errors import CaptureError
from hookmap.loading.float64 import as_it_was
from hookmap.loading.further_inputs import FurtherInputs, joined, signature
from hookmap.loading.prompts import Prompt

CPU = torch.device("cpu")


def test_fields_of_tokens_are_padded_and_others_follow_one_another() -> None:
    one = {"kinds": torch.tensor([[1, 2]]), "pixels": torch.ones(1, 2, 2)}
    two = {"kinds": torch.tensor([[3, 4, 5]]), "pixels": torch.full((2, 2, 3), 2.0)}
    batch = [FurtherInputs.of(one), FurtherInputs.of(two)]
    left = joined(batch, [2, 3], [1, 0], CPU, torch.float64)
    assert left["kinds"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert left["pixels"].dtype == torch.float64
    assert left["pixels"].tolist() == [[[1, 1, 0], [1, 1, 0]], [[2, 2, 2], [2, 2, 2]], [[2, 2, 2], [2, 2, 2]]]
    right = joined(batch, [2, 3], [0, 0], CPU, torch.float32)
    assert right["kinds"].tolist() == [[1, 2, 0], [3, 4, 5]]
    assert joined([batch[0]], [2], [0], CPU, torch.float32)["pixels"].equal(one["pixels"])


def test_what_shares_a_batch_has_fields_of_the_same_names() -> None:
    assert signature(None) == frozenset() != signature(FurtherInputs.of({"pixels": torch.ones(1, 2)}))
    assert joined([None, None], [3, 4], [1, 0], CPU, torch.float32) == {}


def test_the_digest_is_of_names_shapes_and_numbers() -> None:
    fields = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([[1]])}
    same = FurtherInputs.of({"b": fields["b"].clone(), "a": fields["a"].clone()})
    assert FurtherInputs.of(fields) == same
    for other in ({**fields, "a": fields["a"].T}, {**fields, "b": fields["b"] + 1}, {"a": fields["a"]}):
        assert FurtherInputs.of(other) != same


def test_a_field_that_the_model_does_not_read_is_refused() -> None:
    hm = hookmap.open(plain_hooks.build("llama"))
    prompt = Prompt("", (5, 6), inputs=FurtherInputs.of({"pixel_values": torch.ones(1, 3, 4, 4)}))
    for new in (0, 2):
        with raises(CaptureError, "LlamaForCausalLM reads no pixel_values"):
            hm.capture(prompt, "resid_post", max_new_tokens=new)


def test_hooks_that_a_forward_pass_registers_are_taken_away_with_their_mark() -> None:
    """transformers registers hooks in the first pass that asks for hidden states of a tower, and marks the tower."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    seen: list[int] = []
    with as_it_was(module):
        module[0].register_forward_hook(lambda *_: seen.append(0))
        module.marked = True
        module(torch.ones(2))
    module(torch.ones(2))
    assert seen == [0] and not hasattr(module, "marked")
