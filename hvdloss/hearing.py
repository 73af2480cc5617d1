"""Reading what other ranks told: JSON and plain arrays, never pickles, and never trusted to be whole.

What arrives from another rank may be of another version of hvdloss, or damaged; it is then an error that
names the rank, the same on every rank that heard it, and not whatever the parser happened to raise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hvdloss.errors import AgreementError, HvdlossError

__all__ = ["hear", "hearing", "parsed"]


@contextmanager
def hearing(what: str, rank: int | None = None) -> Iterator[None]:
    """Turn what reading another rank's words raises into one error that names the rank.

    Args:
        what: they are, for the message.
        rank: who said them; None if that is not known.

    Raises:
        AgreementError: in place of anything that is no HvdlossError.
    """
    try:
        yield
    except HvdlossError:
        raise
    except Exception as error:
        who = "another rank" if rank is None else f"rank {rank}"
        text = " ".join(str(error).split())[:200]
        raise AgreementError(
            f"{who}: its {what} cannot be read ({type(error).__name__}: {text}); do all ranks run the same "
            f"version of hvdloss, and make the same calls?"
        ) from error


def parsed(text: bytes | str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is none, or one nested so deeply that nobody meant it.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def hear(texts: Sequence[bytes], what: str, check: Callable[[Any], Any] | None = None) -> list[Any]:
    """Return what all ranks told as JSON, in rank order.

    Args:
        texts: one per rank.
        what: they are, for the message.
        check: raises, or gives False, for a value that is not of the right form.

    Raises:
        AgreementError: naming the first rank whose text cannot be used.
    """
    out = []
    for rank, text in enumerate(texts):
        with hearing(what, rank):
            value = parsed(text)
            if check is not None and check(value) is False:
                raise ValueError(f"of another form: {str(value)[:80]}")
            out.append(value)
    return out
