"""Interventions of a request: checked against the model. No path that a client names is opened for them."""

from collections.abc import Container, Sequence
from typing import Any

from hookmap.capture.interventions.documents import (
    TENSORS,
    Function,
    Intervention,
    PicturedText,
    Source,
    VectorFile,
    read_interventions,
)
from hookmap.capture.interventions.functions import apply
from hookmap.capture.interventions.plan import EditPlan, plan_edits
from hookmap.datasets.messages import has_images
from hookmap.errors import HookmapError, InterventionError
from hookmap.loading.chat_template import Templating
from hookmap.loading.prompts import Prompt
from hookmap.model import HookedModel
from hookmap.services.server.errors import ApiError, bad
from hookmap.services.server.sessions import Sessions

PARAM = "hookmap.interventions"
Documents = Sequence[dict[str, Any]]


def read(
    given: Documents, hm: HookedModel, sessions: Sessions, functions: Container[str] = ()
) -> tuple[Intervention, ...]:
    """Parse interventions, and check their points and layers against the model. Raises ApiError.

    `source: {store: ID}` names a session; files are refused. `functions`: those that `{do: apply, fn: NAME}` may name.
    """
    try:
        found = tuple(_within(each, sessions) for each in _parsed(given, functions))
        for each in found:
            hm.map.selectors([each.point], each.layers, each.calls)
    except HookmapError as error:
        raise _refused(error) from error
    return found


def planned(hm: HookedModel, given: Sequence[Intervention], prompts: Sequence[Prompt], max_new_tokens: int) -> EditPlan:
    """Plan what they write on these prompts. The model may have to run for it. Raises ApiError."""
    try:
        return plan_edits(hm, given, prompts, max_new_tokens, Templating(generates=max_new_tokens > 0))
    except HookmapError as error:
        raise _refused(error) from error


def described(given: Documents) -> list[dict[str, Any]]:
    """Interventions that `read` has let through as JSON, with every field."""
    found = _parsed(given, [document.get("fn") for document in given])
    return [
        {**each.model_dump(mode="json", exclude={"fn"}), **({"fn": document["fn"]} if "fn" in document else {})}
        for each, document in zip(found, given, strict=True)
    ]


def _parsed(given: Documents, functions: Container[Any]) -> tuple[Intervention, ...]:
    return read_interventions([_function(each, functions) or each for each in given])


def _function(document: Any, functions: Container[Any]) -> Function | None:
    """What a document names as a function; None where it is another intervention. Nothing else is imported."""
    if not isinstance(document, dict) or document.get("do") != "apply":
        return None
    name, rest = document.get("fn"), {key: value for key, value in document.items() if key not in ("do", "fn")}
    if not isinstance(name, str) or name not in functions:
        told = "" if name is None else f"{str(name)[:200]!r} "
        raise InterventionError(
            f'apply: {told}is no function that this server calls. Give "fn", one of those that its operator allows: '
            "hookmap serve --function package.module:name"
        )
    try:
        return apply(name, **rest)
    except TypeError as error:
        raise InterventionError(f"apply: {error}") from error


def in_words(given: Sequence[Intervention]) -> list[str]:
    """Each intervention by its kind and place, as `scale of resid_post, layers 8`."""
    found = []
    for each in given:
        layers = each.layers if isinstance(each.layers, str) else ", ".join(map(str, each.layers))
        found.append(f"{each.do} of {each.point}, layers {layers}")
    return found


def _refused(error: HookmapError) -> ApiError:
    return bad(str(error), PARAM, getattr(error, "code", None) or type(error).__name__)


def _within(given: Intervention, sessions: Sessions) -> Intervention:
    for name in TENSORS:
        if isinstance(getattr(given, name, None), VectorFile):
            raise bad(f"{name}: the server reads no files for a request; send the numbers.", PARAM)
    source = getattr(given, "source", None)
    pictured = isinstance(source, Source) and (
        isinstance(source.prompt, PicturedText) or (isinstance(source.prompt, tuple) and has_images(source.prompt))
    )
    if pictured:
        raise bad("source.prompt: no image is read there; send text.", PARAM)
    if isinstance(source, Source) and source.store is not None:
        folder = str(sessions.folder(source.store))
        return given.model_copy(update={"source": source.model_copy(update={"store": folder})})
    return given
