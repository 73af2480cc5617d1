"""One edit of Horovod's source."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """Replace `find` by `replace` in one file, exactly `count` times (0: the whole file)."""

    path: str
    find: str
    replace: str
    why: str
    count: int = 1
