"""Horovod's elastic loop, as the watch needs it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

from hvdloss import watch
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.ops import communicator_of

__all__ = ["register"]


@functools.cache
def register() -> dict[str, Callable[..., Any]]:
    """Return ``init`` and ``shutdown`` that begin and end the watch; the elastic loop calls them too."""
    watched = watch.begins_with(hvd, communicator_of)
    if importlib.util.find_spec("horovod") is not None:
        import horovod.tensorflow.elastic as loop

        vars(loop).update(watched)
    return watched
