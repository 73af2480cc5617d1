"""Functions that were traced for the ranks there are: with others they must be traced anew."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import tensorflow as tf
from hvdloss.comm.world import register_for_reset

__all__ = ["register_trace"]

_FILE = "polymorphic_function.py"


class _Traces:
    """The ``tf.function`` objects, anybody's, in whose graphs the number of a rank, or of ranks, stands."""

    def __init__(self) -> None:
        self._functions: weakref.WeakSet[Any] = weakref.WeakSet()
        register_for_reset(self)

    def note(self) -> None:
        """Take note of all functions that are being traced by now."""
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename.endswith(_FILE):
                one = frame.f_locals.get("self")
                if hasattr(one, "_function_cache"):
                    self._functions.add(one)
            frame = frame.f_back  # type: ignore[assignment]

    def reset(self) -> None:
        """Forget the traces."""
        for one in list(self._functions):
            one._function_cache.clear()
        self._functions.clear()


_traces = _Traces()


def register_trace() -> None:
    """Have the functions that are being traced be traced anew with other ranks; eagerly, nothing."""
    if not tf.executing_eagerly():
        _traces.note()
