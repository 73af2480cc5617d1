"""The link model: what it is told of a link it finds again, through noise, in any units, on every rank."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdloss.comm.communicator import OneProcess, SimulatedRank, simulate
from hvdloss.errors import ConfigError, UsageError
from hvdloss.terms import link as link_module
from hvdloss.terms.link import Fit, LinkModel, Prediction, calibrate, probe_sizes, ring_beta

ALPHAS = st.floats(-6, 0).map(lambda x: 10.0**x)  # a microsecond to a second
BETAS = st.floats(5, 11).map(lambda x: 10.0**x)  # 100 kB/s to 100 GB/s
SEEDS = st.integers(0, 2**32 - 1)


def designs(rng: np.random.Generator, alpha: float, beta: float, count: int, kind: str) -> np.ndarray:
    """Return bytes from well below to well above where alpha and bytes / beta are equal."""
    if kind == "few":  # each several times, as a calibration does
        return rng.choice(alpha * beta * 4.0 ** np.arange(-4, 5), count)
    return alpha * beta * 10 ** rng.uniform(-2, 2, count)


def measured(rng, alpha, beta, count, kind, noise=0.05, slow=0.2, times=10.0) -> list[tuple[float, float]]:
    """Return (seconds, bytes): the model's times, with normal noise, and some of them far too long."""
    size = designs(rng, alpha, beta, count, kind)
    t = (alpha + size / beta) * np.maximum(1 + noise * rng.normal(size=count), 0.2)
    t[rng.choice(count, round(slow * count), replace=False)] *= times
    return list(zip(t.tolist(), size.tolist(), strict=True))


def link_of(**state) -> LinkModel:
    return LinkModel.from_state_dict(state)


def model_of(samples, ranks=2, window=512) -> LinkModel:
    model = LinkModel(ranks, window)
    for sample in samples:
        model.add(*sample)
    return model


def fit_of(model: LinkModel) -> Fit:
    fit = model.fit()
    assert fit is not None
    return fit


# Recovery


@given(ALPHAS, BETAS, SEEDS, st.sampled_from(["few", "all different"]), st.integers(80, 400))
def test_alpha_and_beta_are_found_through_noise_and_a_fifth_of_slow_times(alpha, beta, seed, kind, count):
    fit = fit_of(model_of(measured(np.random.default_rng(seed), alpha, beta, count, kind)))
    assert fit.alpha == pytest.approx(alpha, rel=0.05)
    assert fit.beta == pytest.approx(beta, rel=0.05)
    assert fit.residual == pytest.approx(0.065, abs=0.03)  # 0.05, and what the slow ones add to a median
    assert fit.samples == count


@given(ALPHAS, BETAS, SEEDS, st.floats(1.5, 1000.0))
def test_how_slow_the_slow_ones_are_does_not_matter(alpha, beta, seed, times):
    samples = measured(np.random.default_rng(seed), alpha, beta, 200, "few", noise=0.02, times=times)
    fit = fit_of(model_of(samples))
    assert fit.alpha == pytest.approx(alpha, rel=0.03)
    assert fit.beta == pytest.approx(beta, rel=0.03)


@given(ALPHAS, BETAS, st.lists(st.tuples(st.floats(0, 6), st.integers(1, 9)), min_size=2, max_size=40))
def test_exact_times_are_fitted_exactly(alpha, beta, chosen):
    samples = []
    for exponent, messages in chosen:
        size = alpha * beta * 10 ** (exponent - 3)
        samples.append((alpha * messages + size / beta, size, messages))
    ratios = sorted(size / messages for _, size, messages in samples)
    if ratios[-1] < 1.5 * ratios[0] or ratios[0] > 10 * alpha * beta or ratios[-1] < 0.1 * alpha * beta:
        return  # rounding alone decides what is alpha and what beta
    fit = fit_of(model_of(samples))
    assert fit.alpha == pytest.approx(alpha, rel=1e-6)
    assert fit.beta == pytest.approx(beta, rel=1e-6)
    assert fit.residual < 1e-9


