"""What the lines of a record hold, and whether bytes that claim to be one are.

A record is JSON lines: one object a line, strict JSON (what is NaN or infinite is null), UTF-8. ``"kind"``
says what a line is; docs/reference/record.md lists the fields, with units. Within version 1 kinds and
fields may be added, so readers pass over those that they do not know.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hvdloss.comm.messages import parse_json
from hvdloss.errors import ConfigError

__all__ = ["FORMAT", "KINDS", "checked", "encoded", "plain", "scrubbed"]

FORMAT = "hvdloss record 1"
RANKS_MOST = 100_000
TEXT_MOST = 4000  # characters of any text that is written
_DEPTH = 8

# -- writing ------------------------------------------------------------------------------------------

_PATH = re.compile(r"(?<![\w.:/])(?:~|/)[^\s'\":,;()<>]*/([^\s/'\":,;()<>]*)")
_SECRET = re.compile(
    r"(?:^|[^a-z])(?:secret|password|passwd|passphrase|token|credentials?|(?:api|private|access|secret).?key)"
    r"(?:$|[^a-z])",
    re.IGNORECASE,
)


def scrubbed(text: str) -> str:
    """Return a text without folders, of which only the last name is left, and of limited length.

    >>> scrubbed("cannot read /home/ann/data/x.csv: gone")
    'cannot read …/x.csv: gone'
    """
    return _PATH.sub(r"…/\1", text[: 4 * TEXT_MOST])[:TEXT_MOST]


def plain(value: Any, depth: int = 0) -> Any:
    """Return a value as strict JSON has it: numbers that are not finite as None, arrays as lists.

    Whatever else it is becomes text. What is named like a secret is left out, and paths lose their folders.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return scrubbed(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # NumPy's arrays and scalars
        return plain(value.tolist(), depth)
    if depth < _DEPTH:
        if isinstance(value, Mapping):
            return {
                str(key)[:200]: "(hidden)" if _SECRET.search(str(key)) else plain(one, depth + 1)
                for key, one in value.items()
            }
        if isinstance(value, list | tuple):
            return [plain(one, depth + 1) for one in value]
    if isinstance(value, type) or callable(value):
        return scrubbed(getattr(value, "__qualname__", type(value).__name__))
    return scrubbed(str(value))


def encoded(line: Mapping[str, Any]) -> bytes:
    """Return a line of a record, of plain values."""
    return (
        json.dumps(line, allow_nan=False, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
        + b"\n"
    )


# -- checking -----------------------------------------------------------------------------------------

Check = Callable[[Any], bool]


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # Of NumPy's arrays, so nothing that only Python's integers can hold.
    return -1e308 < value < 1e308


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _table(value: Any) -> bool:
    return isinstance(value, dict)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _any(value: Any) -> bool:
    return True


_NUMBERS = _list_of(_maybe(_number))

_RANKS: dict[str, Check] = {
    "loss": _NUMBERS,
    "weight": _NUMBERS,
    "elements": _NUMBERS,
    "micro_batches": _NUMBERS,
    "communication": _NUMBERS,
    "computation": _NUMBERS,
}
_RANKS_MAYBE: dict[str, Check] = {"skew": _NUMBERS, "nonfinite": _list_of(_text), "dropped": _NUMBERS}

_EVERY: dict[str, Check] = {"time": _number}
#: Kind -> the fields that it must have, and those that it may.
KINDS: dict[str, tuple[dict[str, Check], dict[str, Check]]] = {
    "run": (
        {"format": _text, "ranks": _count},
        {
            "name": _text,
            "framework": _text,
            "objective": _table,
            "terms": _table,
            "settings": _table,
            "environment": _table,
        },
    ),
    "step": (
        {
            "step": _count,
            "samples": _number,
            "loss": _maybe(_number),
            "weight": _maybe(_number),
            "elements": _number,
            "objective_value": _maybe(_number),
            "ranks": _table,
        },
        {
            "averaged_loss": _maybe(_number),
            "skipped": _count,
            "terms": _table,
            "losses": _table,
            "epoch": _maybe(_count),
            "before": _number,
        },
    ),
    "undone": ({"step": _count, "until": _count}, {}),
    "ranks": ({"step": _count, "ranks": _count}, {}),
    "classes": (
        {"step": _count, "term": _text, "counts": _list_of(_NUMBERS)},
        {"names": _maybe(_list_of(_text)), "edges": _maybe(_NUMBERS), "unit": _text},
    ),
    "comm_plan": ({"step": _count}, {"choices": _table, "comm_plan": _maybe(_table)}),
    "epoch": ({"step": _count, "epoch": _count, "metrics": _table}, {}),
    "decision": ({"step": _count, "what": _text, "before": _any, "after": _any, "reason": _text}, {}),
    "fault": ({"step": _count, "error": _text, "ranks": _list_of(_count), "text": _text}, {}),
    "hardest": (
        {"step": _count, "what": _text, "measure": _text, "items": _list_of(_table)},
        {"lowest": lambda value: isinstance(value, bool)},
    ),
    "end": ({"step": _count, "status": _text}, {"left_out": _count}),
}


def checked(text: bytes, where: str, first: bool = False) -> dict[str, Any] | None:
    """Return a line's object; None for a kind that this version does not know.

    Args:
        text: of the line.
        where: it is, for messages: the file and the line's number.
        first: whether it must be the head of a record.

    Raises:
        ConfigError: it is no such line; names the field.
    """
    try:
        line = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON ({error}); the file is damaged, or no record") from error
    try:
        return _checked(line, where, first)
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply; the file is damaged, or no record") from error


def _checked(line: Any, where: str, first: bool) -> dict[str, Any] | None:
    if not isinstance(line, dict):
        raise ConfigError(f"{where} is no JSON object; the file is damaged, or no record")
    kind = line.get("kind")
    if first and (kind != "run" or not isinstance(line.get("format"), str)):
        raise ConfigError(
            f"{where} is not the head of a record: a record begins with "
            f'{{"kind":"run","format":"{FORMAT}",...; is this what hvd.Recorder wrote?'
        )
    if kind == "run" and line.get("format") != FORMAT:
        raise ConfigError(
            f"{where}: format={str(line.get('format'))[:80]!r} is not {FORMAT!r}; read it with the version "
            f"of hvdloss that wrote it, or a newer one"
        )
    if not isinstance(kind, str) or kind not in KINDS:
        return None
    if kind != "step":  # its texts are not shown
        line = {key: _clean(one) for key, one in line.items()}
    needed, allowed = KINDS[kind]
    _check(line, {**_EVERY, **needed}, allowed, f"{where} ({kind})")
    if kind == "step":
        _check_step(line, f"{where} ({kind})")
    elif kind == "run" and not 1 <= line["ranks"] <= RANKS_MOST:
        raise ConfigError(f"{where} (run): ranks={line['ranks']!r} is no number of ranks")
    elif kind == "classes":
        _even(line["counts"], f"{where} (classes): counts")
        names, width = line.get("names"), len(line["counts"][0]) if line["counts"] else 0
        if names is not None and len(names) != width:
            raise ConfigError(f"{where} (classes): {len(names)} names of {width} classes")
    return dict(line)


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def _clean(value: Any) -> Any:
    """Return a value whose texts neither command a terminal nor break a page; None for NaN."""
    if isinstance(value, str):
        return _CONTROL.sub("\ufffd", value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # Python reads NaN, which is no JSON
    if isinstance(value, list):
        return [_clean(one) for one in value]
    if isinstance(value, dict):
        return {_CONTROL.sub("\ufffd", key): _clean(one) for key, one in value.items()}
    return value


def _check(
    line: dict[str, Any], needed: Mapping[str, Check], allowed: Mapping[str, Check], where: str
) -> None:
    for name, check in needed.items():
        if name not in line:
            raise ConfigError(f"{where}: {name!r} is missing")
        if not check(line[name]):
            raise ConfigError(f"{where}: {name}={line[name]!r:.80} is of another form")
    for name, check in allowed.items():
        if name in line and not check(line[name]):
            raise ConfigError(f"{where}: {name}={line[name]!r:.80} is of another form")


def _check_step(line: dict[str, Any], where: str) -> None:
    ranks = line["ranks"]
    _check(ranks, _RANKS, _RANKS_MAYBE, f"{where}: ranks")
    size = len(ranks["loss"])
    for name in (*_RANKS, *_RANKS_MAYBE):
        if name in ranks and len(ranks[name]) != size:
            raise ConfigError(f"{where}: ranks.{name} has {len(ranks[name])} values, ranks.loss {size}")
    if not 1 <= size <= RANKS_MOST:
        raise ConfigError(f"{where}: {size} ranks")
    for name, loss in line.get("losses", {}).items():
        if not isinstance(loss, dict) or not all(map(_maybe(_number), loss.values())):
            raise ConfigError(f"{where}: losses.{name[:80]} is of another form")
    for name, term in line.get("terms", {}).items():
        if not isinstance(term, dict) or not _NUMBERS(term.get("values", None)):
            raise ConfigError(f"{where}: terms.{name[:80]} is of another form")
        for key, value in term.items():
            if not (_maybe(_number)(value) or _NUMBERS(value)):
                raise ConfigError(f"{where}: terms.{name[:80]}.{key[:80]} is of another form")
            if isinstance(value, list) and len(value) != size:
                raise ConfigError(
                    f"{where}: terms.{name[:80]}.{key[:80]} has {len(value)} values of {size} ranks"
                )


def _even(rows: Iterable[list[Any]], what: str) -> None:
    if len({len(row) for row in rows}) > 1:
        raise ConfigError(f"{what} has rows of different lengths")
