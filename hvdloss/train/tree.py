"""Trees of values as JSON and arrays, for files and messages without pickles."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss.errors import CheckpointError, ConfigError

__all__ = ["Held", "flatten_tree", "pack_arrays", "unflatten_tree", "unpack_arrays"]

Arrays = dict[str, npt.NDArray[Any]]
#: Returns the kind of a framework's array and its values; None for anything else.
ToArray = Callable[[Any], "tuple[str, npt.NDArray[Any]] | None"]
#: Makes a framework's array of a kind and its values.
FromArray = Callable[[str, npt.NDArray[Any]], Any]
Held = tuple[Any, Arrays]

_SCALARS = (str, bool, int, type(None))
_DEEPEST = 100


def numpy_array(value: Any) -> tuple[str, npt.NDArray[Any]] | None:
    """Return a NumPy array or number as :data:`ToArray` does."""
    if isinstance(value, np.generic) and not isinstance(value, float):
        return "numpy number", np.asarray(value)
    return ("numpy", value) if isinstance(value, np.ndarray) else None


def of_numpy(kind: str, array: npt.NDArray[Any]) -> Any:
    """Return what :func:`numpy_array` was given.

    Raises:
        CheckpointError: an array of another kind.
    """
    if kind == "numpy number" and array.ndim == 0:
        return array[()]
    if kind != "numpy":
        raise CheckpointError(f"an array of kind {kind!r:.100} is none of NumPy's; load it with the adapter")
    return array


def flatten_tree(tree: Any, to_array: ToArray = numpy_array, *, name: str = "state") -> Held:
    """Return a tree as a JSON value, and the arrays in it by their place.

    Args:
        tree: dicts, lists and tuples of numbers, strings, None and arrays.
        to_array: knows the framework's arrays.
        name: of the tree, for the message.

    Raises:
        ConfigError: something of another kind, by its place; or two arrays with the same place.
    """
    arrays: Arrays = {}

    def part(value: Any, place: str, depth: int) -> Any:
        where = f"{name}.{place}" if place else name
        if depth > _DEEPEST:
            raise ConfigError(f"{where[:200]} is nested more than {_DEEPEST} deep")
        found = to_array(value)
        if found is None:
            found = numpy_array(value)
        if found is not None:
            kind, array = found
            if array.dtype.kind not in "fiub":
                raise ConfigError(f"{where} is an array of {array.dtype}, which cannot be saved")
            key = place or "value"
            if key in arrays:
                raise ConfigError(f"{where}: two arrays have this place; give dicts keys without dots")
            # safetensors writes memory as it lies.
            arrays[key] = np.ascontiguousarray(array).reshape(array.shape)
            return {"array": key, "kind": kind}
        if isinstance(value, _SCALARS):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": repr(float(value))}
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, _SCALARS):
                    raise ConfigError(f"{where} has the key {key!r:.100}; keys must be strings or integers")
            return {
                "dict": [
                    [key, part(one, f"{place}.{key}" if place else str(key), depth + 1)]
                    for key, one in value.items()
                ]
            }
        if isinstance(value, tuple | list):
            parts = [part(one, f"{place}.{i}" if place else str(i), depth + 1) for i, one in enumerate(value)]
            return {"tuple": parts} if isinstance(value, tuple) else parts
        raise ConfigError(
            f"{where} is a {type(value).__name__}, which is neither an array nor a number, a string, None, "
            f"or a dict, list or tuple of these; only such can be saved, as nothing is pickled"
        )

    return part(tree, "", 0), arrays


def unflatten_tree(
    description: Any, arrays: Mapping[str, npt.NDArray[Any]], from_array: FromArray = of_numpy
) -> Any:
    """Return the tree that :func:`flatten_tree` took apart.

    Raises:
        CheckpointError: what it never gives.
    """

    def part(value: Any, depth: int) -> Any:
        if depth > _DEEPEST:
            raise CheckpointError(f"nested more than {_DEEPEST} deep")
        if isinstance(value, list):
            return [part(one, depth + 1) for one in value]
        if not isinstance(value, dict):
            return value
        match value:
            case {"array": str(key), "kind": str(kind)} if len(value) == 2:
                if key not in arrays:
                    raise CheckpointError(f"the array {key!r:.100} is missing")
                array = arrays[key]
                return of_numpy(kind, array) if kind.startswith("numpy") else from_array(kind, array)
            case {"float": "nan" | "inf" | "-inf" as text} if len(value) == 1:
                return float(text)
            case {"tuple": list(parts)} if len(value) == 1:
                return tuple(part(one, depth + 1) for one in parts)
            case {"dict": list(pairs)} if len(value) == 1:
                out = {}
                for pair in pairs:
                    if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], _SCALARS)):
                        raise CheckpointError(f"no pair of key and value: {pair!r:.100}")
                    out[pair[0]] = part(pair[1], depth + 1)
                return out
        raise CheckpointError(f"not a value of a checkpoint: {value!r:.100}")

    return part(description, 0)


def pack_arrays(arrays: Arrays) -> bytes:
    """Return arrays as the bytes of a safetensors file; nothing for none."""
    if not arrays:
        return b""
    from safetensors.numpy import save

    return save(arrays)


def unpack_arrays(data: bytes) -> Arrays:
    """Return the arrays of :func:`packed`.

    Raises:
        CheckpointError: other bytes.
    """
    if not data:
        return {}
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return dict(load(data))
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
        raise CheckpointError(f"not the bytes of a safetensors file: {error!s:.200}") from error


def strictly(text: bytes) -> Any:
    """Return the JSON value of a text that came from elsewhere.

    Raises:
        CheckpointError: it is none.
    """
    try:
        return json.loads(text, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"no JSON: {error!s:.200}") from error


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
