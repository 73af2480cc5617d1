"""Simulated ranks: equal to one process, the same bits every time, and never a hang."""

from __future__ import annotations

import contextlib
import math
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hvdloss
from hvdloss.comm.communicator import OneProcess, simulate
from hvdloss.errors import ConfigError, HvdlossError, NoWeightError
from hvdloss.losses.ledger import Ledger, check_step, pack, unpack
from hvdloss.losses.numpy_ops import NumpyOps
from hvdloss.losses.reduction import REDUCTIONS, reduce_losses

OPS = NumpyOps()


def promptly(size, work, seconds=10.0):
    """Return ``simulate(size, work)``, or raise what it raises; fail if it has not ended in time."""
    outcome = {}

    def target():
        try:
            outcome["value"] = simulate(size, work)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        pytest.fail(f"the simulated ranks hang: nothing after {seconds} s")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


# Sums


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(0, 5), st.data())
def test_a_sum_over_ranks_is_the_sum_of_what_they_brought(size, length, data):
    whole = st.integers(-(2**40), 2**40).map(float)
    brought = [np.array(data.draw(st.lists(whole, min_size=length, max_size=length))) for _ in range(size)]
    for result in promptly(size, lambda c: c.all_reduce(brought[c.rank], "x")):
        assert result.dtype == np.float64
        assert result.tolist() == sum(brought[1:], brought[0]).tolist()


@pytest.mark.parametrize("shape", [(), (1,), (3,), (40,), (4, 10)])
@pytest.mark.parametrize("size", [2, 3, 9, 17])
def test_ranks_are_added_in_rank_order(size, shape):
    rng = np.random.default_rng(size)
    parts = [np.asarray(rng.normal(size=shape) * 10.0 ** rng.integers(-8, 8)) for _ in range(size)]
    in_order = parts[0].copy()
    for part in parts[1:]:
        in_order = in_order + part
    for result in promptly(size, lambda c: c.all_reduce(parts[c.rank], "x")):
        assert result.shape == shape
        assert result.tobytes() == in_order.tobytes()


def test_sums_are_equal_to_the_bit_on_all_ranks_and_between_repeats():
    """Whoever comes first: the ranks arrive in another order each time."""
    rng = np.random.default_rng(7)
    parts = rng.normal(size=(4, 50)) * 10.0 ** rng.integers(-12, 12, size=(4, 50))
    seen = set()
    for repeat in range(8):

        def work(c, repeat=repeat):
            time.sleep(0.002 * ((c.rank + repeat) % 4))
            return c.all_reduce(parts[c.rank], "x").tobytes()

        seen.update(promptly(4, work))
    assert len(seen) == 1


def test_many_exchanges_in_a_row_do_not_mix():
    def work(c):
        sums = [
            c.all_reduce(np.array([float(step * 10 + c.rank)]), f"step {step}").item() for step in range(100)
        ]
        return sums, [c.all_gather_bytes(bytes([c.rank, step]), f"bytes {step}") for step in range(100)]

    for sums, gathered in promptly(3, work):
        assert sums == [30.0 * step + 3.0 for step in range(100)]
        assert gathered == [[bytes([rank, step]) for rank in range(3)] for step in range(100)]


def test_a_result_is_the_ranks_own():
    """What one rank does to its input or its result, no other rank sees."""

    def work(c):
        mine = np.ones(3)
        first = c.all_reduce(mine, "a")
        mine += 100.0
        first += c.rank
        c.all_reduce(np.zeros(1), "all have written")
        return first.tolist()

    assert promptly(3, work) == [[3.0] * 3, [4.0] * 3, [5.0] * 3]


# Ledgers


