"""The rows of one request in the batch that runs, watched and written as `capture` would do it alone."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from hookmap.activations import Sink
from hookmap.capture.batches import layout_of
from hookmap.capture.own_rows import OwnEditor, Place
from hookmap.capture.run import running
from hookmap.services.server.shared_run import Choice
from hookmap.services.server.summaries import Summarising
from hookmap.services.server.tokens import Token
from hookmap.services.server.watched_run import WatchedRun


class WatchedPart:
    """The choices of one prompt, from their first pass to their last."""

    def __init__(self, run: WatchedRun, numbers: Sequence[int], sink: Sink) -> None:
        """`numbers`: of the choices in the run. `sink`: where the rows go."""
        self._run, self._sink, self._place = run, sink, Place()
        layout = layout_of(numbers, [run.prompts[number] for number in numbers])
        self._observer = run.own_rows(layout, sink, self._place)
        self._editor: OwnEditor | None = None
        if run.edits:
            self._editor = OwnEditor(run.edits, self._observer)
            self._editor.place = self._place
        self._hooks = contextlib.ExitStack()
        self._hooks.enter_context(run.watching(self._observer, self._editor))

    @staticmethod
    @contextlib.contextmanager
    def looking(parts: "Iterable[WatchedPart | None]") -> Iterator[None]:
        """Inside, the passes of the model are of these parts, each of which stands in the batch."""
        watched = [part for part in parts if part is not None]
        for part in watched:
            part._observer.look(True)
        try:
            yield
        finally:
            for part in watched:
                part._observer.look(False)

    def stand(self, batch: int, rows: Iterable[int]) -> None:
        """Its rows are these of a batch of so many."""
        self._place.batch, self._place.rows = batch, list(rows)

    def stepped(self, choices: Sequence[Choice], tokens: list[Token]) -> list[Token]:
        """The choices have their newest tokens. Returns those with their figures. Raises what went wrong."""
        if self._place.error is not None:
            raise self._place.error
        observer, width = self._observer, self._observer.layout.width
        columns = width + max(len(choice.new) for choice in choices)
        observer.sampled(columns, [choice.ended for choice in choices])
        if isinstance(observer, Summarising):
            with running(self._run.engine):
                figures = dict(zip(observer.layout.samples, observer.figures(columns), strict=True))
            observer.look(False)
            tokens = [replace(token, figures=figures[token.row]) for token in tokens]
        return tokens

    def finish(self, choices: Sequence[Choice]) -> None:
        """All of them have ended: their rows are complete. Raises CaptureError."""
        self._run.keep(self._observer, self._editor, self._sink, [choice.new for choice in choices])
        self.close()

    def close(self) -> None:
        """Take the hooks away."""
        self._hooks.close()
