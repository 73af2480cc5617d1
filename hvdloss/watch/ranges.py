"""Sets of ranks as short texts, whatever the number of ranks: ``"0-5,8,10-20:2"``."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["pack", "unpack"]

_MOST = 1 << 20  # ranks that a text may name


def pack(ranks: Iterable[int]) -> str:
    """Return the text of a set of ranks: runs with a constant stride, in ascending order.

    >>> pack([0, 1, 2, 3, 8]), pack(range(0, 100, 4)), pack([])
    ('0-3,8', '0-96:4', '')
    """
    left = sorted(set(ranks))
    out, at = [], 0
    while at < len(left):
        end, stride = at, 0
        if at + 1 < len(left):
            stride = left[at + 1] - left[at]
            end = at + 1
            while end + 1 < len(left) and left[end + 1] - left[end] == stride:
                end += 1
        if end > at + 1 or (end == at + 1 and stride == 1):
            out.append(f"{left[at]}-{left[end]}" + ("" if stride == 1 else f":{stride}"))
        else:
            end = at
            out.append(str(left[at]))
        at = end + 1
    return ",".join(out)


def unpack(text: str) -> tuple[int, ...]:
    """Return the ranks of a text, ascending.

    Raises:
        ValueError: it is none, or names more than a million ranks.
    """
    found: set[int] = set()
    for part in text.split(",") if text else []:
        span, _, stride = part.partition(":")
        first, _, last = span.partition("-")
        run = range(int(first), int(last or first) + 1, int(stride or 1))
        if run.start < 0 or run.step < 1 or len(found) + len(run) > _MOST:
            raise ValueError(f"{text[:80]!r} is no set of ranks")
        found.update(run)
    return tuple(sorted(found))
