"""Checks of arguments, shared by many functions."""

from __future__ import annotations

from typing import Any

import numpy as np

from hvdloss.errors import ConfigError

__all__ = ["check_int"]


def check_int(name: str, value: Any, least: int) -> int:
    """Return `value` if it is an integer of at least `least`, else raise ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ConfigError(f"{name}={value!r} must be an integer of at least {least}")
    return int(value)
