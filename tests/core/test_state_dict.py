"""State of terms and policies: a restored controller decides as one that was not interrupted."""

from __future__ import annotations

import numpy as np
import pytest

from hvdloss import CommunicationCost, ConfigError, DataSkew
from hvdloss.comm import world
from hvdloss.losses.ledger import COLUMN, LEDGER_WIDTH
from hvdloss.terms.controller import Controller
from hvdloss.terms.policies import AdaptiveCompression, BatchShares, RankWeights, SyncPeriod
from hvdloss.terms.term import CommStats
from hvdloss.train.checkpoint import state_from_bytes, state_to_bytes

SIZE = 3


def controller() -> Controller:
    return Controller(
        (
            CommunicationCost(
                price=0.1,
                policies=(
                    BatchShares(32, every=3, gain=0.0),
                    SyncPeriod("adacomm", initial_period=4, interval=0.5),
                    AdaptiveCompression(every=2),
                ),
            ),
            DataSkew(price=0.01, classes=4, window=5, policies=(RankWeights("dro", step=0.5),)),
        )
    )


def tables(count: int):
    rng = np.random.default_rng(0)
    for number in range(count):
        table = np.zeros((SIZE, LEDGER_WIDTH + 5))
        for name in ("numerator", "denominator", "weight", "elements", "communication", "computation"):
            table[:, COLUMN[name]] = rng.uniform(0.1, 1.0, SIZE) * (1 + 5 * (number % 3))
        table[:, LEDGER_WIDTH : LEDGER_WIDTH + 4] = rng.integers(1, 9, (SIZE, 4))
        yield number + 1, table, CommStats(2, 1000 + number, 2000, 1, number % 2 == 1)


def run(one: Controller, steps) -> list:
    states = [one.on_step_end(step, table, comm_stats).tolist() for step, table, comm_stats in steps]
    return [states, [str(d) for d in one.decisions], str(one.reports())]


def test_a_state_dict_restores_bitwise():
    steps = list(tables(40))
    whole = controller()
    whole.reset(1, SIZE)
    run(whole, steps[:20])
    whole.decisions.clear()
    state = state_from_bytes(state_to_bytes(whole.state_dict()))
    expected = run(whole, steps[20:])
    again = controller()
    again.reset(1, SIZE)
    again.load_state_dict(state, same_ranks=True)
    assert run(again, steps[20:]) == expected
    assert expected[1]  # something was decided
    fresh = controller()
    fresh.reset(1, SIZE)
    assert run(fresh, steps[20:]) != expected  # so the state matters


def test_other_ranks_keep_what_is_not_of_ranks():
    one = controller()
    one.reset(0, SIZE)
    run(one, tables(20))
    other = controller()
    other.reset(0, SIZE + 1)
    other.load_state_dict(one.state_dict(), same_ranks=False)
    period, before = other.policy(SyncPeriod), one.policy(SyncPeriod)
    assert (period._chosen, period._first_loss) == (before._chosen, before._first_loss)
    shares = other.policy(BatchShares)
    assert shares.step == 20
    assert shares.sizes.tolist() == [8, 8, 8, 8]
    assert other.terms[1].counts.shape == (SIZE + 1, 4)
    with pytest.raises(ConfigError, match="state="):
        other.load_state_dict({"terms": 1}, same_ranks=True)


def test_a_reset_calls_registered_objects_and_names_can_be_replayed():
    class Registered:
        resets = 0

        def reset(self) -> None:
            self.resets += 1

    registered = Registered()
    world.register_for_reset(registered)
    generation = world.generation()
    outside = world.next_name_index("test")
    with world.replay_names() as rewind:
        inside = [world.next_name_index("test"), world.next_name_index("test")]
        world.reset()
        rewind()
        again = [world.next_name_index("test"), world.next_name_index("test")]
        assert again == inside == [outside + 1, outside + 2]
    assert (registered.resets, world.generation()) == (1, generation + 1)


def test_objects_are_reset_in_the_order_of_registration():
    order = []

    class Registered:
        def reset(self) -> None:
            order.append(self)

    registered = [Registered() for _ in range(20)]
    for one in registered:
        world.register_for_reset(one)
    world.reset()
    assert order == registered
