"""What the reader sees while the command works: stages, a percentage, elapsed time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

STAGES = ("probe", "source", "configure", "compile", "wheel", "install", "prove")


class Reporter:
    """Shows stages: live on a terminal, one line at each change everywhere else.

    Used as a context manager around all stages; `seconds` holds each finished stage's time.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet
        self.seconds: dict[str, float] = {}
        self._start = time.monotonic()
        self._live = console.is_terminal and not quiet
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._stage_start = self._start
        self._last_percent = -1

    @contextmanager
    def shown(self) -> Iterator[Reporter]:
        """Keep the live display up during the block; on a pipe this does nothing."""
        if self._live:
            self._progress = Progress(
                SpinnerColumn(finished_text="[green]✓"),
                TextColumn("{task.fields[stage]:<9}"),
                BarColumn(bar_width=30),
                TimeElapsedColumn(),
                TextColumn("{task.fields[detail]}"),
                console=self.console,
            )
            self._progress.start()
        try:
            yield self
        finally:
            self._close_stage(done=False)
            if self._progress is not None:
                self._progress.stop()
                self._progress = None

    def stage(self, name: str, detail: str = "") -> None:
        """The stage `name` begins, and the one before it is done."""
        self._close_stage(done=True)
        self._stage, self._stage_start, self._last_percent = name, time.monotonic(), -1
        if self._progress is not None:
            self._task = self._progress.add_task(name, total=None, stage=name, detail=detail)
        else:
            self._line(name, detail or "...")

    def percent(self, value: int) -> None:
        """The stage is `value` percent done."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=100, completed=value, detail=f"{value}%")
        elif value // 10 > self._last_percent // 10:
            self._line(self._stage, f"{value}%")
        self._last_percent = value

    def detail(self, text: str) -> None:
        """What the stage is doing now."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, detail=text)
        else:
            self._line(self._stage, text)

    def done(self, detail: str = "") -> None:
        """The last stage is done."""
        if detail:
            self.detail(detail)
        self._close_stage(done=True)

    @property
    def elapsed(self) -> float:
        """Seconds since the command began."""
        return time.monotonic() - self._start

    def _close_stage(self, *, done: bool) -> None:
        if not self._stage:
            return
        if done:
            spent = time.monotonic() - self._stage_start
            self.seconds[self._stage] = round(self.seconds.get(self._stage, 0.0) + spent, 2)
        if self._progress is not None and self._task is not None:
            if done:
                self._progress.update(self._task, total=100, completed=100)
            self._progress.stop_task(self._task)
        self._stage, self._task = "", None

    def _line(self, stage: str, text: str) -> None:
        if not self.quiet:
            self.console.print(f"[{self.elapsed:6.1f} s] {stage:<9} {text}", markup=False, highlight=False)