@settings(max_examples=40)
@given(st.sampled_from(REDUCTIONS), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_simulated_ranks_with_ledgers_equal_one_process(reduction, size, seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(size, 30))
    losses = rng.normal(size=(count, 3))
    weights = rng.uniform(0.1, 3, size=(count, 3)) * (rng.random((count, 3)) < 0.7)
    weights[0, 0] = 1.0
    losses[weights == 0] = math.nan
    passes = [int(n) for n in rng.integers(1, 4, size=size)]
    # Every call has an element: an empty one is test_reduction's concern.
    cuts = np.sort(rng.choice(np.arange(1, count), size=min(sum(passes), count) - 1, replace=False))
    parts = np.split(np.arange(count), cuts)

    def work(c):
        ledger = Ledger.zero()
        for part in parts[c.rank :: c.size]:
            share = 1 / len(parts)
            row = reduce_losses(OPS, losses[part], weights[part], reduction, share=share).row(OPS)
            ledger = ledger.merge(Ledger.of_row(row))
        ledgers = unpack(c.all_reduce(pack(ledger, c.rank, c.size), "ledgers"))
        assert check_step(ledgers, 1) is None
        assert ledgers[c.rank] == ledger
        whole = Ledger.zero()
        for one in ledgers:
            whole = whole.merge(one)
        return whole

    wholes = promptly(size, work)
    assert len(set(wholes)) == 1
    alone = Ledger.of_row(reduce_losses(OPS, losses, weights, reduction).row(OPS))
    scale = np.nansum(np.abs(losses) * weights) / max(alone.denominator, 1e-9)
    assert wholes[0].finish(reduction) == pytest.approx(
        alone.finish(reduction), rel=1e-12, abs=1e-12 * max(scale, 1.0)
    )
    assert wholes[0].weight == pytest.approx(alone.weight, rel=1e-12)
    assert wholes[0].elements == alone.elements == np.count_nonzero(weights)


def test_a_fault_on_one_rank_is_the_same_error_on_every_rank():
    def work(c):
        mine = Ledger(denominator=1.0, nonfinite_losses=float(c.rank == 1))
        return check_step(unpack(c.all_reduce(pack(mine, c.rank, c.size), "ledgers")), 4)

    errors = promptly(3, work)
    assert {(type(error).__name__, str(error)) for error in errors} == {
        ("NonFiniteLossError", str(errors[0]))
    }
    assert "rank 1" in str(errors[0])


# Gathers


@settings(max_examples=40)
@given(st.lists(st.binary(max_size=20), min_size=1, max_size=6))
def test_gather_keeps_the_order_of_ranks_and_uneven_lengths(texts):
    assert promptly(len(texts), lambda c: c.all_gather_bytes(texts[c.rank], "x")) == [texts] * len(texts)


def test_gathered_lists_are_the_ranks_own():
    def work(c):
        got = c.all_gather_bytes(b"%d" % c.rank, "a")
        got.append(b"more")
        c.all_gather_bytes(b"", "all have written")
        return got

    assert promptly(2, work) == [[b"0", b"1", b"more"]] * 2


# Results and sizes


def test_results_come_in_rank_order_and_ranks_know_themselves():
    def work(c):
        time.sleep(0.002 * (c.size - c.rank))
        return c.rank, c.size

    assert promptly(4, work) == [(rank, 4) for rank in range(4)]


@pytest.mark.parametrize("size", [0, -1])
def test_no_ranks_at_all_is_refused(size):
    with pytest.raises(ConfigError, match=f"size={size}"):
        simulate(size, lambda c: None)


def test_one_simulated_rank_is_one_process():
    def work(c):
        return (
            c.rank,
            c.size,
            c.all_reduce(np.array([1.5, -2.0]), "x").tolist(),
            c.all_gather_bytes(b"abc", "y"),
        )

    assert promptly(1, work) == [work(OneProcess())] == [(0, 1, [1.5, -2.0], [b"abc"])]


def test_one_process_returns_a_float64_copy():
    mine = np.array([1, 2, 3], dtype=np.float32)
    total = OneProcess().all_reduce(mine, "x")
    assert total.dtype == np.float64
    total[0] = 9.0
    assert mine.tolist() == [1.0, 2.0, 3.0]
    mine64 = np.ones(2)
    assert not np.shares_memory(OneProcess().all_reduce(mine64, "x"), mine64)


# What goes wrong


class Trouble(Exception):
    """A user's own error."""


@pytest.mark.parametrize("culprit", [0, 1, 3])
def test_a_rank_that_raises_releases_the_others_and_its_own_error_surfaces(culprit):
    released = []

    def work(c):
        try:
            c.all_reduce(np.ones(1), "before")
            if c.rank == culprit:
                time.sleep(0.01)  # the others wait already
                raise Trouble("mine")
            c.all_reduce(np.ones(1), "after")
            c.all_gather_bytes(b"", "never")
        finally:
            released.append(c.rank)

    with pytest.raises(Trouble, match="mine") as caught:
        promptly(4, work)
    assert sorted(released) == [0, 1, 2, 3]
    if hasattr(caught.value, "__notes__"):
        assert f"rank {culprit} of 4" in caught.value.__notes__[0]


def test_when_all_ranks_raise_the_same_error_surfaces():
    def work(c):
        error = check_step(unpack(c.all_reduce(pack(Ledger(), c.rank, c.size), "ledgers")), 1)
        assert error is not None
        raise error

    with pytest.raises(NoWeightError, match="step 1"):
        promptly(3, work)


def test_a_rank_that_exits_releases_the_others():
    def work(c):
        if c.rank == 1:
            raise SystemExit(3)
        c.all_reduce(np.ones(1), "x")

    with pytest.raises(SystemExit):
        promptly(3, work)


CALLS = {
    "two names": lambda c: c.all_reduce(np.ones(1), f"x{c.rank}"),
    "one other name": lambda c: c.all_reduce(np.ones(1), "odd" if c.rank == 2 else "even"),
    "two kinds": lambda c: c.all_reduce(np.ones(1), "x") if c.rank else c.all_gather_bytes(b"", "x"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_ranks_that_call_different_collectives_raise_instead_of_hanging(call):
    with pytest.raises(HvdlossError, match="different collectives"):
        promptly(3, call)


def test_sums_of_different_shapes_raise_instead_of_hanging():
    with pytest.raises((HvdlossError, ValueError)):
        promptly(3, lambda c: c.all_reduce(np.ones(1 + c.rank), "x"))


@pytest.mark.parametrize("early", [0, 1])
def test_a_rank_that_returns_while_others_wait_raises_instead_of_hanging(early):
    """A collective that one rank never calls can never end."""

    def work(c):
        c.all_reduce(np.ones(1), "all")
        if c.rank != early:
            c.all_reduce(np.ones(1), "not all")

    with pytest.raises(HvdlossError):
        promptly(3, work, seconds=3.0)


def test_ranks_that_all_return_after_different_work_are_fine():
    def work(c):
        with contextlib.suppress(ZeroDivisionError):
            _ = 1 / c.rank
        return c.all_reduce(np.ones(1), "x").item()

    assert promptly(3, work) == [3.0] * 3


def test_the_package_offers_them():
    assert hvdloss.simulate is simulate
    assert hvdloss.OneProcess is OneProcess
