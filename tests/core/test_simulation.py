"""The simulator: its formulas, and the controllers that it drives, up to ten thousand ranks."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdloss.errors import ConfigError
from hvdloss.losses.ledger import COLUMN, LEDGER_WIDTH
from hvdloss.simulation.model import (
    BACKWARD,
    ComputeModel,
    LossModel,
    NetworkModel,
    Outcome,
    TrainingPlan,
    simulate_training,
)
from hvdloss.terms.link import LinkModel
from hvdloss.terms.policies import AdaptiveCompression, BatchShares, OuterStep, SyncPeriod
from hvdloss.terms.policies.log import read, replay

MODEL = 8e6  # bytes
some = settings(max_examples=40, deadline=None)


def plan(ranks: int = 4, per_rank: int = 32, **more: Any) -> TrainingPlan:
    return TrainingPlan(
        **{"ranks": ranks, "batch_size": ranks * per_rank, "bytes": MODEL, "steps": 40, **more}
    )


def table_bytes(ranks: int) -> int:
    """What the ledgers add to a bucket of float32: four numbers for each of theirs."""
    return ranks * LEDGER_WIDTH * 4 * 4


# -- the formulas -------------------------------------------------------------------------------------


@some
@given(
    ranks=st.integers(1, 40),
    per_rank=st.integers(1, 100),
    per_sample=st.floats(1e-5, 1e-1),
    fixed=st.floats(0, 0.1),
    latency=st.floats(0, 1e-2),
    bandwidth=st.floats(1e5, 1e11),
    messages=st.integers(1, 9),
)
def test_equal_ranks_without_noise_take_what_the_formula_says(
    ranks: int,
    per_rank: int,
    per_sample: float,
    fixed: float,
    latency: float,
    bandwidth: float,
    messages: int,
) -> None:
    out = simulate_training(
        plan(
            ranks,
            per_rank,
            steps=4,
            messages=messages,
            compute=ComputeModel(per_sample, fixed),
            network=NetworkModel(latency, bandwidth),
        )
    )
    payload = MODEL + table_bytes(ranks)
    ring = messages * 2 * (ranks - 1) * latency + 2 * (ranks - 1) / ranks * payload / bandwidth
    computing = fixed + per_rank * per_sample
    np.testing.assert_allclose(out.step_seconds, computing + ring, rtol=1e-12)
    assert out.overall.computing == pytest.approx(computing / (computing + ring), rel=1e-12)
    assert out.overall.efficiency == pytest.approx(out.overall.computing, rel=1e-9)
    assert out.overall.waiting == pytest.approx(0, abs=1e-12)
    assert out.overall.samples_per_second == pytest.approx(ranks * per_rank / (computing + ring), rel=1e-9)
    assert not out.decisions
    assert (out.exchanges, out.bytes) == (4, pytest.approx(4 * payload))


def test_local_steps_pay_one_exchange_a_stretch_and_wait_once() -> None:
    slow = {1: 3.0}
    network = NetworkModel(1e-3, 1e8)
    out = simulate_training(
        plan(
            steps=21,
            policies=(SyncPeriod(5),),
            compute=ComputeModel(1e-3, slow=slow),
            network=network,
            loss=LossModel(drift=0.25),
        )
    )
    # The first step is done together, as by the optimizers that lay out their buckets in it.
    assert out.periods.tolist() == [1] + 20 * [5]
    assert out.exchanges == 5
    parameters = network.seconds(MODEL + 8 * 4 * LEDGER_WIDTH, 2, 4)
    np.testing.assert_allclose(out.step_seconds[1:], 3 * 0.032 + parameters / 5, rtol=1e-12)
    slowdown = SyncPeriod(5).slowdown(5, 0.25)
    assert slowdown > 0
    assert out.effective_steps == pytest.approx(1 + 20 / (1 + slowdown))


def test_what_overlaps_the_backward_pass_costs_nothing() -> None:
    def of(overlap: float, per_sample: float) -> float:
        network = NetworkModel(0, 1e9, overlap=overlap)
        return simulate_training(plan(compute=ComputeModel(per_sample), network=network)).overall.step_seconds

    exchange = NetworkModel(0, 1e9).seconds(MODEL + table_bytes(4), 1, 4)
    assert of(0.5, 1e-2) == pytest.approx(0.32 + exchange / 2)
    assert of(1.0, 1e-2) == pytest.approx(0.32)
    # Not more than the backward pass lasts.
    assert of(1.0, 1e-4) == pytest.approx(0.0032 + exchange - BACKWARD * 0.0032)


def test_handling_is_paid_by_the_byte_and_never_hidden() -> None:
    def of(policies: tuple[Any, ...], **more: float) -> float:
        network = NetworkModel(0, 1e9, overlap=1.0, **more)
        asked = plan(steps=41, compute=ComputeModel(1e-2), network=network, policies=policies)
        return float(simulate_training(asked).step_seconds[-1])

    assert of((), handling=1e-9) - of(()) == pytest.approx(MODEL * 1e-9)
    assert of((), parameter_handling=1e-9) == of(())
    period = (SyncPeriod(4),)
    assert of(period, parameter_handling=1e-9) - of(period) == pytest.approx(MODEL * 1e-9 / 4)
    assert of(period, handling=1e-9) == of(period)


def test_a_slow_link_sets_the_pace_of_the_ring_and_hosts_shorten_it() -> None:
    fast = NetworkModel(1e-5, 1e9)
    assert fast.seconds(1e6, 1, 1) == 0
    assert replace(fast, per_exchange=0.5).seconds(0, 3, 2) == pytest.approx(0.5 + 3 * 2 * 1e-5)
    assert replace(fast, slow={3: 1e6}).seconds(1e6, 1, 4) == pytest.approx(6e-5 + 1.5)
    halving = replace(fast, algorithm="halving")
    assert halving.seconds(0, 1, 1000) == pytest.approx(20 * 1e-5)
    hosts = replace(fast, local_ranks=8, local_latency=1e-7, local_bandwidth=1e11)
    assert hosts.seconds(1e6, 2, 8) == pytest.approx(2 * 14 * 1e-7 + 1.75 * 1e6 / 1e11)
    assert hosts.seconds(0, 1, 64) == pytest.approx(14 * 1e-5 + 14 * 1e-7)
    assert hosts.seconds(1e6, 1, 64) < fast.seconds(1e6, 1, 64)


@some
@given(
    ranks=st.integers(2, 64),
    measured=st.integers(2, 16),
    alpha=st.floats(1e-6, 1e-2),
    beta=st.floats(1e6, 1e10),
    size=st.floats(1, 1e9),
    messages=st.integers(1, 20),
)
def test_a_measured_link_costs_what_its_model_predicts(
    ranks: int, measured: int, alpha: float, beta: float, size: float, messages: int
) -> None:
    link = LinkModel(measured)
    for n in (8, 2**14, 2**20, 2**26):
        link.add(alpha + n / beta, n)
    network = NetworkModel.from_link(link)
    expected = link.predict(size, messages, ranks=ranks).seconds
    assert network.seconds(size, messages, ranks) == pytest.approx(expected, rel=1e-9)


def test_links_of_several_numbers_of_ranks_tell_what_grows_with_them() -> None:
    true = NetworkModel(20e-6, 1e9, per_exchange=1e-3)
    fits = {p: (true.seconds(0, 1, p), p / (2 * (p - 1)) * 1e9) for p in (2, 4, 8)}
    found = NetworkModel.from_fits(fits, overlap=0.3)
    assert (found.latency, found.per_exchange, found.bandwidth, found.overlap) == pytest.approx(
        (20e-6, 1e-3, 1e9, 0.3)
    )
    constant = NetworkModel.from_fits({2: (1e-3, math.inf), 4: (0.9e-3, math.inf)})
    assert constant.latency == 0
    assert 0.9e-3 < constant.per_exchange < 1e-3
    assert constant.bandwidth == math.inf
    growing = NetworkModel.from_fits({2: (1e-3, 1e9), 4: (4e-3, 1e9)})  # more than with the hops
    assert growing.per_exchange == 0 < growing.latency


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_computation_has_the_mean_and_the_tail_that_were_asked_for(noise: float) -> None:
    model = ComputeModel(1e-3, 5e-3, noise=noise, tail=0.1, tail_seconds=0.2, tail_shape=3.0)
    rng = np.random.default_rng(0)
    seconds = model.seconds(np.full(200_000, 10), np.ones(200_000), rng)
    assert seconds.mean() == pytest.approx(0.015 + 0.1 * 0.2 * 1.5, rel=0.01)
    late = seconds > 0.2
    assert late.mean() == pytest.approx(0.1, rel=0.05)
    # A Pareto distribution of shape 3: an eighth of the delays is twice the least or more.
    assert (seconds > 0.415).mean() == pytest.approx(0.1 / 8, rel=0.1)


def test_stragglers_are_as_many_as_asked_for_and_chosen_by_the_seed() -> None:
    model = ComputeModel(slow={0: 5.0}, slow_share=0.1, slow_factor=2.0)
    one, two = model.factors(1000, seed=1), model.factors(1000, seed=2)
    assert (one[1:] == 2).sum() in (99, 100)
    assert one[0] == two[0] == 5
    assert (one != two).any()
    assert (one == model.factors(1000, seed=1)).all()


def test_the_loss_falls_to_its_floor_and_local_steps_count_for_less() -> None:
    model = LossModel(start=3.0, floor=1.0, exponent=1.0, scale=10.0)
    assert [model.after(e) for e in (0, 10, 1e12)] == pytest.approx([3.0, 2.0, 1.0])
    exact = simulate_training(plan(loss=model))
    np.testing.assert_allclose(exact.losses, [model.after(e) for e in range(40)])
    local = simulate_training(plan(loss=model, policies=(SyncPeriod(16),)))
    assert local.losses[-1] > exact.losses[-1]
    assert exact.seconds_to(2.0) == pytest.approx(exact.step_seconds[:10].sum())
    assert exact.seconds_to(0.5) is None
    noisy = simulate_training(plan(loss=replace(model, noise=0.1), steps=2000))
    smooth = [model.after(e) for e in range(2000)]
    assert float(np.mean(noisy.losses / smooth)) == pytest.approx(1.0, abs=0.01)
    assert float(np.std(noisy.losses / smooth)) == pytest.approx(0.1, rel=0.1)


# -- properties ---------------------------------------------------------------------------------------


@some
@given(
    ranks=st.integers(1, 24),
    bandwidth=st.floats(1e5, 1e9),
    factor=st.floats(1, 100),
    period=st.sampled_from([None, 4]),
    overlap=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_more_bandwidth_is_never_slower(
    ranks: int, bandwidth: float, factor: float, period: int | None, overlap: float, seed: int
) -> None:
    def seconds(rate: float) -> float:
        policies = () if period is None else (SyncPeriod(period),)
        network = NetworkModel(1e-4, rate, overlap=overlap, jitter=0.2)
        compute = ComputeModel(1e-4, noise=0.3, tail=0.1)
        return simulate_training(
            plan(ranks, steps=9, policies=policies, network=network, compute=compute, seed=seed)
        ).seconds

    assert seconds(bandwidth * factor) <= seconds(bandwidth) * (1 + 1e-12)


@some
@given(
    ranks=st.integers(2, 32),
    slow=st.floats(1.5, 20),
    straggler=st.integers(0, 31),
    per_rank=st.integers(16, 200),
)
def test_balanced_shares_beat_equal_ones_and_reach_the_ideal_within_rounding(
    ranks: int, slow: float, straggler: int, per_rank: int
) -> None:
    compute = ComputeModel(1e-3, slow={straggler % ranks: slow})
    network = NetworkModel(0, math.inf)
    asked = plan(ranks, per_rank, compute=compute, network=network)
    equal = simulate_training(asked)
    shares = BatchShares(asked.batch_size, gain=0.0, min_per_rank=0)
    balanced = simulate_training(replace(asked, policies=(shares,)))
    # Nobody waits when samples go by speed: the batch takes what all speeds together need for it.
    ideal = asked.batch_size / float((1 / (1e-3 * compute.factors(ranks))).sum())
    assert equal.second_half.step_seconds == pytest.approx(slow * per_rank * 1e-3)
    assert balanced.second_half.step_seconds < equal.second_half.step_seconds
    assert ideal <= balanced.second_half.step_seconds * (1 + 1e-9)
    # One sample too many, on the slow rank at worst.
    assert balanced.second_half.step_seconds <= ideal + 1e-3 * slow * (1 + 1e-9)
    assert balanced.second_half.efficiency > equal.second_half.efficiency
    assert balanced.sizes.sum() == asked.batch_size


def policies_of_all_kinds(batch: int) -> tuple[Any, ...]:
    return (
        BatchShares(batch),
        SyncPeriod("predicted", interval=0.5, outer=OuterStep()),
        AdaptiveCompression(every=4),
    )


def noisy(ranks: int, steps: int, seed: int = 0, **more: Any) -> TrainingPlan:
    return plan(
        ranks,
        steps=steps,
        seed=seed,
        policies=policies_of_all_kinds(ranks * 32),
        compute=ComputeModel(noise=0.1, slow_share=0.2, slow_factor=3.0),
        network=NetworkModel(1e-6, 1e8, jitter=0.1),
        loss=LossModel(noise=0.05),
        **more,
    )


def same(one: Outcome, two: Outcome) -> bool:
    return one.as_dict() == two.as_dict()


def test_the_seed_decides_everything() -> None:
    one = simulate_training(noisy(8, 120))
    assert {d.what for d in one.decisions} == {"batch sizes", "period", "compression"}
    assert same(one, simulate_training(noisy(8, 120)))
    again = noisy(8, 120)
    assert same(one, simulate_training(again))
    assert same(one, simulate_training(again)), "policies that were used before are reset"
    assert not same(one, simulate_training(noisy(8, 120, seed=1)))


def test_ranks_compute_the_same_whatever_was_decided() -> None:
    """So that a plan is compared with doing nothing, not with other luck."""
    compute = ComputeModel(0.0, 0.1, noise=0.0, tail=0.2, tail_shape=2.0)
    computing = {
        simulate_training(
            plan(policies=policies, compute=compute, network=NetworkModel(jitter=0.5), steps=31)
        ).overall.computing
        for policies in ((), (BatchShares(128),))
    }
    assert len(computing) == 1


def test_the_controller_decides_the_same_again_from_the_log(tmp_path: Path) -> None:
    path = tmp_path / "control.jsonl"
    asked = noisy(8, 200)
    out = simulate_training(asked, log=path)
    assert len(out.decisions) > 3
    assert replay(noisy(8, 200).controller(), path) == out.decisions
    head, link, *rest = read(path)
    assert head["ranks"] == 8
    assert link["kind"] == "link"
    steps = [one for one in rest if one["kind"] == "step"]
    assert len(steps) == out.exchanges
    # A step's times are told in the next one's ledgers, as real ranks do.
    times = [np.array(one["table"])[:, [COLUMN["computation"], COLUMN["communication"]]] for one in steps]
    assert not times[0].any()
    np.testing.assert_allclose(times[1].sum(1), out.step_seconds[0])
    with pytest.raises(ConfigError, match="control log"):
        simulate_training(asked, log=path)


def test_compression_halves_what_travels_where_bytes_take_the_time() -> None:
    network = NetworkModel(1e-6, 1e7)
    out = simulate_training(plan(steps=40, policies=(AdaptiveCompression(every=5),), network=network))
    assert out.compressed
    assert [(d.before, d.after) for d in out.decisions] == [("none", "fp16")]
    plain = simulate_training(plan(steps=40, network=network))
    saved = plain.second_half.step_seconds - out.second_half.step_seconds
    assert saved == pytest.approx(1.5 * MODEL / 2 / 1e7, rel=0.01)
    idle = simulate_training(
        plan(steps=40, policies=(AdaptiveCompression(every=5),), network=NetworkModel(1e-2, 1e12))
    )
    assert not idle.compressed


def test_the_predicted_period_is_the_best_of_all() -> None:
    """The rule rests on the model that the simulator follows, so it must find its optimum."""
    compute, network = ComputeModel(1e-3), NetworkModel(1e-4, 1e8)

    def pace(policy: SyncPeriod) -> float:
        out = simulate_training(plan(steps=2001, policies=(policy,), compute=compute, network=network))
        return out.seconds / out.effective_steps

    ruled = pace(SyncPeriod("predicted", interval=0.1, smoothness=0.1))
    fixed = {tau: pace(SyncPeriod(tau, smoothness=0.1)) for tau in (1, 2, 4, 6, 8, 9, 10, 11, 12, 16, 32, 64)}
    assert 4 < min(fixed, key=fixed.__getitem__) < 32
    assert ruled <= min(fixed.values()) * 1.02


# -- many ranks ---------------------------------------------------------------------------------------


def calls(work: Callable[[], Any]) -> tuple[int, Any]:
    """Return how many functions were called, Python's and C's, and the result."""
    count = 0

    def count_one(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count_one)
    try:
        result = work()
    finally:
        sys.setprofile(before)
    return count, result


@pytest.mark.parametrize(
    "policies",
    [
        lambda batch: (),
        lambda batch: (BatchShares(batch),),
        lambda batch: (SyncPeriod(4),),
        lambda batch: (AdaptiveCompression(),),
    ],
    ids=["plain", "shares", "period", "compression"],
)
def test_ten_thousand_ranks_take_as_many_operations_as_ten(
    policies: Callable[[int], tuple[Any, ...]],
) -> None:
    def of(ranks: int) -> TrainingPlan:
        compute = ComputeModel(slow={3: 2.0}, noise=0.01, tail=1e-4)
        return plan(
            ranks, steps=60, policies=policies(ranks * 32), compute=compute, network=NetworkModel(1e-7)
        )

    few, _ = calls(lambda: simulate_training(of(10)))
    many, out = calls(lambda: simulate_training(of(10_000)))
    assert many < 1.2 * few + 1000, (few, many)
    assert len(out.sizes) == 10_000


def test_at_ten_thousand_ranks_shares_follow_speed_and_not_noise() -> None:
    """Of so many ranks some always look slow for a while; only those that are lose samples."""
    ranks = 10_000
    out = simulate_training(
        plan(
            ranks,
            steps=150,
            policies=(BatchShares(32 * ranks),),
            compute=ComputeModel(noise=0.05, slow_share=0.01, slow_factor=3.0),
            network=NetworkModel(0, math.inf),
            seed=3,
        )
    )
    slow = out.plan.compute.factors(ranks, 3) > 1
    assert len(out.decisions) <= 2, [d.reason for d in out.decisions]
    assert slow.sum() == 100
    assert 9 <= out.sizes[slow].min() <= out.sizes[slow].max() <= 13
    assert 30 <= out.sizes[~slow].min() <= out.sizes[~slow].max() <= 35
    assert all(len(d.reason) < 300 for d in out.decisions)
    plain = simulate_training(out.plan.plain())
    assert out.second_half.step_seconds < 0.5 * plain.second_half.step_seconds


def test_one_hitch_does_not_move_the_predicted_period() -> None:
    out = simulate_training(
        plan(
            512,
            steps=600,
            policies=(SyncPeriod("predicted", interval=0.1),),
            compute=ComputeModel(1e-3, tail=1e-5, tail_seconds=2.0),
            network=NetworkModel(1e-7, 1e8),
        )
    )
    later = out.step_seconds[100:]
    assert (later > 0.2).sum() > 10, "there were hitches"
    assert not [d for d in out.decisions if d.step > 100], out.decisions


# -- clear errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ComputeModel(-1.0), "per_sample=-1.0 of ComputeModel"),
        (lambda: ComputeModel(math.nan), "per_sample=nan"),
        (lambda: ComputeModel(0.0), "must take some time"),
        (lambda: ComputeModel(tail=1.5), "tail=1.5 .* at most 1"),
        (lambda: ComputeModel(tail_shape=0), "tail_shape=0 .* above 0"),
        (lambda: ComputeModel(slow={-1: 2.0}), "rank -1"),
        (lambda: ComputeModel(slow={0: 0.0}), "factor 0.0"),
        (lambda: NetworkModel(bandwidth=0), "bandwidth=0 of NetworkModel"),
        (lambda: NetworkModel(slow={1: -5.0}), "link 1 the rate -5.0"),
        (lambda: NetworkModel(overlap=2), "overlap=2"),
        (lambda: NetworkModel(algorithm="tree"), "algorithm='tree'"),
        (lambda: NetworkModel(local_ranks=0), "local_ranks=0"),
        (lambda: NetworkModel.from_fits({}), "at least one fit"),
        (lambda: NetworkModel.from_fits({1: (0.1, 1e9)}), "ranks=1"),
        (lambda: NetworkModel.from_fits({2: (-0.1, 1e9)}), "alpha=-0.1"),
        (lambda: NetworkModel.from_link(LinkModel(2)), "no fit yet"),
        (lambda: LossModel(start=1.0, floor=2.0), "floor=2.0 .* below start=1.0"),
        (lambda: plan(0), "ranks=0"),
        (lambda: plan(steps=0), "steps=0"),
        (lambda: plan(messages=0), "messages=0"),
        (lambda: plan(policies=(BatchShares(7),)), "batch_size=128 .* 7"),
        (lambda: plan(policies=("period",)), "policies has .period'"),
        (
            lambda: simulate_training(plan(compute=ComputeModel(slow={4: 2.0}))),
            "number 4, but there are 4 ranks",
        ),
        (lambda: simulate_training(plan(network=NetworkModel(slow={9: 1e6}))), "number 9, but there are 4"),
        (lambda: simulate_training(plan(policies=(SyncPeriod(2), SyncPeriod(3)))), "two of SyncPeriod"),
        (
            lambda: simulate_training(plan(4, batch_size=3, policies=(BatchShares(3),))),
            "3 samples cannot give each of 4 ranks",
        ),
    ],
)
def test_what_cannot_be_simulated_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_progress_is_told_step_by_step() -> None:
    told: list[tuple[int, int]] = []
    simulate_training(plan(steps=3), progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 3), (2, 3), (3, 3)]
