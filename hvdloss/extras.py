"""Libraries that only some need: loaded where they are used, and named where they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from hvdloss.errors import ConfigError

__all__ = ["library"]


def library(name: str, extra: str, purpose: str) -> Any:
    """Import a library that only some need.

    Raises:
        ConfigError: it is not installed; names the extra that has it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs the library {name.partition('.')[0]} ({error}): pip install 'hvdloss[{extra}]'"
        ) from error
