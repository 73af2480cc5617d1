"""Python objects as bytes, for those of Horovod's own functions that send objects.

They are pickled, as Horovod does, so a rank can run code on the others that call them
(docs/explanation/security.md). Nothing of this library's own is sent this way.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch

__all__ = ["pickle_to_tensor", "unpickle_tensor"]


def pickle_to_tensor(obj: Any) -> torch.Tensor:
    """Return an object as bytes."""
    return torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)


def unpickle_tensor(data: torch.Tensor) -> Any:
    """Return the object that :func:`packed` packed on another rank."""
    return pickle.loads(data.numpy().tobytes())
