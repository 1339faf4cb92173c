"""Requests that nobody would think of: none is answered with 5xx, or with a status or a body that the OpenAPI document
does not name, and none reaches a file outside of the folder of the sessions.
"""

import contextlib
import http.client
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.served import Served, serving

schemathesis = pytest.importorskip("schemathesis", reason="requests are made by schemathesis")
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

pytestmark = pytest.mark.slow

log = logging.getLogger("hookmap.tests")
EXAMPLES = int(os.environ.get("HOOKMAP_EXAMPLES", "8"))
"""for each route; HOOKMAP_EXAMPLES=1000 looks longer"""
LOOK = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="HOOKMAP_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SECRET = b"a file outside of the sessions"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    with serving(folder / "sessions", max_new_tokens=3, admin_key="k", queue=500) as found:
        found.headers = {"Authorization": "Bearer k"}
        yield found


def try_out(operation: Any, headers: dict[str, str]) -> Counter[int]:
    """Requests of one route. Returns how often each status came."""
    statuses: Counter[int] = Counter()

    @LOOK
    @given(case=operation.as_strategy())
    def look(case: Any) -> None:
        answer = case.call(headers=headers)
        statuses[answer.status_code] += 1
        # Its schema does not say all that a request must be: that is refused with 400, a refusal is no fault.
        case.validate_response(answer, headers=headers, excluded_checks=[positive_data_acceptance])

    look()
    return statuses


def test_no_request_of_the_schema_is_answered_with_5xx_or_with_what_the_schema_does_not_name(served: Served) -> None:
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json", headers=dict(served.headers))
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 18
    for operation in operations:
        log.info("%s: %s", operation.label, dict(try_out(operation, served.headers)))
    served.idle()
    assert served.chat(max_tokens=1).status_code == 200, "it is as well as before"


NAMES = "..|.|%2e%2e|..%2f|..%5c|%00|%c0%ae%c0%ae|outside|secret|sessions|.server|~|act-".split("|")
PATHS = st.lists(st.one_of(st.sampled_from(NAMES), st.text(max_size=5).map(quote)), min_size=1, max_size=6)
NUMBERS = st.one_of(st.integers(-3, 200), st.integers(), st.sampled_from(["", "nan", "1e9", "0x1", "../..", "\x00"]))
POINTS = st.one_of(
    st.sampled_from(["resid_mid", "resid_mid.0", "../../outside/secret", "/etc/passwd", "blocks.8.hook_resid_mid"]),
    st.text(max_size=8),
)
RANGES = st.one_of(
    st.builds("bytes={}-{}".format, st.integers(0, 9000), st.one_of(st.just(""), st.integers(0, 9000))),
    st.builds("bytes=-{}".format, st.integers(0, 10**30)),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
)


@pytest.fixture(scope="module")
def session(served: Served) -> str:
    """A session of one tensor; beside the folder of all lies a file that nobody may read or remove."""
    outside = served.root.parent / "outside"
    outside.mkdir()
    for name in ("secret", "manifest.json"):
        (outside / name).write_bytes(SECRET)
    record = {"points": ["resid_mid"], "layers": [8]}
    return str(served.chat(max_tokens=2, hookmap=record).json()["session_id"])


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and what is in it."""
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def sent(served: Served, method: str, path: str, **headers: str) -> tuple[int, bytes]:
    """As it stands: this client tidies no path up."""
    with contextlib.closing(http.client.HTTPConnection(served.url.removeprefix("http://"))) as connection:
        connection.request(method, path, headers={**served.headers, **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()


@settings(LOOK, max_examples=20 * EXAMPLES)
@given(method=st.sampled_from(["GET", "DELETE"]), parts=PATHS, tail=st.sampled_from(["", "/tensors?point=resid_mid"]))
def test_no_id_reaches_a_file_outside_the_folder(
    served: Served, session: str, method: str, parts: list[str], tail: str
) -> None:
    before = files(served.root.parent)
    for route in ("session", "sessions"):
        status, body = sent(served, method, f"/v1/activations/{route}/{'/'.join(parts)}{tail}")
        assert status in (400, 404, 405) and SECRET not in body
    assert files(served.root.parent) == before, "nothing was removed or written"


@settings(LOOK, max_examples=20 * EXAMPLES)
@given(point=POINTS, layer=NUMBERS, choice=NUMBERS, start=NUMBERS, stop=NUMBERS, part=RANGES)
def test_a_download_gives_rows_of_its_session_or_a_refusal(
    served: Served, session: str, point: str, layer: Any, choice: Any, start: Any, stop: Any, part: str
) -> None:
    query = {"point": point, "layer": layer, "choice": choice, "start": start, "stop": stop}
    for given_ in (query, {**query, "point": "resid_mid", "layer": 8, "choice": 0}):
        path = f"/v1/activations/sessions/{session}/tensors?{urlencode(given_)}"
        status, whole = sent(served, "GET", path)
        assert status in (200, 400, 404) and SECRET not in whole
        ranged, body = sent(served, "GET", path, Range=part)
        if status == 200:
            assert ranged in (200, 206, 416)
            assert body in whole, "a part is a part"
        else:
            assert (ranged, body) == (status, whole)