def test_standard_errors_cover_as_often_as_they_say():
    inside, at_knee = [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        alpha, beta = 10 ** rng.uniform(-5, -1), 10 ** rng.uniform(6, 10)
        kind = "few" if seed % 2 else "all different"
        model = model_of(measured(rng, alpha, beta, int(rng.integers(60, 200)), kind))
        fit = fit_of(model)
        size = alpha * beta * 10 ** rng.uniform(-2, 2)
        predicted = model.predict(size, 3)
        inside.append(
            [
                abs(fit.alpha - alpha) < 2 * fit.alpha_std,
                abs(fit.beta - beta) < 2 * fit.beta_std,
                abs(predicted.seconds - 3 * alpha - size / beta) < 2 * predicted.std,
            ]
        )
        # Among sizes that are much alike, errors of alpha and of beta go against each other.
        knee = alpha * beta
        narrow = knee * 10 ** rng.uniform(-0.4, 0.4, 100)
        model = model_of([((alpha + n / beta) * (1 + 0.05 * rng.normal()), n) for n in narrow.tolist()])
        at_knee.append((model.predict(knee).seconds - 2 * alpha) / model.predict(knee).std)
    share = np.mean(inside, axis=0)  # 0.954 for normal errors and a known scale
    assert (share > 0.9).all(), share
    assert (share < 0.99).all(), share
    assert 0.88 < np.std(at_knee) < 1.15


def test_more_times_make_it_surer():
    rng = np.random.default_rng(1)
    samples = measured(rng, 1e-3, 1e8, 400, "few")
    few, many = fit_of(model_of(samples[:100])), fit_of(model_of(samples))
    assert many.alpha_std < 0.7 * few.alpha_std
    assert many.beta_std < 0.7 * few.beta_std


@given(SEEDS)
def test_one_size_with_nearly_all_times_does_not_hide_the_others(seed):
    """As in training: a short calibration, then thousands of steps of one size that is a bit off."""
    rng = np.random.default_rng(seed)
    model = model_of(measured(rng, 1e-3, 1e8, 60, "few", slow=0.0))
    for _ in range(2000):
        model.add(1.1 * (1e-3 + 1e6 / 1e8) * (1 + 0.005 * rng.normal()), 1e6)
    assert len(model) == 512
    fit = fit_of(model)
    assert fit.alpha == pytest.approx(1e-3, rel=0.15)
    assert fit.beta == pytest.approx(1e8, rel=0.15)
    assert model.predict(1e6).seconds == pytest.approx(1.1 * 11e-3, rel=0.02)


def test_a_size_that_does_not_lie_on_the_line_is_not_decisive():
    sizes = [8, 2**10, 2**14, 2**17, 2**19, 2**20, 2**22]
    samples = [(1e-3 + n / 1e8, n) for n in sizes for _ in range(5)]
    samples += [(5 * (1e-3 + 2**18 / 1e8), 2**18)] * 5
    fit = fit_of(model_of(samples))
    assert fit.alpha == pytest.approx(1e-3, rel=1e-3)
    assert fit.beta == pytest.approx(1e8, rel=1e-3)


def test_precise_times_do_not_make_small_errors_outliers():
    sizes = [8, 2**10, 2**14, 2**17, 2**19]
    samples = [(1e-3 + n / 1e8, n) for n in sizes for _ in range(5)]
    samples += [(1.02 * (1e-3 + 2**22 / 1e8), 2**22)] * 5
    assert 1.003 < model_of(samples).predict(2**22).seconds / (1e-3 + 2**22 / 1e8) <= 1.02


def test_times_that_grow_faster_than_size_are_met_as_well_as_a_line_can():
    sizes = 1e3 * 10 ** np.arange(0, 5.5, 0.5)
    for seed in range(0, 200, 2):
        rng = np.random.default_rng(seed)
        chosen = rng.choice(sizes, 60)
        t = 1e-9 * chosen**1.1 * np.maximum(1 + 0.05 * rng.normal(size=60), 0.3)
        t[rng.choice(60, 12, replace=False)] *= 10
        model = model_of(list(zip(t.tolist(), chosen.tolist(), strict=True)))
        errors = [math.log(model.predict(size).seconds / (1e-9 * size**1.1)) for size in sizes]
        assert np.median(np.abs(errors)) < 0.4


# Units


@given(ALPHAS, BETAS, SEEDS, st.integers(-20, 20), st.integers(-20, 20))
def test_other_units_give_the_same_fit_in_those_units(alpha, beta, seed, of_time, of_size):
    """With powers of two even to the last bit."""
    samples = measured(np.random.default_rng(seed), alpha, beta, 60, "few")
    second, byte = 2.0**of_time, 2.0**of_size
    one = fit_of(model_of(samples))
    other = fit_of(model_of([(t * second, size * byte) for t, size in samples]))
    assert other == dataclasses.replace(
        one,
        alpha=one.alpha * second,
        alpha_std=one.alpha_std * second,
        beta=one.beta * byte / second,
        beta_std=one.beta_std * byte / second,
    )


@given(ALPHAS, BETAS, SEEDS, st.permutations(range(80)))
def test_the_order_of_times_does_not_matter(alpha, beta, seed, order):
    samples = measured(np.random.default_rng(seed), alpha, beta, 80, "few")
    assert model_of([samples[i] for i in order]).fit() == model_of(samples).fit()


@given(ALPHAS, BETAS, SEEDS, st.integers(2, 5))
def test_several_messages_at_once_are_the_sum_of_them(alpha, beta, seed, messages):
    samples = measured(np.random.default_rng(seed), alpha, beta, 100, "few", slow=0.1)
    together = [(t * messages, size * messages, messages) for t, size in samples]
    one, other = fit_of(model_of(samples)), fit_of(model_of(together))
    assert other.alpha == pytest.approx(one.alpha, rel=1e-9)
    assert other.beta == pytest.approx(one.beta, rel=1e-9)


# Edges


def test_no_fit_before_two_sizes_differ():
    model = LinkModel(2)
    assert model.fit() is None
    for sample in [(1e-3, 100), (2e-3, 100), (2e-3, 200, 2)]:  # 100 bytes a message, all of them
        model.add(*sample)
        assert model.fit() is None
    model.add(5e-3, 1000)
    assert isinstance(model.fit(), Fit)


def test_two_times_are_met_exactly_and_nothing_is_known_of_the_error():
    model = model_of([(2e-3, 1e3), (11e-3, 10e3)])
    fit = fit_of(model)
    assert (fit.alpha, fit.beta) == (pytest.approx(1e-3), pytest.approx(1e6))
    assert (fit.alpha_std, fit.beta_std, fit.residual) == (math.inf, math.inf, pytest.approx(0, abs=1e-9))
    assert model.predict(1e3) == Prediction(pytest.approx(2e-3), math.inf)


def test_neither_falls_below_zero():
    larger_is_faster = fit_of(model_of([(2e-3, 1e3), (2.1e-3, 1e3), (1e-3, 1e4), (1.1e-3, 1e4)]))
    assert larger_is_faster.beta == larger_is_faster.beta_std == math.inf
    assert 1e-3 <= larger_is_faster.alpha <= 2.1e-3
    assert larger_is_faster.alpha_std > 0
    faster_than_a_line = fit_of(model_of([(1e-3, 1e3), (1.1e-3, 1e3), (20e-3, 1e4), (21e-3, 1e4)]))
    assert faster_than_a_line.alpha == 0
    assert faster_than_a_line.alpha_std > 0
    assert 4e5 < faster_than_a_line.beta < 1.1e6


def test_messages_without_bytes_and_bytes_without_messages():
    fit = fit_of(model_of([(1e-3, 0), (1.01e-3, 0), (5e-3, 1e4, 0), (5.05e-3, 1e4, 0)]))
    assert fit.alpha == pytest.approx(1e-3, rel=0.02)
    assert fit.beta == pytest.approx(2e6, rel=0.02)


@given(st.lists(st.tuples(*[st.floats(1e-9, 1e9)] * 2, st.integers(1, 100)), min_size=2, max_size=30))
@settings(max_examples=200)
def test_any_times_give_a_sound_fit_or_none(samples):
    model = model_of(samples)
    fit = model.fit()
    if fit is None:
        assert len({size / messages for _, size, messages in samples}) < 2
        return
    assert 0 <= fit.alpha < math.inf
    assert fit.beta > 0
    assert fit.alpha + 1 / fit.beta > 0
    assert not math.isnan(fit.alpha_std + fit.beta_std + fit.residual)
    assert min(fit.alpha_std, fit.beta_std, fit.residual) >= 0
    assert not math.isnan(model.predict(1e6, 2, ranks=5).std)


# The window


def test_the_oldest_of_the_most_common_makes_room():
    model = LinkModel(2, window=5)
    for seconds, size in [(1, 10), (2, 20), (3, 20), (4, 30), (5, 20), (6, 20), (7, 40)]:
        model.add(seconds, size)
    assert [sample[:2] for sample in model.state_dict()["samples"]] == [
        [1, 10],
        [4, 30],
        [5, 20],
        [6, 20],
        [7, 40],
    ]
    model.add(8, 50)
    model.add(9, 60)  # no size twice any more: the oldest of all goes
    assert [sample[0] for sample in model.state_dict()["samples"]] == [4, 6, 7, 8, 9]


def test_a_link_that_changed_is_learned_anew():
    rng = np.random.default_rng(3)
    model = model_of(measured(rng, 1e-3, 1e8, 100, "few"), window=100)
    for seconds, size in measured(rng, 1e-3, 1e8, 1, "few", slow=0.0) + [
        ((1e-3 + n / 2e7) * (1 + 0.03 * rng.normal()), n) for n in designs(rng, 1e-3, 1e8, 400, "few")
    ]:
        model.add(seconds, size)
    assert fit_of(model).beta == pytest.approx(2e7, rel=0.05)


def test_a_fit_is_made_once_until_there_is_more(monkeypatch):
    model = model_of(measured(np.random.default_rng(0), 1e-3, 1e8, 50, "few"))
    calls = []
    original = link_module._solve
    monkeypatch.setattr(link_module, "_solve", lambda samples: calls.append(1) or original(samples))
    assert model.fit() is model.fit()
    model.predict(100)
    assert len(calls) == 1
    model.add(1e-3, 10)
    model.fit()
    assert len(calls) == 2


# Predictions


def test_another_number_of_ranks_goes_by_the_ring():
    hop, link = 1e-4, 1e8  # seconds per step, bytes per second of each link
    p, q = 4, 16
    model = LinkModel(p)
    for size in (100, 1e4, 1e6, 1e7):
        model.add(2 * (p - 1) * hop + 2 * (p - 1) / p * size / link, size)
    assert fit_of(model).beta == pytest.approx(ring_beta(link, p))
    assert model.predict(3e6, ranks=q).seconds == pytest.approx(
        2 * (q - 1) * hop + 2 * (q - 1) / q * 3e6 / link
    )
    assert model.predict(3e6, 5, ranks=2).seconds == pytest.approx(5 * 2 * hop + 3e6 / link)
    assert model.predict(3e6, ranks=p) == model.predict(3e6)
    assert model.predict(3e6, ranks=1) == Prediction(0.0, 0.0)


@given(ALPHAS, BETAS, SEEDS, st.integers(2, 64), st.integers(2, 64), st.floats(1, 1e9))
def test_there_and_back_is_where_it_was(alpha, beta, seed, p, q, size):
    """What p ranks predict for q, fitted on q, predicts for p what p measured."""
    samples = measured(np.random.default_rng(seed), alpha, beta, 40, "few", noise=0, slow=0)
    here = model_of(samples, ranks=p)
    there = LinkModel(q)
    for _, one in samples:
        there.add(here.predict(one, ranks=q).seconds, one)
    assert there.predict(size, ranks=p).seconds == pytest.approx(here.predict(size).seconds, rel=1e-6)


def test_another_link():
    model = model_of([(1e-3 + n / 1e8, n) for n in (8, 1e3, 1e5, 1e6)] * 3)
    assert model.predict(1e6, 2, beta=1e7).seconds == pytest.approx(2e-3 + 0.1)
    assert model.predict(1e6, 2, alpha=1e-4).seconds == pytest.approx(2e-4 + 0.01)
    assert model.predict(1e6, 2, alpha=0, beta=math.inf) == Prediction(0.0, 0.0)
    # What is given is known, and is as this number of ranks sees it.
    four = model_of([(1e-3 + n / 1e8, n) for n in (8, 1e3, 1e5, 1e6)] * 3, ranks=4)
    assert four.predict(1e6, beta=ring_beta(1e7, 4), alpha=0).seconds == pytest.approx(1.5 * 0.1)
    assert four.predict(1e6, beta=ring_beta(1e7, 4), alpha=0, ranks=2).seconds == pytest.approx(0.1)
    assert four.predict(1e6, beta=ring_beta(1e7, 4), alpha=0, ranks=2).std == 0


def test_with_both_given_no_times_are_needed():
    assert LinkModel(2).predict(1e6, 3, alpha=1e-3, beta=1e9).seconds == pytest.approx(4e-3)
    assert LinkModel(1).predict(1e6) == Prediction(0.0, 0.0)
    assert ring_beta(1e9, 1) == math.inf


def test_nothing_takes_no_time_and_errors_grow_with_size():
    model = model_of(measured(np.random.default_rng(0), 1e-3, 1e8, 100, "few"))
    assert model.predict(0, 0) == Prediction(0.0, 0.0)
    assert 0 < model.predict(1e5).std < model.predict(1e7).std


# State


@given(ALPHAS, BETAS, SEEDS, st.integers(0, 30))
def test_a_restored_model_goes_on_to_the_last_bit(alpha, beta, seed, count):
    rng = np.random.default_rng(seed)
    samples = measured(rng, alpha, beta, count + 10, "few")
    model = model_of(samples[:count], ranks=3, window=20)
    other = LinkModel.from_state_dict(json.loads(json.dumps(model.state_dict(), allow_nan=False)))
    for sample in samples[count:]:
        model.add(*sample)
        other.add(*sample)
    assert other.state_dict() == model.state_dict()
    assert other.fit() == model.fit()
    assert other.predict(12345, 2, ranks=7) == model.predict(12345, 2, ranks=7)


# Errors


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: LinkModel(0), "ranks=0"),
        (lambda: LinkModel(2.0), "ranks=2.0"),
        (lambda: LinkModel(2, window=1), "window=1"),
        (lambda: LinkModel(2).add(0, 10), "seconds=0"),
        (lambda: LinkModel(2).add(-1, 10), "seconds=-1"),
        (lambda: LinkModel(2).add(math.nan, 10), "seconds=nan"),
        (lambda: LinkModel(2).add(math.inf, 10), "seconds=inf"),
        (lambda: LinkModel(2).add("long", 10), "seconds='long'"),
        (lambda: LinkModel(2).add(1, -8), "bytes=-8"),
        (lambda: LinkModel(2).add(1, 8, -1), "messages=-1"),
        (lambda: LinkModel(2).add(1, 0, 0), "nothing was sent"),
        (lambda: LinkModel(2).predict(-1), "bytes=-1"),
        (lambda: LinkModel(2).predict(1, math.nan), "messages=nan"),
        (lambda: LinkModel(2).predict(1, ranks=0), "ranks=0"),
        (lambda: LinkModel(2).predict(1, beta=0), "beta=0"),
        (lambda: LinkModel(2).predict(1, alpha=-1), "alpha=-1"),
        (lambda: LinkModel(2).predict(1, alpha=math.inf), "alpha=inf"),
        (lambda: LinkModel(1).predict(1, ranks=2), "ranks=2"),
        (lambda: link_of(ranks=2), "not what LinkModel.state_dict"),
        (
            lambda: LinkModel.from_state_dict({"ranks": 2, "window": 9, "samples": [[1, 2]]}),
            "not what LinkModel",
        ),
        (
            lambda: LinkModel.from_state_dict({"ranks": 2, "window": 2, "samples": [[1, 2, 3]] * 3}),
            "window=2",
        ),
        (lambda: ring_beta(-1, 2), "link=-1"),
        (lambda: calibrate(OneProcess(), LinkModel(1), budget_s=0), "budget_s=0"),
        (lambda: calibrate(OneProcess(), LinkModel(2)), "ranks=2"),
    ],
)
def test_what_cannot_be_used_is_named(call, named):
    with pytest.raises(ConfigError, match=named.replace("(", r"\(")):
        call()


