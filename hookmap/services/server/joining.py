"""Whether requests may join a batch that runs: shown on the opened model, and decided for each request."""

import weakref

import torch

from hookmap.capture.engines.model_lock import lock_of
from hookmap.capture.padding import trial_prompts
from hookmap.capture.run import reads_attention, running
from hookmap.loading import generation as gen
from hookmap.maps.points import PointName, is_place
from hookmap.maps.selectors import Selector
from hookmap.model import HookedModel
from hookmap.services.server.jobs import Job
from hookmap.services.server.row_batch import RowBatch, why_no_rows

_BY_ROW = frozenset("repetition_penalty no_repeat_ngram_size min_new_tokens stop_strings".split())
"""settings that read a row's own tokens, which each row of a running batch has by itself"""
_NOISE = 8
"""a distance of up to so many times the measured rounding is taken for rounding"""
_SAME = 1e-5


def why_no_joins(hm: HookedModel) -> str | None:
    """Why requests of this model join no batch that runs; None where it was shown that they may.

    The first call for a model runs it.
    """
    if hm.hooks.root not in _FOUND:
        _FOUND[hm.hooks.root] = _shown(hm)
    return _FOUND[hm.hooks.root]


_FOUND: "weakref.WeakKeyDictionary[torch.nn.Module, str | None]" = weakref.WeakKeyDictionary()


def _shown(hm: HookedModel) -> str | None:
    if hm.hooks.exclusive:
        return "a wrapper around it changes it while it runs"
    if (why := why_no_rows(hm.hooks.root)) is not None:
        return why
    if (why := hm.why_no_pads) is not None:
        return why
    try:
        with lock_of(hm.hooks.module).exclusive(), running(hm.hooks):
            return tried(hm)
    except Exception as error:  # the model's own code may raise anything
        said = " ".join(str(error).split())[:120]
        return f"it could not be tried ({type(error).__name__}: {said})"


def tried(hm: HookedModel) -> str | None:
    """How rows that join, leave and follow each other differ from their text alone, read without a cache.

    None where they do not. The caller holds the model's lock.
    """
    root = hm.hooks.root
    fed, prompts = 3, [list(prompt.token_ids) for prompt in trial_prompts(hm.hooks)]
    texts = [[*prompt, *prompts[-1][:fed]] for prompt in prompts]
    expected = [_whole(root, text) for text in texts]
    alone, joined = list[float](), list[float]()

    def compare(found: torch.Tensor, rows: list[tuple[int, int]], into: list[float]) -> None:
        for got, (text, place) in zip(found, rows, strict=True):
            into.append(_distance(got, expected[text][place]))

    for number, text in enumerate(texts):  # one by itself: what rounding does
        batch, length = RowBatch(root), len(text) - fed
        logits, read = batch.read([text[:length]])
        compare(logits, [(number, length - 1)], alone)
        batch.join(read, [length])
        for place in range(length, len(text)):
            compare(batch.step([text[place]]), [(number, place)], alone)
    batch, rows = RowBatch(root), list[list[int]]()  # (text, its next place)
    # One joins, then two that are read together.
    for numbers in ([1], [2, 0]) if len(texts) > 2 else ([number] for number in range(len(texts))):
        lengths = [len(texts[number]) - fed for number in numbers]
        logits, read = batch.read([texts[number][:length] for number, length in zip(numbers, lengths, strict=True)])
        compare(logits, [(number, length - 1) for number, length in zip(numbers, lengths, strict=True)], joined)
        batch.join(read, lengths)
        rows += [[number, length] for number, length in zip(numbers, lengths, strict=True)]
        for _ in range(fed - 1):
            going = [row for row in rows if row[1] < len(texts[row[0]])]
            for row in [row for row in rows if row not in going]:
                place = rows.index(row)
                batch.leave(place)
                rows[place] = rows[-1]
                rows.pop()
            logits = batch.step([texts[n][place] for n, place in rows])
            compare(logits, [(n, place) for n, place in rows], joined)
            for row in rows:
                row[1] += 1
    if max(joined) <= max(_SAME, _NOISE * max(alone)):
        return None
    return f"rows that join others differ by {max(joined):.1e} of their size, and rounding alone by {max(alone):.1e}"


def _whole(root: torch.nn.Module, text: list[int]) -> torch.Tensor:
    ids = torch.tensor([text], device=root.get_input_embeddings().weight.device)  # type: ignore[operator]
    with torch.no_grad():
        logits: torch.Tensor = root(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0].float()


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def why_alone(job: Job, hm: HookedModel) -> str | None:
    """Why a request runs by itself, on a model whose requests may join each other; None where it joins them."""
    if any(prompt.inputs is not None for prompt in job.prompts):
        return "images"
    if job.echo or job.reads_only:
        return "it reads the scores of its prompt"
    if gen.unserved(job.config, gen.OF_ONE_ROW | _BY_ROW):
        return "a setting of its generation is not of one row"
    read = (*(job.recorder.selectors if job.recorder else ()), *(job.summary.selectors if job.summary else ()))
    written = [s for each in job.interventions for s in hm.map.selectors([each.point], each.layers, each.calls)]
    if any(map(_of_batch, (*read, *written))) or reads_attention((*read, *written)):
        return "what it reads or writes is not of one row"
    return None


def _of_batch(selector: Selector) -> bool:
    """Whether a tensor holds more than a row for each token that is fed, or is computed for some tokens only."""
    more = any(term.rows != "all" or term.operation is not None for term in selector.terms)
    return more or is_place(selector.point) or "d_vocab" in PointName.of(selector.point).definition.axes
