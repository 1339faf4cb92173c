"""The rows of one request in the batch that runs, watched and written as `capture` would do it alone."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from hookmap.activations import Activation, Sample, Sink
from hookmap.capture.batches import layout_of
from hookmap.capture.own_rows import OwnEditor, Place
from hookmap.capture.run import running
from hookmap.services.server.shared_run import Choice
from hookmap.services.server.summaries import Summarising
from hookmap.services.server.tokens import Token
from hookmap.services.server.watched_run import WatchedRun


class AfterPass:
    """A sink before another one. It hands rows on when their pass is over: one that fails may be run again."""

    def __init__(self, sink: Sink) -> None:
        self._sink, self._held = sink, list[Activation]()

    def write(self, activation: Activation) -> None:
        self._held.append(activation)

    def finish(self, sample: Sample) -> None:
        self.hand_on()
        self._sink.finish(sample)

    def abandon(self) -> None:
        """See Sink."""

    def hand_on(self) -> None:
        """The pass is over."""
        held, self._held = self._held, []
        for activation in held:
            self._sink.write(activation)


class WatchedPart:
    """The choices of one prompt, from their first pass to their last."""

    def __init__(self, run: WatchedRun, numbers: Sequence[int], sink: Sink) -> None:
        """`numbers`: of the choices in the run. `sink`: where the rows go, once a pass is over."""
        self._run, self._sink, self._place = run, AfterPass(sink), Place()
        layout = layout_of(numbers, [run.prompts[number] for number in numbers])
        self._observer = run.own_rows(layout, self._sink, self._place)
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

    def stand(self, batch: int, rows: Sequence[int], pads: int = 0) -> None:
        """Its rows are these of a batch of so many, and so many columns of the pass that comes stand before them."""
        self._place.stand(batch, rows, pads)

    def stepped(self, choices: Sequence[Choice], tokens: list[Token]) -> list[Token]:
        """The choices have their newest tokens. Returns those with their figures. Raises what went wrong."""
        if self._place.error is not None:
            raise self._place.error
        self._sink.hand_on()
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
