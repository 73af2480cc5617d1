"""The guard: equal ranks pass, and whatever differs is named on every rank alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdloss.comm.communicator import simulate
from hvdloss.comm.guard import assert_synchronized, checksum, due, mismatched_ranks
from hvdloss.errors import AgreementError, ConfigError


@given(st.lists(st.floats(width=32), min_size=1, max_size=50), st.data())
def test_any_flipped_bit_changes_the_checksum(values: list[float], data: st.DataObject) -> None:
    array = np.array(values, dtype=np.float32)
    assert checksum(array) == checksum(array.copy())
    bit = data.draw(st.integers(0, 32 * len(array) - 1))
    other = array.view(np.uint8).copy()
    other[bit // 8] ^= 1 << bit % 8
    assert checksum(other) != checksum(array)


def test_an_empty_array_has_a_checksum() -> None:
    assert checksum(np.zeros((0, 3))) == checksum(b"")


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_ranks_apart_are_those_unlike_rank_0(values: list[int]) -> None:
    assert mismatched_ranks(values) == [i for i, v in enumerate(values) if v != values[0]]


@pytest.mark.parametrize(("every", "expected"), [(None, []), (1, [1, 2, 3, 4]), (2, [2, 4])])
def test_due(every: int | None, expected: list[int]) -> None:
    assert [step for step in range(1, 5) if due(step, every)] == expected


@pytest.mark.parametrize("every", [0, -3])
def test_due_refuses(every: int) -> None:
    with pytest.raises(ConfigError, match=rf"every={every}"):
        due(1, every)


def told(names: list[list[str]], sums: list[list[int]]) -> list[str]:
    """Return the message on each simulated rank; "" where nothing was raised."""

    def body(communicator: object) -> str:
        rank = communicator.rank  # type: ignore[attr-defined]
        try:
            assert_synchronized(communicator, names[rank], sums[rank], name="g", when="after step 7")  # type: ignore[arg-type]
        except AgreementError as error:
            return str(error)
        return ""

    return simulate(len(names), body)


def test_equal_ranks_pass() -> None:
    assert told([["a", "b"]] * 3, [[1, 2]] * 3) == ["", "", ""]


def test_the_first_parameter_and_all_ranks_that_differ_are_named_alike() -> None:
    messages = told([["a", "b", "c"]] * 4, [[1, 2, 3], [1, 9, 3], [1, 2, 4], [1, 8, 3]])
    assert len(set(messages)) == 1
    for part in ("after step 7", "parameter 1 (b)", "rank(s) 1, 3 ", "2 of 3 parameters"):
        assert part in messages[0]


def test_other_parameters_are_told_apart_from_other_values() -> None:
    for names in ([["a"], ["b"]], [["a"], ["a", "b"]]):
        first, second = told(names, [[1] * len(n) for n in names])
        assert first == second
        assert "rank(s) 1 hold other parameters" in first
