"""Files that only their owner can read, whatever the user's umask.

Losses, explanations, checkpoints and logs reveal data. Files that hvdloss writes have mode 0600, and folders
0700; use chmod to share them. An existing file or folder keeps its mode.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = ["make_folder", "open_private", "private_umask", "write_text"]


def open_private(path: str | os.PathLike[str], mode: str = "w", **options: Any) -> IO[Any]:
    """Open a file for writing as ``open`` does; if it is new, only its owner can read it.

    Args:
        path, mode, options: of ``open``.

    Raises:
        OSError: as ``open``.
    """
    return open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600), **options)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file of text, in UTF-8, that only its owner can read."""
    with open_private(path, encoding="utf-8") as file:
        file.write(text)


def make_folder(path: str | os.PathLike[str], mode: int = 0o700) -> Path:
    """Make a folder, and those above it, for its owner alone (or with this mode); fine if it exists.

    Raises:
        OSError: it cannot be made, or is not a folder.
    """
    path = Path(path)
    if not path.is_dir():
        if path.parent != path:
            make_folder(path.parent, mode)
        path.mkdir(mode=mode, exist_ok=True)
    return path


@contextmanager
def private_umask() -> Iterator[None]:
    """Make files and folders private to their owner in the block, also those of child processes.

    The umask belongs to the whole process: for commands, not for libraries.
    """
    former = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(former)
