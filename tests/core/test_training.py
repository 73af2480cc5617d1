"""Training well: decisions equal on ranks, files that are whole, seeds, mixing, and learning rates."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hvdloss
from hvdloss.comm.communicator import simulate
from hvdloss.train import (
    BestCheckpoint,
    EarlyStopping,
    Warmup,
    generator_for,
    merged_value,
    mixup,
    partners,
    scale_factor,
    seed_for,
    write_atomically,
)

# -- decisions ----------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(0, 50)), min_size=1, max_size=5))
def test_a_merged_value_is_the_mean_of_all_ranks_samples(parts):
    if not sum(n for _, n in parts):
        return
    parts = [(v if n else math.nan, n) for v, n in parts]  # a rank without samples has no mean
    found = simulate(len(parts), lambda c: merged_value(c, *parts[c.rank]))
    assert len(set(found)) == 1
    whole = np.concatenate([np.full(n, v) for v, n in parts])
    assert found[0] == pytest.approx(whole.mean(), rel=1e-12, abs=1e-12)


def errors_of(ranks, work):
    """Return what every rank raises."""
    errors = []

    def catch(communicator):
        try:
            work(communicator)
        except hvdloss.HvdlossError as error:
            errors.append((type(error), error.args[0]))

    simulate(ranks, catch)
    assert len(errors) == ranks
    assert len(set(errors)) == 1
    return errors[0]


@pytest.mark.parametrize(
    ("values", "kind", "text"),
    [
        ([(1.0,), (2.0,)], hvdloss.AgreementError, "rank 1 has 2.0, rank 0 has 1.0"),
        ([(1.0,), (math.nan,)], hvdloss.AgreementError, "rank 1 has nan"),
        ([(1.0, 3), (2.0,)], hvdloss.AgreementError, "not on 1"),
        ([(1.0, 3), (2.0, -1)], hvdloss.WeightError, "rank 1: weight=-1.0"),
        ([(1.0, 3), ("x", 1)], hvdloss.ConfigError, "rank 1: value='x' is no number"),
        ([(1.0, 0), (1.0, 0)], hvdloss.NoWeightError, "0 on all of 2"),
    ],
)
def test_values_that_cannot_be_merged_are_the_same_error_everywhere(values, kind, text):
    found, message = errors_of(2, lambda c: merged_value(c, *values[c.rank]))
    assert found is kind
    assert text in message


def test_equal_values_need_no_weight():
    assert simulate(3, lambda c: merged_value(c, np.float32(0.5))) == [0.5] * 3
    assert all(math.isnan(x) for x in simulate(2, lambda c: merged_value(c, math.nan)))
    assert math.isnan(simulate(2, lambda c: merged_value(c, [1.0, math.nan][c.rank], 1))[0])
    assert simulate(2, lambda c: merged_value(c, [1.0, math.inf][c.rank], 1)) == [math.inf] * 2


def test_ranks_stop_together_where_each_alone_would_not():
    """The rank with few samples would have stopped at once, the other one never."""
    values = [[1.0, 0.9, 0.8, 0.85, 0.9, 0.95], [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]]

    def work(communicator):
        stopping = EarlyStopping(patience=2, communicator=lambda: communicator)
        for step, value in enumerate(values[communicator.rank]):
            if stopping.step(value, [99, 1][communicator.rank]):
                return step, stopping.best_step, stopping.best
        return None

    found = simulate(2, work)
    assert found[0] == found[1]
    assert found[0][:2] == (4, 2)
    assert found[0][2] == pytest.approx((99 * 0.8 + 1.2) / 100)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_stopping_counts_as_documented(mode):
    sign = 1 if mode == "min" else -1
    stopping = EarlyStopping(patience=2, mode=mode, min_delta=0.1)
    seen = [stopping.step(sign * v) for v in (1.0, 0.95, 0.85, 0.8, 0.7, math.nan, 0.69)]
    assert seen == [False, False, False, False, False, False, True]  # 0.8 is no gain of more than 0.1
    assert stopping.best == sign * 0.7
    assert stopping.best_step == 4
    again = EarlyStopping(patience=2, mode=mode, min_delta=0.1)
    again.load_state_dict(stopping.state_dict())
    assert again.stopped
    assert not again.step(sign * 0.1)
    with pytest.raises(hvdloss.ConfigError, match="must have best"):
        again.load_state_dict({"best": 1.0})


def test_nan_is_worse_than_anything_or_an_error():
    stopping = EarlyStopping(patience=3)
    assert [stopping.step(v) for v in (math.nan, math.inf, math.nan, math.nan)] == [False] * 4
    assert stopping.best == math.inf  # better than NaN
    assert stopping.step(math.nan)
    kind, text = errors_of(
        2, lambda c: EarlyStopping(nan="raise", communicator=lambda: c).step([1.0, math.nan][c.rank], 1)
    )
    assert kind is hvdloss.NonFiniteLossError
    assert "NaN" in text


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: EarlyStopping(-1), "patience=-1"),
        (lambda: EarlyStopping(1.5), "patience=1.5"),
        (lambda: EarlyStopping(mode="up"), "mode='up'"),
        (lambda: EarlyStopping(nan="best"), "nan='best'"),
        (lambda: EarlyStopping(min_delta=-0.1), "min_delta=-0.1"),
        (lambda: scale_factor(0, 1), "batch=0"),
        (lambda: scale_factor(1, 1, "cubic"), "rule='cubic'"),
        (lambda: Warmup(0.0, 1), "factor=0.0"),
        (lambda: Warmup(1.0, -1), "steps=-1"),
        (lambda: seed_for(-1), "seed=-1"),
        (lambda: seed_for(1, rank=0.5), "rank=0.5"),
        (lambda: partners(3, 0.0, np.random.default_rng(0)), "alpha=0.0"),
        (lambda: mixup([1, 2], [1, 2], rng=np.random.default_rng(0)), "only floats"),
        (lambda: mixup([1.0, 2.0], [1], rng=np.random.default_rng(0)), "2, 1 and 1 rows"),
    ],
)
def test_arguments_that_cannot_be_used(make, text):
    with pytest.raises(hvdloss.ConfigError, match=text.replace(".", r"\.")):
        make()


# -- files --------------------------------------------------------------------------------------------


def test_the_best_state_is_written_by_one_rank_and_read_by_all(tmp_path):
    def work(communicator):
        path = tmp_path / "there" / f"best-{communicator.rank}"  # as if ranks shared no disk
        best = BestCheckpoint(path, root=1, communicator=lambda: communicator)
        wrote = [best.step(v, f"{v}".encode()) for v in (3.0, 2.0, math.nan, 2.5)]
        assert best.step(1.0, lambda: b"called")
        return wrote, best.read(), best.best_step

    assert simulate(3, work) == [([True, True, False, False], b"called", 4)] * 3
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["best-1"]


def test_a_state_that_cannot_be_written_is_an_error_on_every_rank_and_keeps_the_former(tmp_path):
    def failing():
        raise OSError("no state")

    def work(communicator):
        best = BestCheckpoint(tmp_path / "best", communicator=lambda: communicator)
        best.step(2.0, b"good")
        before = best.state_dict()
        texts = []
        for state in (failing if communicator.rank == 1 else bytes, "no bytes"):
            with pytest.raises(hvdloss.ConfigError) as caught:
                best.step(1.0, state)
            texts.append(str(caught.value))
            assert best.state_dict() == before
            assert best.read() == b"good"
        return texts

    found = simulate(2, work)
    assert found[0] == found[1]
    assert "rank 1 could not give the best state: OSError: no state" in found[0][0]
    assert "rank 0 could not write the best state: TypeError" in found[0][1]
    kind, text = errors_of(2, lambda c: BestCheckpoint(tmp_path / "none", communicator=lambda: c).read())
    assert kind is hvdloss.ConfigError
    assert "rank 0 could not read" in text


def test_a_writer_that_raises_leaves_nothing(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"one"))
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, lambda file: file.write(b"two" * (1 // 0)))
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_is_killed_keeps_the_former_file(tmp_path):
    path = tmp_path / "best"
    code = f"""
        import time
        from hvdloss.train import write_atomically
        write_atomically({str(path)!r}, lambda file: file.write(b"whole"))
        def slowly(file):
            while True:
                file.write(b"half" * 100_000)
                file.flush()
                time.sleep(0.001)
        write_atomically({str(path)!r}, slowly)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    try:
        new = tmp_path / ".unfinished-best"
        deadline = time.monotonic() + 60
        while not (new.exists() and new.stat().st_size > 1_000_000):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert path.read_bytes() == b"whole"
    write_atomically(path, lambda file: file.write(b"next"))  # over what was left
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"next"


