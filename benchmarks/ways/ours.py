"""hookmap."""

from collections.abc import Callable

import torch

from ways.work import RIGHT, WRONG, Tensor, Ways, Work, plain


def hookmap(work: Work) -> Ways:
    import hookmap

    hm = hookmap.open(plain(work.folder))
    vector = torch.ones(hm.map.d_model)
    steer = hookmap.apply(lambda rows, at: rows + vector, point="resid_post", layers=work.at)
    dictionary = hookmap.load_dictionary(work.dictionary)
    ids, batch = work.prompt.tolist(), work.batch.tolist()
    pair = hookmap.Pair(work.clean[0].tolist(), work.corrupted[0].tolist(), RIGHT, WRONG)

    def capture() -> Callable[[], Tensor]:
        run = hm.capture(ids, "resid_post", work.few, work.new)
        return lambda: torch.stack([run["resid_post", layer][0, -1] for layer in work.few])

    def steering() -> Callable[[], Tensor]:
        made = hm.generate(ids, [steer], max_new_tokens=work.new)
        return lambda: torch.tensor(made.samples[0].token_ids[-work.new :])

    def harvest() -> Callable[[], Tensor]:
        run = hm.capture(batch, "resid_post", "all", 0)
        return lambda: torch.stack([run["resid_post", layer] for layer in range(work.layers)])

    def gradients() -> Callable[[], Tensor]:
        found = hm.gradients(ids, lambda logits, at: logits[..., -1, RIGHT], points="resid_post")
        return lambda: torch.cat([found["resid_post", layer] for layer in range(work.layers)])

    def sweep() -> Callable[[], Tensor]:
        found = hm.sweep([pair], point="resid_pre", layers=work.swept, batch_size=len(work.cells))
        return lambda: found.values.flatten()

    def features() -> Callable[[], Tensor]:
        run = hm.capture(batch, "features", work.at, 0, dictionaries=[dictionary])
        return lambda: torch.stack([one.to_dense() for one in run["features", work.at]])

    return {"capture": capture, "steering": steering, "harvest": harvest, "gradients": gradients, "sweep": sweep,
            "features": features}  # fmt: skip
