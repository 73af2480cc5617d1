"""What goes ahead of activations that a stage of a model sends to the next: how many, of which kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from hvdloss.comm.messages import decode_errors, parse_json
from hvdloss.errors import ShapeError

__all__ = ["HEADER_BYTES", "ROW_BYTES", "TensorKind", "read_header", "write_header"]

HEADER_BYTES = 512
ROW_BYTES = 64  # what a micro-batch's loss is made of (`TENSOR_FIELDS` numbers), with gradients


class TensorKind(NamedTuple):
    """A tensor that travels: its dtype's name, its shape, and whether a gradient comes back for it."""

    dtype: str
    shape: tuple[int, ...]
    differentiable: bool


def write_header(kinds: Sequence[TensorKind], rank: int) -> bytes:
    """Return what is sent ahead, :data:`HEADER_BYTES` long.

    Raises:
        ShapeError: too many tensors.

    >>> read_header(write_header([TensorKind("float32", (2, 3), True)], 0), 0)
    [TensorKind(dtype='float32', shape=(2, 3), differentiable=True)]
    """
    text = json.dumps([[kind.dtype, kind.shape, int(kind.differentiable)] for kind in kinds]).encode()
    if len(text) > HEADER_BYTES:
        raise ShapeError(
            f"a stage gives {len(kinds)} tensors, of which the next one cannot be told in {HEADER_BYTES} "
            f"bytes (rank {rank}); put some of them into one"
        )
    return text.ljust(HEADER_BYTES)


def read_header(data: bytes, rank: int) -> list[TensorKind]:
    """Return what :func:`write_header` wrote on another rank.

    Raises:
        AgreementError: it is none, naming the rank.
    """
    with decode_errors("activations' shapes", rank):
        kinds = []
        for dtype, shape, differentiable in parse_json(data):
            if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in shape):
                raise ValueError(f"of another form: {dtype!r} {shape!r}"[:80])
            kinds.append(TensorKind(dtype, tuple(shape), bool(differentiable)))
        return kinds