# -- seeds --------------------------------------------------------------------------------------------


def test_seeds_differ_by_all_they_are_for_and_stay_the_same_for_ever():
    keys = itertools.product(range(3), range(5), range(4), range(3), ("", "dropout", "mixup"))
    seeds = [seed_for(s, rank=r, epoch=e, step=t, stream=n) for s, r, e, t, n in keys]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # A rerun on another machine must find the same: these numbers must never change.
    assert seed_for(0) == 2943202486218019165
    assert seed_for(7, rank=3, epoch=2, stream="dropout") == 6116920584335867482
    a, b = (generator_for(1, rank=rank).random(4) for rank in (0, 1))
    assert (a != b).all()


# -- mixing -------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 20), st.integers(0, 2**32), st.sampled_from([0.1, 1.0, 8.0]), st.booleans())
def test_the_loss_of_pairs_is_that_of_mixup(n, seed, alpha, weighted):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, 2, 3)), rng.standard_normal(n)
    w = rng.random(n) * (rng.random(n) < 0.7) if weighted else None
    if weighted:
        x[w == 0] = np.nan  # absent, and never mixed into others
    mixed = mixup(x, y, w, alpha=alpha, rng=np.random.default_rng(seed))
    v = np.ones(n) if w is None else w
    share, partner = partners(n, alpha, np.random.default_rng(seed), None if w is None else w != 0)
    assert sorted(partner) == list(range(n))
    above = below = 0.0
    for i in range(n):
        if v[i]:
            j = partner[i]
            assert v[j]
            np.testing.assert_allclose(mixed.x[i], share[i] * x[i] + (1 - share[i]) * x[j])
            out = mixed.x[i].sum()
            above += share[i] * v[i] * abs(out - y[i]) ** 3 + (1 - share[i]) * v[j] * abs(out - y[j]) ** 3
            below += share[i] * v[i] + (1 - share[i]) * v[j]
    p, t, weight = mixed.pairs(mixed.x.sum((1, 2)))
    assert len(p) == len(t) == len(weight) == 2 * n
    here = weight > 0
    assert (weight[here] * np.abs(p - t)[here] ** 3).sum() == pytest.approx(above, rel=1e-12)
    assert weight.sum() == pytest.approx(below, rel=1e-12)


# -- learning rates -----------------------------------------------------------------------------------


def test_scaling_and_warmup():
    assert scale_factor(1024, 128) == 8
    assert scale_factor(1024, 64, "sqrt") == 4
    assert scale_factor(64, 128) == 0.5
    assert [Warmup(8.0, 7)(s) for s in (0, 1, 7, 100)] == [1, 2, 8, 8]
    assert [Warmup(8.0, 0)(s) for s in (0, 1)] == [8, 8]
    # From two ranks to three in the middle of training, and a schedule beside.
    again = Warmup(3.0, 10, start=2.0, begin=50, then=lambda step: 0.5 if step >= 55 else 1.0)
    assert [again(s) for s in (0, 50, 54, 55, 60, 99)] == [2, 2, 2.4, 1.25, 1.5, 1.5]
