"""`hookmap serve`: an OpenAI-compatible API that also records activations. Start in `app.py`, which names every route.

The way of a request: `requests` (its fields) -> `chat` or `completions` (its prompt) -> `admission` (limits; a job) ->
`scheduler` (its turn) -> `running_batch`, which it joins, or where it cannot `shared_run` and `watched_run` -> `text`
(what may be sent) -> `streaming`.
"""

from hookmap.errors import HookmapError

EXTRA = 'pip install "hookmap[server]"'


def check_installed() -> None:
    """Raises HookmapError with the command to type, where the packages of the server are missing."""
    from importlib.util import find_spec

    needed = ("fastapi", "uvicorn", "openai", "prometheus_client")
    if missing := [name for name in needed if find_spec(name) is None]:
        are = "is" if len(missing) == 1 else "are"
        raise HookmapError(f"the server needs {', '.join(missing)}, which {are} not installed: {EXTRA}")
