"""What the reader of a long command sees meanwhile: on a terminal, once per job, and nothing elsewhere.

On stderr, so that what a command prints can be piped on. `hvdloss install` has stages, and a line for each in
a log: `hvdloss.cli.install.progress`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from hvdloss.comm.world import launcher_rank

__all__ = ["bar", "launched", "waiting"]


def launched() -> bool:
    """Return whether a launcher started this process as one of several ranks."""
    return launcher_rank() is not None


def _shown(console: Console) -> bool:
    # Launchers gather what ranks print, and mpirun lends each a terminal: the launcher's environment decides.
    return console.is_terminal and not launched()


def bar() -> Progress:
    """Return a progress bar with a text, to be entered; it leaves nothing behind."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not _shown(console))


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show that something goes on, as long as the block lasts."""
    console = Console(stderr=True)
    if not _shown(console):
        yield
        return
    with console.status(text):
        yield