def test_a_refused_time_changes_nothing():
    model = model_of([(1e-3, 10), (2e-3, 1000)])
    before, fit = model.state_dict(), model.fit()
    with pytest.raises(ConfigError):
        model.add(1.0, math.nan)
    assert (model.state_dict(), model.fit()) == (before, fit)


def test_a_prediction_without_a_fit_says_what_to_do():
    with pytest.raises(UsageError, match="calibrate"):
        LinkModel(2).predict(100)
    with pytest.raises(UsageError, match="of 1 time"):
        model_of([(1e-3, 10)]).predict(100, beta=1e9)


# Calibration


def calibrated(monkeypatch, ranks, alpha, beta, late=None, **options):
    """Return each rank's model, fit, calls and seconds after a calibration over such a link.

    A clock per rank moves with its sums only; ``late(rank, name, number)`` adds to the number-th of a name.
    """
    now = {}

    class Time:
        @staticmethod
        def perf_counter():
            return now.setdefault(threading.get_ident(), 0.0)

    class Rank(SimulatedRank):
        def __init__(self, base):
            super().__init__(base._room, base.rank)
            self.calls = []

        def all_reduce(self, array, name):
            self.calls.append((name, array.shape))
            now.setdefault(threading.get_ident(), 0.0)
            number = [called for called, _ in self.calls].count(name)
            delay = late(self.rank, name, number) if late else 0.0
            now[threading.get_ident()] += alpha + array.nbytes / beta + delay
            return super().all_reduce(array, name)

        def all_gather_bytes(self, data, name):
            self.calls.append((name, ()))
            return super().all_gather_bytes(data, name)

    monkeypatch.setattr(link_module, "time", Time)

    def work(base):
        rank, model = Rank(base), LinkModel(ranks)
        return model, calibrate(rank, model, **options), rank.calls, now[threading.get_ident()]

    return simulate(ranks, work)


