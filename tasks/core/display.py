"""What a person sees while a run goes on: one line a stage, a bar with the time left while it works."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from tasks.core import progress
from tasks.core.progress import Event
from tasks.domain.errors import printable

PLAIN_INTERVAL_S = 15.0  # how often a line is written where no bar can be drawn


class Display:
    """Progress on a terminal as a bar; in a log file as a line now and then."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._label = ""
        self._last_line = 0.0
        self._begun: tuple[float, int] | None = None

    def say(self, text: str | Text) -> None:
        """A line. Text of others is in many: what looks like markup, or would steer the terminal, is shown as it is."""
        self.console.print(Text(printable(text)) if isinstance(text, str) else text)

    def start(self, label: str, *, aloud: bool = True) -> None:
        """A stage begins to compute.

        Args:
            aloud: where no bar can be drawn, a line says so at once; else only once it has taken a while.
        """
        label = printable(label)
        self._label, self._last_line, self._begun = label, time.monotonic(), None
        if self.console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description:<28}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task(label, total=None, note="")
            self._bar.start()
        elif aloud:
            self.say(f"  ...  {label}")

    def event(self, event: Event) -> None:
        """How far the stage is."""
        if "done" not in event:
            return
        done, total, note = event["done"], event["total"], printable(event["note"])
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if self._begun is None and done:
            self._begun = (now, done)  # loading and compiling come before the first unit and would spoil the estimate
        if now - self._last_line >= PLAIN_INTERVAL_S and self._begun and done > self._begun[1]:
            self._last_line = now
            left = (now - self._begun[0]) / (done - self._begun[1]) * (total - done)
            self.say(f"       {self._label}  {done}/{total}  about {left:.0f} s left  {note}")

    def finish(self, label: str, state: str, wall_s: float, detail: str = "") -> None:
        """A stage ended: `computed`, `cached` or `failed`."""
        self.stop()
        mark = {"computed": ("done  ", "green"), "cached": ("cached", "cyan"), "failed": ("failed", "red")}[state]
        wall = f"{wall_s:7.1f} s" if state != "cached" else " " * 9
        self.say(Text.assemble(mark, f" {printable(label):<28}{wall}  {printable(detail)}".rstrip()))

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()
            self._bar = self._task = None


@contextmanager
def beside_answers(label: str) -> Iterator[None]:
    """Show how far what goes on in this process is on standard error, since standard output is for answers."""
    display = Display(Console(stderr=True, highlight=False, soft_wrap=True))
    display.start(label, aloud=False)
    progress.listen(display.event)
    try:
        yield
    finally:
        progress.listen()
        display.stop()
