"""Functions of one's own in requests: the server's operator names those that may be called, and no other is."""

import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.own_functions import BROKEN, TURNED, turned
from support.served import MESSAGES, demo, serving

import hookmap

pytestmark = pytest.mark.slow
APPLIED = {"do": "apply", "fn": TURNED, "point": "resid_post", "layers": [4]}


def test_a_function_that_is_allowed_is_called_and_no_other_is_imported(tmp_path: Path) -> None:
    own = hookmap.apply(turned, "resid_post", [4])
    plain, expected = (demo().capture([MESSAGES], (), max_new_tokens=16, interventions=given) for given in ((), [own]))
    assert plain.tokens != expected.tokens
    with serving(tmp_path, functions=(TURNED, BROKEN), admin_key="k") as served:

        def ask(*given: dict[str, Any]) -> httpx.Response:
            return served.chat(max_tokens=16, hookmap={"return": "none", "interventions": list(given)})

        assert ask(APPLIED).json()["choices"][0]["message"]["content"] == expected.texts[0]
        wrong = ask({**APPLIED, "fn": BROKEN})
        assert wrong.status_code == 500, "what the operator's function does is no fault of the request"
        assert ask(APPLIED).status_code == 200
        refused: list[Any] = ["wsgiref.validate:validator", "os:getcwd", f"{TURNED}.__globals__", "", None, 1, [TURNED]]
        for name in refused:
            answer = ask({**APPLIED, "fn": name})
            assert answer.status_code == 400 and "--function" in answer.text, name
        assert "wsgiref.validate" not in sys.modules
        assert ask({"do": "apply", "fn": TURNED}).status_code == ask({**APPLIED, "nonsense": 1}).status_code == 400

        served.headers = {"Authorization": "Bearer k"}
        put = httpx.put(
            f"{served.url}/v1/interventions", json={"interventions": [APPLIED]}, headers=served.headers, timeout=240
        )
        assert put.json()["data"][0]["fn"] == TURNED
        assert served.chat(max_tokens=16).json()["choices"][0]["message"]["content"] == expected.texts[0]


def test_a_server_that_allows_no_function_calls_none(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        answer = served.chat(hookmap={"return": "none", "interventions": [APPLIED]})
        assert answer.status_code == 400 and "--function" in answer.json()["error"]["message"]