@pytest.mark.parametrize(("alpha", "beta"), [(1e-3, 25e6), (2e-3, 1e9), (1e-5, 1e10), (0.05, 1e6)])
def test_a_calibration_finds_the_link(monkeypatch, alpha, beta):
    results = calibrated(monkeypatch, 3, alpha, beta)
    for model, fit, calls, _ in results:
        assert fit.alpha == pytest.approx(alpha, rel=1e-6)
        assert fit.beta == pytest.approx(beta, rel=1e-6)
        assert model.state_dict() == results[0][0].state_dict()
        assert calls == results[0][2]


def test_a_calibration_keeps_to_its_budget_and_to_one_shape_per_name(monkeypatch):
    ((_, _, fast, seconds), *_) = calibrated(monkeypatch, 2, 1e-3, 5e9)
    assert seconds < 0.3
    sizes = [size for size, _ in probe_sizes()]
    assert {f"hvdloss.probe.{size}" for size in sizes} < {name for name, _ in fast}
    assert len({name for name, _ in fast}) == len(set(fast))
    ((_, _, slow, seconds), *_) = calibrated(monkeypatch, 2, 1e-3, 25e6)
    assert 0.2 < seconds < 0.55
    assert max(shape[0] for _, shape in slow if shape) < sizes[-1] / 8
    ((_, _, mine, seconds), *_) = calibrated(monkeypatch, 2, 1e-3, 25e6, budget_s=2.0, name="mine")
    assert seconds < 2.1
    assert {name.split(".")[0] for name, _ in mine} == {"mine"}
    assert len(mine) > len(slow)


