"""A running server for each file of tests, with the demo model."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from support.served import Served


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Served]":
    """With the settings that `serving` gives; a file that needs others overrides this."""
    pytest.importorskip("fastapi", reason='pip install "hookmap[server]"')
    from support.served import serving

    with serving(tmp_path_factory.mktemp("sessions")) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: "Served") -> Iterator[Any]:
    """OpenAI's own client of that server."""
    from openai import OpenAI

    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found
