"""vLLM's `AsyncLLM`, which serves the requests of many runs at once: each run has a channel, and may have a thread.

With data parallel it has several engines. A request is in one of them, which hookmap chooses, and so are its rows.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from torch import nn

from hookmap.errors import CaptureError
from hookmap.vllm.engine import HEALTH, Ended, VllmEngine, asked_of, prepared
from hookmap.vllm.spec import NAME, RequestSpec
from hookmap.vllm.stages import Taken

LOOK = 0.2
"""seconds after which a run that waits for its requests looks whether it is to go on"""


def new_loop() -> asyncio.AbstractEventLoop:
    """An event loop that runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="vLLM", daemon=True).start()
    return loop


def in_loop(loop: asyncio.AbstractEventLoop, source: str, settings: dict[str, Any]) -> Any:
    """An AsyncLLM whose outputs are read in this loop."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(source, **{"disable_log_stats": True, **settings}))

    async def begin() -> None:
        llm._run_output_handler()

    asyncio.run_coroutine_threadsafe(begin(), loop).result()
    return llm


class SharedEngine(VllmEngine):
    """An `AsyncLLM` of vLLM with hookmap's worker. Every method may be called from any thread but the loop's."""

    exclusive = False

    def __init__(self, llm: Any, loop: asyncio.AbstractEventLoop, module: nn.Module) -> None:
        """`loop`: where the outputs of `llm` are read."""
        self._loop = loop
        self.engines = len(llm.engine_core.core_engines)
        self._running, self._given = [0] * self.engines, [0] * self.engines
        """requests that run in each engine, and that were ever given to it"""
        self._engine_of: dict[str, int] = {}
        """of requests that ask for something, until their rows are taken or dropped"""
        self._choosing = threading.Lock()
        super().__init__(llm, module)
        self.lock = contextlib.nullcontext()  # type: ignore[assignment]  # each run has a channel

    def channel(self, told: Callable[[str, Any], None]) -> "Channel":  # type: ignore[override]
        """See `VllmEngine.channel`."""
        return Channel(self, told)

    def follow(self, name: str, prompt: Any, parameters: Any, arrived: Callable[[str, Any], None]) -> None:
        """Put a request in the queue. `arrived` is called in the loop, with its outputs, or an exception at the end."""

        generate = type(self._llm).generate
        generate = getattr(generate, "plain", generate)  # a server's is for its clients
        where = self.chosen(name)

        async def run() -> None:
            try:
                async for output in generate(self._llm, prompt, parameters, name, **where):
                    arrived(name, output)
            except Exception as error:  # told to the run
                arrived(name, error)
            finally:
                self.left(where)
                if NAME not in (parameters.extra_args or {}):
                    self.forget([name])

        asyncio.run_coroutine_threadsafe(run(), self._loop)

    def chosen(self, name: str, wanted: int | None = None) -> dict[str, int]:
        """Choose the engine of a request: the one that has fewest, or the one that its client wants.

        Returns what tells vLLM of it; nothing where there is one engine, or where the client wants one that is not
        there, which vLLM refuses. `left` follows when the request has ended, `forget` when its rows were asked for.
        """
        if self.engines == 1 or wanted not in (None, *range(self.engines)):
            return {}
        with self._choosing:
            fewest = min(zip(self._running, self._given, range(self.engines), strict=True))[2]
            engine = fewest if wanted is None else wanted
            self._running[engine] += 1
            self._given[engine] += 1
            self._engine_of[name] = engine
        return {"data_parallel_rank": engine}

    def left(self, where: Mapping[str, int]) -> None:
        """A request has ended. `where`: what `chosen` gave."""
        with self._choosing:
            for engine in where.values():
                self._running[engine] -= 1

    def forget(self, names: Sequence[str]) -> None:
        """Nobody asks for the rows of these requests any more."""
        for name in names:
            self._engine_of.pop(name, None)

    def drop(self, names: Sequence[str]) -> None:
        """See `VllmEngine.drop`."""
        if names:
            with self._alive():
                self.result(self._llm.abort(list(names)))
            self.call("hookmap_drop", list(names))
            self.forget(names)

    def take(self, wanted: Sequence[tuple[str, int]]) -> list[Taken]:
        """See `VllmEngine.take`."""
        of_engines: dict[int, dict[str, list[int]]] = {}
        for name, tokens in wanted:
            of_engines.setdefault(self._engine_of.get(name, 0), {})[name] = [tokens]

        async def ask() -> list[list[Any]]:
            asked = ((engine, asked_of(mine)) for engine, mine in of_engines.items())
            return await asyncio.gather(*(self._answers(n, "hookmap_take", mine, self._packed) for n, mine in asked))

        with self._alive():
            answers = self.result(ask())
        found: dict[str, Taken] = {}
        for mine, of_ranks in zip(of_engines.values(), answers, strict=True):
            found |= zip(mine, self.taken(of_ranks), strict=True)
        self.forget([name for name, _ in wanted])
        return [found[name] for name, _ in wanted]

    def close(self) -> None:
        """See `VllmEngine.close`. Requests that run end with an error."""
        from vllm.v1.engine.exceptions import EngineDeadError

        def end() -> None:  # vLLM itself logs a traceback
            self._llm.output_handler.cancel()
            self._llm.output_processor.propagate_error(EngineDeadError())

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(end)
        self._closed.set()
        self._llm.shutdown()

    def _everywhere(self, method: str, *arguments: Any) -> list[list[Any]]:
        with self._alive():
            found: list[list[Any]] = self.result(self.everywhere(method, *arguments))
        return found

    def _each(self, method: str, *arguments: Any) -> list[Any]:
        with self._alive():
            found: list[Any] = self.result(self._answers(0, method, *arguments))
        return found

    def _of(self, request: str, method: str, *arguments: Any) -> list[Any]:
        with self._alive():
            found: list[Any] = self.result(self.of(request, method, *arguments))
        return found

    async def everywhere(self, method: str, *arguments: Any) -> list[list[Any]]:
        """The answers of all workers of each engine."""
        return await asyncio.gather(*(self._answers(engine, method, *arguments) for engine in range(self.engines)))

    async def of(self, request: str, method: str, *arguments: Any) -> list[Any]:
        """The answers of all workers of the engine that has this request."""
        return await self._answers(self._engine_of.get(request, 0), method, *arguments)

    async def _answers(self, engine: int, method: str, *arguments: Any) -> list[Any]:
        """Those of one engine: vLLM's `collective_rpc` asks all, and gives the answers of the first.

        Raises EngineDeadError where a worker has died: vLLM itself gives an error of any type, if it was at work.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        client = self._llm.engine_core

        async def ask(method: str, *arguments: Any) -> list[Any]:
            found: list[Any] = await client._call_utility_async(
                "collective_rpc", method, None, arguments, None, engine=client.core_engines[engine]
            )
            return found

        try:
            return await ask(method, *arguments)
        except Exception as error:
            try:
                await ask(HEALTH)
            except Exception:
                raise EngineDeadError from error
            raise

    def result(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What this gives in the loop. Raises EngineDeadError, which vLLM does not where it waits for an answer."""
        found = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    return found.result(LOOK)
                self.look()
        finally:
            found.cancel()  # nothing, where it is done

    def look(self) -> None:
        """Raises EngineDeadError where the engine has died."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._llm.engine_core.resources.engine_dead or not self._loop.is_running():
            raise EngineDeadError

    def _watched(self) -> threading.Event:
        return threading.Event()  # `look` is enough

    def _answers_health(self) -> bool:
        return True  # `_answers` has asked

    def _in_processes(self) -> bool:
        return True

    def _config(self) -> Any:
        return self._llm.vllm_config


class Channel:
    """The requests of one run on a shared engine. See `VllmEngine` for the methods."""

    def __init__(self, engine: SharedEngine, told: Callable[[str, Any], None]) -> None:
        self._engine, self._told = engine, told
        self._arrived = queue.SimpleQueue[tuple[str, Any]]()
        self._tokens: dict[str, list[int]] = {}
        self.call, self.plan, self.take, self.in_flight = engine.call, engine.plan, engine.take, engine.in_flight

    def add(self, name: str, tokens: Sequence[int], parameters: Any, spec: RequestSpec) -> None:
        """What vLLM refuses is told by `step`."""
        self._tokens[name] = []
        prompt = prepared(tokens, parameters, spec)
        self._engine.follow(name, prompt, parameters, lambda *what: self._arrived.put(what))

    def step(self) -> list[Ended]:
        """Wait for what arrives next, for a moment. Raises CaptureError where vLLM refuses a request, or has died."""
        try:
            name, output = self._arrived.get(timeout=LOOK)
        except queue.Empty:
            with self._engine._alive():
                self._engine.look()
            return []
        if isinstance(output, Exception):
            with self._engine._alive():
                from vllm.exceptions import VLLMValidationError

                try:
                    raise output
                except (ValueError, VLLMValidationError) as error:
                    raise CaptureError(f"vLLM refuses this request: {error}") from error
        if name not in self._tokens:  # it was dropped
            return []
        self._tokens[name] += output.outputs[0].token_ids
        self._told(name, output)
        return [Ended(name, tuple(self._tokens.pop(name)))] if output.finished else []

    def drop(self, names: Sequence[str]) -> None:
        for name in names:
            self._tokens.pop(name, None)
        self._engine.drop(names)