def test_a_slow_start_does_not_end_before_bytes_have_shown(monkeypatch):
    ((_, fit, _, _), *_) = calibrated(monkeypatch, 2, 0.5, 1e6, budget_s=0.1)
    assert fit.beta == pytest.approx(1e6, rel=1e-3)


def test_who_came_last_is_believed(monkeypatch):
    """Rank 1 waits for rank 0 each time, now and then half a second: rank 0's times are the link's."""

    def late(rank, name, number):
        return (0.5 if number % 7 == 0 else 2e-3) if rank == 1 else 0.0

    results = calibrated(monkeypatch, 2, 1e-3, 5e8, late, budget_s=20.0)
    for model, fit, calls, _ in results:
        assert fit.alpha == pytest.approx(1e-3, rel=1e-6)
        assert fit.beta == pytest.approx(5e8, rel=1e-6)
        assert calls == results[0][2]
        assert model.state_dict() == results[0][0].state_dict()


def test_the_first_sum_of_a_size_is_no_sample(monkeypatch):
    ((model, _, _, _), *_) = calibrated(
        monkeypatch, 2, 1e-3, 5e8, lambda rank, name, number: 0.01 if number == 1 else 0.0
    )
    for seconds, size, messages in model.state_dict()["samples"]:
        assert seconds == pytest.approx(1e-3 * messages + size / 5e8)


