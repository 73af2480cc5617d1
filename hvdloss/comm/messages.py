"""Decoding messages of other ranks: JSON and plain arrays, never pickles, and never trusted.

A message of another rank may come from another version of hvdloss, or be damaged. It is then an error that
names the rank, the same on every rank that received it, and not whatever the parser happened to raise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hvdloss.errors import AgreementError, HvdlossError

__all__ = ["decode_all", "decode_errors", "parse_json"]


@contextmanager
def decode_errors(what: str, rank: int | None = None) -> Iterator[None]:
    """Turn errors while decoding a message into one that names its rank.

    Args:
        what: the message is, for the error.
        rank: the sender; None if it is not known.

    Raises:
        AgreementError: in place of anything but an HvdlossError.
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


def parse_json(text: bytes | str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: not JSON, or nested too deeply to be meant.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def decode_all(texts: Sequence[bytes], what: str, check: Callable[[Any], Any] | None = None) -> list[Any]:
    """Return the JSON values of all ranks' messages, in rank order.

    Args:
        texts: one per rank.
        what: they are, for the error.
        check: raises, or returns False, for a value of the wrong form.

    Raises:
        AgreementError: naming the first rank whose message cannot be used.
    """
    out = []
    for rank, text in enumerate(texts):
        with decode_errors(what, rank):
            value = parse_json(text)
            if check is not None and check(value) is False:
                raise ValueError(f"of another form: {str(value)[:80]}")
            out.append(value)
    return out
