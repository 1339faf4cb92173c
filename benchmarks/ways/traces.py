"""nnsight, and nnterp on it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ways.work import RIGHT, Tensor, Ways, Work, difference, plain


def nnsight(work: Work) -> Ways:
    """Its own `NNsight` over the model, by the paths of modules."""
    import nnsight

    model = plain(work.folder)
    tree, made = nnsight.NNsight(model), list[Tensor]()
    return of_traces(
        work,
        generate=tree.trace,
        given=(None,),
        how={"fn": lambda _: made.append(model.generate(work.prompt, **work.generate))},
        reading=lambda ids, **options: tree.trace(ids, use_cache=False, **options),
        outputs=Outputs(tree.model.layers, "output"),
        inputs=Outputs(tree.model.layers, "input"),
        logits=lambda: tree.output.logits,
        made=made,
        width=model.config.hidden_size,
    )


def nnterp(work: Work) -> Ways:
    """Its standardised names, in nnsight's traces."""
    from nnterp import StandardizedTransformer

    model = StandardizedTransformer(work.folder, dtype=torch.float32, device_map="cpu")
    model._model.requires_grad_(False)
    made: list[Tensor] = []
    model.generator._module.register_forward_hook(lambda module, given, output: made.append(output))
    return of_traces(
        work,
        generate=model.generate,
        given=(work.prompt,),
        how=work.generate,
        reading=lambda ids, **options: model.trace(ids, use_cache=False, **options),
        outputs=model.layers_output,
        inputs=model.layers_input,
        logits=lambda: model.logits,
        made=made,
        width=model.hidden_size,
    )


@dataclass(frozen=True)
class Outputs:
    """The blocks' inputs or outputs, read and written by number, as nnterp has them."""

    blocks: Any
    side: str

    def __getitem__(self, layer: int) -> Any:
        return getattr(self.blocks[layer], self.side)

    def __setitem__(self, layer: int, value: Any) -> None:
        setattr(self.blocks[layer], self.side, value)


def of_traces(
    work: Work,
    *,
    generate: Callable[..., Any],
    given: tuple[Any, ...],
    how: dict[str, Any],
    reading: Callable[..., Any],
    outputs: Any,
    inputs: Any,
    logits: Callable[[], Any],
    made: list[Tensor],
    width: int,
) -> Ways:
    """What nnsight's traces do: `nnsight` and `nnterp` differ in the names alone."""
    import nnsight

    vector = torch.ones(width)

    def capture() -> Callable[[], Tensor]:
        with generate(*given, **how) as tracer:  # nnsight reads the lines of this block: it begins here
            rows = nnsight.save([])
            for _ in tracer.iter[:]:
                for layer in work.few:
                    rows.append(outputs[layer].clone())
        assert len(rows) == work.new * len(work.few)
        return lambda: torch.stack([row[0, -1] for row in rows[-len(work.few) :]])

    def steering() -> Callable[[], Tensor]:
        with generate(*given, **how) as tracer:  # nnsight reads the lines of this block: it begins here
            for _ in tracer.iter[:]:
                outputs[work.at] = outputs[work.at] + vector
        return lambda: made[-1][0, -work.new :]

    def harvest() -> Callable[[], Tensor]:
        with torch.no_grad(), reading(work.batch) as tracer:
            rows = nnsight.save([])
            for layer in range(work.layers):
                rows.append(outputs[layer].clone())
            tracer.stop()
        return lambda: torch.stack(list(rows))

    def gradients() -> Callable[[], Tensor]:
        with reading(work.prompt):
            inputs[0].requires_grad_(True)
            rows = nnsight.save([])
            for layer in range(work.layers):
                rows.append(outputs[layer])
            logit = logits()[0, -1, RIGHT].save()
        found = torch.autograd.grad(logit, list(rows))
        return lambda: torch.cat(found)

    def sweep() -> Callable[[], Tensor]:
        """By hand, all cells in one batch: it has no sweep of its own."""
        with torch.no_grad(), reading(work.clean) as tracer:
            kept = nnsight.save({})
            for layer in work.swept:
                kept[layer] = inputs[layer].clone()
            tracer.stop()
        with torch.no_grad(), reading(work.many_corrupted, logits_to_keep=1):
            for layer in work.swept:
                inputs[layer] = work.written(inputs[layer], layer, kept[layer])
            last = logits().save()
        return lambda: difference(last[:, -1])

    return {"capture": capture, "steering": steering, "harvest": harvest, "gradients": gradients, "sweep": sweep}
