"""Optional libraries: imported where they are used, with an error that names the extra."""

from __future__ import annotations

import importlib
from typing import Any

from hvdloss.errors import ConfigError

__all__ = ["optional_import"]


def optional_import(name: str, extra: str, purpose: str) -> Any:
    """Import an optional library.

    Raises:
        ConfigError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs the library {name.partition('.')[0]} ({error}): pip install 'hvdloss[{extra}]'"
        ) from error
