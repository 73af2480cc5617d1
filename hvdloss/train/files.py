"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from hvdloss._util.private import make_folder, open_private

__all__ = ["replace_durably", "unfinished", "write_atomically"]


def unfinished(path: str | os.PathLike[str]) -> Path:
    """Return where a file is written before it takes its name: in the same folder, with the same ending.

    Always the same name, so that what a killed writer left is overwritten by the next one.
    """
    path = Path(path)
    return path.with_name(f".unfinished-{path.name}")


def replace_durably(source: Path, path: str | os.PathLike[str], mode: int = 0o600) -> None:
    """Rename a written file over an existing one, so that a power failure keeps one of both.

    Unless `mode` says otherwise, only its owner can read it.
    """
    with open(source, "rb+") as file:
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
    os.replace(source, path)
    folder = os.open(Path(path).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(
    path: str | os.PathLike[str],
    write: Callable[[IO[Any]], Any],
    *,
    mode: int = 0o600,
    folder_mode: int = 0o700,
) -> None:
    """Write a file whole or not at all: under another name, forced to disk, then renamed over `path`.

    Whoever reads `path` finds the former file or the new one, also where this process is killed meanwhile.

    Args:
        path: where to; its folder is made if need be.
        write: is given the open binary file.
        mode: of the file, whatever the umask says.
        folder_mode: of its folder, where that is made; the umask takes from it.

    Raises:
        OSError: the file cannot be written. This, or what `write` raises, leaves the former file as it was.
    """
    new = unfinished(path)
    make_folder(new.parent, folder_mode)
    try:
        new.unlink(missing_ok=True)  # what a killed writer left, or a link that somebody else put there
        with open_private(new, "xb") as file:
            write(file)
        replace_durably(new, path, mode)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
