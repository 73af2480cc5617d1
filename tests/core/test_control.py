"""What measured terms decide: shares, period, compression; the log that lets it be decided again."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import hvdloss
from hvdloss._util.apportion import apportion
from hvdloss.errors import ConfigError, UsageError
from hvdloss.losses.ledger import COLUMN, LEDGER_WIDTH
from hvdloss.terms.controller import Controller
from hvdloss.terms.link import LinkModel
from hvdloss.terms.policies import AdaptiveCompression, BatchShares, OuterStep, SharedBatches, SyncPeriod
from hvdloss.terms.policies.log import FORMAT, read, record, replay, use_logged_times
from hvdloss.terms.term import CommStats


def controlled(*policies, size=2, rank=0, **options):
    term = hvdloss.CommunicationCost(policies=policies, **{"calibrate": False, **options})
    controller = Controller((term,))
    controller.reset(rank, size)
    return controller, term


def close(controller, step, *, computation=0.1, communication=0.01, loss=1.0, comm_stats=None):
    table = np.zeros((controller.size, LEDGER_WIDTH))
    table[:, COLUMN["denominator"]] = 1.0
    table[:, COLUMN["numerator"]] = loss
    table[:, COLUMN["computation"]] = computation
    table[:, COLUMN["communication"]] = communication
    before = len(controller.decisions)
    controller.on_step_end(step, table, comm_stats or CommStats(messages=2, bytes=10**6, full_bytes=10**6))
    return controller.decisions[before:]


# -- shares -------------------------------------------------------------------------------------------


@given(st.integers(0, 5000), st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.integers(0, 3))
def test_apportioned_numbers_add_up(total, shares, least):
    assume(total >= least * len(shares))
    parts = apportion(total, shares, least)
    assert parts.sum() == total
    assert parts.min() >= least
    if least == 0 and sum(shares) > 1e-300:
        exact = total * np.array(shares) / np.array(shares).sum()
        assert np.abs(parts - exact).max() <= 1 + 1e-6


def test_too_few_samples_to_go_round():
    with pytest.raises(ConfigError, match="3 samples cannot give each of 2 ranks at least 2"):
        apportion(3, [1, 1], 2)


def run_shares(shares, per_sample, steps, fixed=0.0, noise=None):
    controller, _ = controlled(shares, size=len(per_sample))
    sizes = shares.sizes_at(1)
    for step in range(1, steps + 1):
        measured = fixed + sizes * per_sample  # of the step before
        if noise is not None:
            measured = measured * noise.lognormal(0, 0.3, len(measured))
        sizes = shares.sizes_at(step)
        close(controller, step, computation=measured)
    return controller


def test_shares_follow_speed_and_stay():
    shares = BatchShares(300, every=5)
    controller = run_shares(shares, np.array([1e-3, 2e-3]), 60)
    assert shares.sizes.tolist() == [200, 100]
    (decision,) = controller.decisions
    assert (decision.what, decision.before, decision.after) == ("batch sizes", [150, 150], [200, 100])
    assert "33% less" in decision.reason
    assert "rank 1" in decision.reason


def test_shares_even_out_a_fixed_part_in_a_few_looks():
    shares = BatchShares(300, every=5, gain=0.01)
    run_shares(shares, np.array([1e-3, 2e-3]), 200, fixed=0.05)
    took = 0.05 + shares.sizes * np.array([1e-3, 2e-3])
    assert took.max() / took.min() < 1.03


def test_noise_moves_nothing():
    shares = BatchShares(300, every=20, gain=0.15)
    controller = run_shares(shares, np.array([1e-3] * 4), 400, noise=np.random.default_rng(3))
    assert controller.decisions == []


def test_a_rank_keeps_its_least():
    shares = BatchShares(100, every=2, min_per_rank=10)
    run_shares(shares, np.array([1e-3, 1.0]), 30)
    assert shares.sizes.tolist() == [90, 10]


def test_a_decision_waits_for_what_was_read_ahead():
    shares = BatchShares(300, every=5, delay=3)
    controller, _ = controlled(shares)
    for step in range(1, 9):
        shares.sizes_at(step + 3)
        with pytest.raises(UsageError, match="delay=4"):
            shares.sizes_at(step + 4)
        close(controller, step, computation=np.array([0.15, 0.30]))
    decided = controller.decisions[0].step
    assert shares.sizes_at(decided + 3).tolist() == [150, 150]
    assert shares.sizes_at(decided + 4).tolist() == [200, 100]


def test_between_exchanges_batches_are_known_ahead():
    shares, period = BatchShares(8), SyncPeriod(4)
    controller, _ = controlled(shares, period)
    close(controller, 1)
    assert shares.sizes_at(5).tolist() == [4, 4]
    with pytest.raises(UsageError, match="step 6"):
        shares.sizes_at(6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"batch_size": 8, "every": 0}, "every=0"),
        ({"batch_size": 8, "gain": 1.0}, "gain=1.0"),
        ({"batch_size": 8, "min_per_rank": -1}, "min_per_rank=-1"),
        ({"batch_size": 8, "delay": True}, "delay=True"),
    ],
)
def test_arguments_of_batch_shares(arguments, words):
    with pytest.raises(ConfigError, match=words):
        BatchShares(**arguments)


def test_batches_need_to_know_their_rank():
    with pytest.raises(UsageError, match="make the DistributedOptimizer before"):
        next(iter(SharedBatches(10, BatchShares(4))))


@given(st.integers(0, 100), st.integers(1, 4), st.integers(4, 20), st.booleans(), st.booleans())
def test_ranks_batches_are_the_epoch(samples, size, batch, shuffle, drop_last):
    ranks = []
    for rank in range(size):
        shares = BatchShares(batch)
        controller, _ = controlled(shares, size=size, rank=rank)
        batches = SharedBatches(samples, shares, shuffle=shuffle, seed=4, drop_last=drop_last)
        epochs = []
        step = 0
        for _ in range(2):
            epoch = []
            for indices in batches:
                epoch.append(indices)
                step += 1
                close(controller, step)
            assert len(epoch) == len(batches)
            epochs.append(epoch)
        ranks.append(epochs)
    for epoch in range(2):
        union = [i for steps in zip(*(r[epoch] for r in ranks), strict=True) for part in steps for i in part]
        kept = samples // batch * batch if drop_last else samples
        assert len(union) == kept
        assert len(set(union)) == kept
        if not shuffle:
            assert union == list(range(kept))
    if shuffle and samples > 30 and not drop_last:
        assert ranks[0][0] != ranks[0][1]  # anew each epoch


# -- period -------------------------------------------------------------------------------------------


def local(steps, bytes=4 * 10**6):
    return CommStats(messages=2, bytes=bytes, full_bytes=bytes, steps=steps, parameters=True)


def test_a_constant_period_and_its_beginning():
    controller, _ = controlled(period := SyncPeriod(16))
    assert period.period == 16
    assert close(controller, 1) == []
    controller, _ = controlled(period := SyncPeriod(16, start=3))
    seen = [period.period]
    for step in range(1, 5):
        close(controller, step)
        seen.append(period.period)
    assert seen == [1, 1, 1, 16, 16]
    (decision,) = controller.decisions
    assert (decision.step, decision.before, decision.after) == (3, 1, 16)
    controlled(period, size=1)
    assert period.period == 1  # one rank has nobody to exchange with


def test_adacomm_follows_the_loss():
    controller, _ = controlled(period := SyncPeriod("adacomm", initial_period=20, interval=1.0))
    seen = []
    for step in range(1, 121):  # a tenth of a second each
        loss = 4 * math.exp(-step / 15)
        close(controller, step, computation=0.09, communication=0.01, loss=loss, comm_stats=local(20))
        seen.append(period.period)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == 1
    assert all(d.reason.startswith("AdaComm:") for d in controller.decisions)
    exact = [d for d in controller.decisions if "sqrt" in d.reason]
    assert exact
    for decision in exact:
        now, start = (float(x) for x in decision.reason.split("(")[1].split(")")[0].split(" / "))
        assert decision.after == math.ceil(math.sqrt(now / start) * 20)


def with_link(term, seconds_per_mb, alpha=1e-4):
    term.link = LinkModel(2)
    for megabytes in (1, 2, 4, 8):
        term.link.add(alpha + megabytes * seconds_per_mb, megabytes * 10**6)
        term.link.add(alpha + megabytes * seconds_per_mb, megabytes * 10**6)


def chosen_period(rule, seconds_per_mb, computation, *, price=0.0, falling=0.0, **options):
    controller, term = controlled(
        period := SyncPeriod(rule, interval=0.5, max_period=100, **options), price=price
    )
    with_link(term, seconds_per_mb)
    for step in range(1, 60):
        comm_stats = local(period.period)
        close(
            controller,
            step * 10,
            computation=computation * period.period,
            communication=0.05,
            loss=10 - falling * step,
            comm_stats=comm_stats,
        )
        term.link = LinkModel(2)
        with_link(term, seconds_per_mb)
    return period, controller


def test_the_predicted_period_is_the_best_of_all():
    slow, controller = chosen_period("predicted", 0.05, 0.01)
    fast, _ = chosen_period("predicted", 1e-5, 0.01)
    busy, _ = chosen_period("predicted", 0.05, 1.0)
    assert 8 < slow.period <= 100
    assert fast.period <= 3
    assert busy.period < slow.period
    exchange, computing, spread = 0.2, 0.01, 1.0

    def seconds(period):
        return (1 + slow.slowdown(period, spread)) * (computing + exchange / period)

    best = min(range(1, 101), key=seconds)
    assert abs(slow.period - best) <= 1
    assert "per effective step" in controller.decisions[-1].reason


def test_the_time_to_a_loss_is_predicted_where_it_falls():
    _, controller = chosen_period("predicted", 0.05, 0.01, falling=0.1, target_loss=1.0)
    assert "s to a loss of 1" in controller.decisions[-1].reason


def test_a_higher_price_of_communication_means_fewer_exchanges():
    periods = [
        chosen_period("priced", 0.05, 0.01, price=price, falling=0.1)[0].period for price in (1e-4, 1e-2, 1.0)
    ]
    assert periods == sorted(periods)
    assert periods[0] < periods[-1]


def test_without_a_fit_nothing_is_decided():
    controller, _ = controlled(SyncPeriod("predicted", interval=0.01))
    for step in range(1, 20):
        assert close(controller, step, comm_stats=CommStats(messages=1)) == []


def test_deciding_by_the_link_calibrates_it():
    assert hvdloss.CommunicationCost(policies=(SyncPeriod("predicted"),)).calibrates
    assert hvdloss.CommunicationCost(policies=(AdaptiveCompression(),)).calibrates
    assert not hvdloss.CommunicationCost(policies=(SyncPeriod(4), BatchShares(8))).calibrates


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("often",), "period='often'"),
        ((0,), "period=0"),
        ((2.0,), "period=2.0"),
        ((4, {"initial_period": 2}), "initial_period= of SyncPeriod belongs to a rule"),
        (("adacomm", {"initial_period": 0}), "period=0"),
        (("adacomm", {"max_period": 0}), "max_period=0"),
        ((4, {"start": -1}), "start=-1"),
        ((4, {"interval": 0}), "interval=0"),
        ((4, {"smoothness": math.inf}), "smoothness=inf"),
        ((4, {"outer": 0.7}), "outer=0.7"),
    ],
)
def test_arguments_of_sync_period(arguments, words):
    *positional, options = (*arguments, {}) if not isinstance(arguments[-1], dict) else arguments
    with pytest.raises(ConfigError, match=words):
        SyncPeriod(*positional, **options)


@pytest.mark.parametrize("arguments", [{"lr": 0}, {"lr": math.inf}, {"momentum": 1}, {"momentum": -0.1}])
def test_arguments_of_the_outer_step(arguments):
    with pytest.raises(ConfigError, match="OuterStep"):
        OuterStep(**arguments)


def test_the_outer_step_is_nesterov_sgd():
    outer, velocity, ours = OuterStep(), np.zeros(3), np.zeros(3)
    theta, momentum = np.zeros(3), np.zeros(3)
    for step in range(5):
        mean = np.sin(np.arange(3) + step)
        gradient = -mean  # the outer gradient is the old parameters minus the new (Sutskever et al. 2013)
        momentum = 0.9 * momentum + gradient
        theta = theta - 0.7 * (gradient + 0.9 * momentum)
        move, velocity = outer.update(mean, velocity)
        ours = ours + move
        assert np.allclose(ours, theta, rtol=1e-13)
    assert np.allclose(OuterStep(1.0, 0.0).update(mean, velocity)[0], mean)


# -- compression --------------------------------------------------------------------------------------


def test_compression_is_for_slow_links_and_ends_with_them():
    controller, term = controlled(policy := AdaptiveCompression(gain=0.1, every=2))
    seen = []
    for step in range(1, 13):
        with_link(term, 0.1 if step < 7 else 1e-7)
        close(controller, step, computation=0.05, communication=0.1)
        seen.append(policy.on)
    assert seen == [False] * 1 + [True] * 6 + [False] * 5
    assert [d.after for d in controller.decisions] == ["fp16", "none"]


def test_where_messages_dominate_compression_stays_off():
    controller, term = controlled(policy := AdaptiveCompression(gain=0.01, every=1))
    for step in range(1, 10):
        with_link(term, 1e-4, alpha=0.1)
        close(controller, step, computation=0.05, communication=0.2)
    assert not policy.on


def test_what_overlaps_computation_cannot_be_saved():
    controller, term = controlled(policy := AdaptiveCompression(gain=0.1, every=1))
    for step in range(1, 10):
        with_link(term, 0.1)
        close(controller, step, computation=0.5, communication=1e-4)
    assert not policy.on


@pytest.mark.parametrize("arguments", [{"gain": 0}, {"gain": 1}, {"every": 0}, {"every": 1.5}])
def test_arguments_of_compression(arguments):
    with pytest.raises(ConfigError, match="AdaptiveCompression"):
        AdaptiveCompression(**arguments)


# -- the log ------------------------------------------------------------------------------------------


def fresh():
    return controlled(BatchShares(64, every=3), SyncPeriod("adacomm", initial_period=8, interval=0.5))


def trained(controller, seed=0, steps=40):
    rng = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        close(
            controller,
            step,
            computation=rng.lognormal(-2, 0.2, 2) * [1, 2],
            communication=rng.lognormal(-4, 0.2, 2),
            loss=float(np.exp(-step / 10)) + 0.01,
            comm_stats=local(2),
        )


def test_the_log_decides_again(tmp_path):
    controller, _ = fresh()
    record(controller, tmp_path / "log.jsonl")
    trained(controller)
    assert {d.what for d in controller.decisions} == {"batch sizes", "period"}
    again = replay(fresh()[0], tmp_path / "log.jsonl")
    assert again == controller.decisions
    lines = list(read(tmp_path / "log.jsonl"))
    assert lines[0]["format"] == FORMAT
    told = [one for one in lines if one.get("kind") == "decision"]
    assert told == [{"kind": "decision", **vars(d)} for d in controller.decisions]


def test_following_a_log_ignores_the_clocks(tmp_path):
    controller, _ = fresh()
    record(controller, tmp_path / "log.jsonl")
    trained(controller)
    other, _ = fresh()
    use_logged_times(other, tmp_path / "log.jsonl")
    trained(other, seed=99)  # other times, the same losses
    assert other.decisions == controller.decisions
    with pytest.raises(ConfigError, match="step 41 of 2 ranks is not in"):
        close(other, 41)


def test_logs_that_cannot_be_used(tmp_path):
    controller, _ = fresh()
    path = tmp_path / "log.jsonl"
    record(controller, path)
    with pytest.raises(ConfigError, match="cannot make the control log"):
        record(controller, path)
    trained(controller, steps=5)
    path.write_text(path.read_text() + '{"kind": "step", "tab')  # the writer was killed
    kinds = [one.get("kind") for one in read(path)]
    assert kinds[0] is None
    assert kinds.count("step") == 5
    with pytest.raises(ConfigError, match="written with other terms"):
        replay(controlled(BatchShares(64))[0], path)
    with pytest.raises(ConfigError, match="written with other terms"):
        use_logged_times(Controller((hvdloss.DataSkew(classes=3),)), path)
    with pytest.raises(ConfigError, match="cannot read"):
        list(read(tmp_path / "none"))
    for text in ("[1]\n", '{"format": "something else"}\n', "nonsense\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="line 1"):
            list(read(path))