def test_one_busy_moment_does_not_end_it(monkeypatch):
    busy, last = (f"hvdloss.probe.{probe_sizes()[place][0]}" for place in (2, -1))
    ((_, _, calls, _), *_) = calibrated(
        monkeypatch, 2, 1e-3, 5e9, lambda rank, name, number: 0.1 * (name == busy and number <= 2)
    )
    assert last in {name for name, _ in calls}


def test_a_second_calibration_adds_to_the_first():
    def work(c):
        model = LinkModel(2)
        first = calibrate(c, model, budget_s=0.05)
        count = len(model)
        second = calibrate(c, model, budget_s=0.05)
        assert len(model) > count
        return model.state_dict(), first, second

    (one, two) = simulate(2, work)
    assert one == two


def test_real_waiting_ranks_hold_equal_models():
    """By real clocks, with ranks that come late in turn."""

    class Late(SimulatedRank):
        calls = 0

        def all_reduce(self, array, name):
            self.calls += 1
            if self.calls % self.size == self.rank:
                time.sleep(0.001)
            return super().all_reduce(array, name)

    def work(c):
        model = LinkModel(3)
        calibrate(Late(c._room, c.rank), model, budget_s=0.1)
        return model

    models = simulate(3, work)
    assert len({json.dumps(model.state_dict()) for model in models}) == 1
    assert len({model.fit() for model in models}) == 1
    assert len({model.predict(12345, ranks=9) for model in models}) == 1


def test_one_rank_measures_nothing():
    model = LinkModel(1)
    assert calibrate(OneProcess(), model) is None
    assert len(model) == 0


def test_probes_grow_and_are_whole_float64():
    sizes = [size for size, _ in probe_sizes()]
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 8
    assert sizes[-1] == 4 * 2**20
    assert all(size % 8 == 0 and repeats >= 4 for size, repeats in probe_sizes())
