"""Every reader of bytes, on bytes that nobody meant: the clear errors of `TARGETS`, or none.

A few examples each, quickly, and always the same. `make fuzz` looks for longer.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, Target, run

SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, 2, -1, 1 << 31, 10**15, 1e308, -0.0, "", "x", "float32", "O", "1e999"]),
    st.floats(),
    st.text(max_size=6),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to every part of a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, part in inner for place in places(part, (*at, key)))]


def changed(value: Any, at: tuple[Any, ...], new: Any, how: str) -> Any:
    """The value with one part replaced, left out, or given twice."""
    if not at:
        return new
    out = dict(value) if isinstance(value, dict) else list(value)
    key, *rest = at
    if rest or how == "replace":
        out[key] = changed(value[key], tuple(rest), new, how)
    elif how == "drop" or isinstance(out, dict):
        del out[key]
    else:
        out.insert(key, out[key])
    return out


@st.composite
def spoiled(draw: st.DrawFn, seed: bytes) -> bytes:
    """Good bytes with something wrong: in a value of their JSON, or anywhere."""
    lines = seed.split(b"\n")
    number = draw(st.integers(0, len(lines) - 1))
    try:
        value = json.loads(lines[number])
    except ValueError:
        pass
    else:
        if draw(st.integers(0, 4)):
            at = draw(st.sampled_from(places(value)))
            new = changed(value, at, draw(VALUES), draw(st.sampled_from(["replace", "drop", "twice"])))
            lines[number] = json.dumps(new).encode()
            return b"\n".join(lines)
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(len(data), start + 8)))
        data[start:stop] = draw(st.binary(max_size=8))
    return bytes(data[: draw(st.sampled_from([len(data), len(data) // 2]))])


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    return st.one_of(
        *(spoiled(seed) for seed in target.seeds),
        VALUES.map(lambda value: json.dumps(value).encode()),
        st.binary(max_size=200),
    )


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_bytes_that_nobody_meant_are_a_clear_error(target):
    @settings(max_examples=max(settings.default.max_examples // 2, 20), database=None)
    @given(inputs(target))
    @example(b"")
    @example(b"[" * 100_000)
    def on(data: bytes) -> None:
        run(target, data)

    on()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_good_bytes_are_read(target):
    """What is fuzzed is the reader, and not its first check: the examples get through it."""
    for seed in target.seeds[:1]:
        if target.name not in ("wheel-record", "shapes"):
            target.read(seed)


def test_a_target_that_raises_something_else_is_found():
    bad = Target("bad", lambda data: {}[data], (b"",))
    with pytest.raises(KeyError):
        run(bad, b"x")
