"""What terms and acts remember: a controller that goes on decides as one that was not interrupted."""

from __future__ import annotations

import numpy as np
import pytest

from hvdloss import CommunicationCost, ConfigError, DataSkew, world
from hvdloss.control import AdaptiveCompression, BatchShares, RankWeights, SyncPeriod
from hvdloss.controller import Controller
from hvdloss.ledger import COLUMN, WIDTH
from hvdloss.term import Travel
from hvdloss.training.checkpoint import state_of_bytes, state_to_bytes

SIZE = 3


def controller() -> Controller:
    return Controller(
        (
            CommunicationCost(
                price=0.1,
                acts=(
                    BatchShares(32, every=3, gain=0.0),
                    SyncPeriod("adacomm", first=4, interval=0.5),
                    AdaptiveCompression(every=2),
                ),
            ),
            DataSkew(price=0.01, classes=4, window=5, acts=(RankWeights("dro", step=0.5),)),
        )
    )


def tables(count: int):
    rng = np.random.default_rng(0)
    for number in range(count):
        table = np.zeros((SIZE, WIDTH + 5))
        for name in ("numerator", "denominator", "weight", "elements", "communication", "computation"):
            table[:, COLUMN[name]] = rng.uniform(0.1, 1.0, SIZE) * (1 + 5 * (number % 3))
        table[:, WIDTH : WIDTH + 4] = rng.integers(1, 9, (SIZE, 4))
        yield number + 1, table, Travel(2, 1000 + number, 2000, 1, number % 2 == 1)


def run(one: Controller, steps) -> list:
    states = [one.close(step, table, travel).tolist() for step, table, travel in steps]
    return [states, [str(d) for d in one.decisions], str(one.reports())]


def test_a_memory_goes_on_to_the_last_bit():
    steps = list(tables(40))
    whole = controller()
    whole.begin(1, SIZE)
    run(whole, steps[:20])
    whole.decisions.clear()
    memory = state_of_bytes(state_to_bytes(whole.memory()))
    expected = run(whole, steps[20:])
    again = controller()
    again.begin(1, SIZE)
    again.remember(memory, same_ranks=True)
    assert run(again, steps[20:]) == expected
    assert expected[1]  # something was decided
    fresh = controller()
    fresh.begin(1, SIZE)
    assert run(fresh, steps[20:]) != expected  # so the memory matters


def test_other_ranks_keep_what_is_not_of_ranks():
    one = controller()
    one.begin(0, SIZE)
    run(one, tables(20))
    other = controller()
    other.begin(0, SIZE + 1)
    other.remember(one.memory(), same_ranks=False)
    period, before = other.act(SyncPeriod), one.act(SyncPeriod)
    assert (period._chosen, period._first_loss) == (before._chosen, before._first_loss)
    shares = other.act(BatchShares)
    assert shares.step == 20
    assert shares.sizes.tolist() == [8, 8, 8, 8]
    assert other.terms[1].counts.shape == (SIZE + 1, 4)
    with pytest.raises(ConfigError, match="memory="):
        other.remember({"terms": 1}, same_ranks=True)


def test_a_new_world_is_told_and_numbers_begin_again():
    class Follower:
        told = 0

        def renew(self) -> None:
            self.told += 1

    follower = Follower()
    world.following(follower)
    number = world.number()
    outside = world.next_number("test")
    with world.numbers_again() as again:
        inside = [world.next_number("test"), world.next_number("test")]
        world.renew()
        again()
        assert [world.next_number("test"), world.next_number("test")] == inside == [outside + 1, outside + 2]
    assert (follower.told, world.number()) == (1, number + 1)


def test_what_rests_on_another_one_is_told_after_it():
    order = []

    class Follower:
        def renew(self) -> None:
            order.append(self)

    followers = [Follower() for _ in range(20)]
    for one in followers:
        world.following(one)
    world.renew()
    assert order == followers
