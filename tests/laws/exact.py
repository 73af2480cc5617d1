"""The contract's laws: a step is that of one process that saw all elements, or the same error everywhere.

Each is tried by every driver of tests/parallel/laws_*.py, in the launches that stand beside it.
"""

from __future__ import annotations

import numpy as np

from tests.laws.driver import Alone, Batch, Driver, difference, elements, network, raised, split
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3")
EXACT = {np.float64: 1e-12, np.float32: 1e-5}


def over_random_splits(driver: Driver, seed: int, steps: int, dtype: type) -> dict[str, float]:
    """Train on random splits of every step's elements."""
    rng = np.random.default_rng(seed)
    start = network(rng, dtype)
    driver.build(start)
    alone, wrong = Alone(start), 0.0
    for _ in range(steps):
        whole = elements(rng, int(rng.integers(3, 40)), dtype)
        parts = split(rng, whole, driver.size)
        wrong = max(wrong, alone.plain_averaging_is_off_by(parts))
        shown = driver.step([parts[driver.rank]])
        loss = alone.step(parts)
        report = driver.report()
        assert abs(report.loss / loss - 1) < 10 * EXACT[dtype], (report.loss, loss)
        assert report.elements == int((whole.w != 0).sum())
        assert abs(report.weight / float(whole.w.sum(dtype=np.float64)) - 1) < EXACT[dtype]
        if shown is not None and parts[driver.rank].w.any():
            assert abs(report.ranks[driver.rank].loss / shown - 1) < 10 * EXACT[dtype]
    error = difference(driver, alone)
    assert error < steps * EXACT[dtype], error
    assert driver.size == 1 or wrong > 1e-3  # or these splits would not tell
    return {f"error, {np.dtype(dtype).name}": error, "plain averaging": wrong}


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
def law_any_split_gives_the_step_of_one_process(driver: Driver) -> dict[str, float]:
    return over_random_splits(driver, 1, 20, np.float64)


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
def law_any_split_in_float32(driver: Driver) -> dict[str, float]:
    return over_random_splits(driver, 2, 10, np.float32)


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
def law_a_rank_without_weight_or_samples_adds_nothing(driver: Driver) -> None:
    rng = np.random.default_rng(3)
    start = network(rng)
    driver.build(start)
    alone = Alone(start)
    for step in range(3):
        parts = split(rng, elements(rng, 12), driver.size, empty=False)
        none = step % driver.size
        if driver.size > 1:
            part = parts[none]
            parts[none] = part._replace(w=0 * part.w) if step else Batch(*(a[:0] for a in part))
        driver.step([parts[driver.rank]])
        alone.step(parts)
        if driver.size > 1:
            assert np.isnan(driver.report().ranks[none].loss)
    assert difference(driver, alone) < 1e-12


def law_absent_elements_may_hold_nan(driver: Driver) -> None:
    rng = np.random.default_rng(4)
    start = network(rng)
    driver.build(start)
    alone = Alone(start)
    for _ in range(2):
        whole = elements(rng, 24)
        whole.y[whole.w == 0] = np.nan
        parts = split(rng, whole, driver.size, empty=False)
        driver.step([parts[driver.rank]])
        alone.step(parts)
    assert difference(driver, alone) < 1e-12


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
def law_a_penalty_counts_once(driver: Driver) -> None:
    rng = np.random.default_rng(5)
    start = network(rng)
    driver.build(start, penalty=0.25)  # exact in float32, in which Keras keeps it
    alone = Alone(start, penalty=0.25)
    for _ in range(3):
        parts = split(rng, elements(rng, 30), driver.size, empty=False)
        driver.step([parts[driver.rank]])
        alone.step(parts)
    assert difference(driver, alone) < 1e-12


def law_reductions(driver: Driver) -> None:
    for seed, reduction in ((6, "sum"), (7, "batch_mean")):
        rng = np.random.default_rng(seed)
        start = [p / 4 for p in network(rng)]
        driver.build(start, reduction=reduction)
        alone = Alone(start, reduction=reduction)
        parts = split(rng, elements(rng, 20), driver.size)
        driver.step([parts[driver.rank]])
        loss = alone.step(parts)
        assert abs(driver.report().loss / loss - 1) < 1e-12, reduction
        assert difference(driver, alone) < 1e-12, reduction


def law_micro_batches_count_by_what_they_hold(driver: Driver) -> None:
    """However many each rank has: the sums run over all of them."""
    rng = np.random.default_rng(8)
    start = network(rng)
    driver.build(start, passes=3)
    alone = Alone(start)
    for step in range(3):
        parts = split(rng, elements(rng, 40), driver.size, empty=False)
        rows = [split(rng, part, 1 + (rank + step) % 3) for rank, part in enumerate(parts)]
        driver.step(rows[driver.rank])
        alone.step(parts)
        assert [one.micro_batches for one in driver.report().ranks] == [len(row) for row in rows]
    assert difference(driver, alone) < 1e-12


def spoil(part: Batch, what: str) -> Batch:
    """Return a part with a fault in its first element."""
    x, y, w = (a.copy() for a in part)
    w[0] = {"weight": -1.0, "nan weight": np.nan}.get(what, 1.0)
    y[0] = {"nan": np.nan, "inf": np.inf}.get(what, float(y[0, 0]))
    return Batch(x, y, w)


@needs("gloo-2", more="gloo-3 mpi-2")
def law_what_is_wrong_on_one_rank_is_raised_on_all_before_anything_changes(driver: Driver) -> None:
    rng = np.random.default_rng(9)
    start = network(rng)
    driver.build(start)
    alone = Alone(start)
    culprit = driver.size - 1

    def good() -> None:
        parts = split(rng, elements(rng, 20), driver.size, empty=False)
        driver.step([parts[driver.rank]])
        alone.step(parts)
        assert difference(driver, alone) < 1e-12

    good()
    for what, name, word in (
        ("nan", "NonFiniteLossError", f"rank {culprit}"),
        ("inf", "NonFiniteLossError", f"rank {culprit}"),
        ("weight", "WeightError", f"rank {culprit}"),
        ("nan weight", "WeightError", f"rank {culprit}"),
        ("none", "NoWeightError", ""),
    ):
        before, last = driver.parameters(), driver.report()
        parts = split(rng, elements(rng, 20), driver.size, empty=False)
        mine = parts[driver.rank]
        if what == "none":
            mine = mine._replace(w=0 * mine.w)
        elif driver.rank == culprit:
            mine = spoil(mine, what)
        raised(lambda mine=mine: driver.step([mine]), name, word)
        assert all(np.array_equal(a, b) for a, b in zip(before, driver.parameters(), strict=True)), what
        assert driver.report() == last, what
    good()


@needs("gloo-2", more="gloo-3 mpi-2")
def law_drop_is_the_step_of_the_other_ranks(driver: Driver) -> None:
    rng = np.random.default_rng(10)
    start = network(rng)
    driver.build(start, nonfinite="drop")
    alone = Alone(start)
    culprit = driver.size - 1
    for number, what in enumerate(("", "nan", "inf", ""), 1):
        parts = split(rng, elements(rng, 20), driver.size, empty=False)
        mine = parts[driver.rank]
        driver.step([spoil(mine, what) if what and driver.rank == culprit else mine])
        kept = parts[:culprit] if what else parts
        loss = alone.step(kept)
        report = driver.report()
        assert abs(report.loss / loss - 1) < 1e-12
        assert abs(report.weight / sum(float(part.w.sum()) for part in kept) - 1) < 1e-12
        assert report.ranks[culprit].dropped == min(max(number - 1, 0), 2)
    assert difference(driver, alone) < 1e-12


@needs("gloo-2", more="gloo-3 mpi-2")
def law_a_skipped_step_changes_nothing(driver: Driver) -> None:
    rng = np.random.default_rng(11)
    start = network(rng)
    driver.build(start, nonfinite="skip")
    alone = Alone(start)
    culprit = driver.size - 1
    for number, what in enumerate(("", "nan", "inf", ""), 1):
        parts = split(rng, elements(rng, 20), driver.size, empty=False)
        mine = parts[driver.rank]
        before = driver.parameters()
        driver.step([spoil(mine, what) if what and driver.rank == culprit else mine])
        if what:
            assert all(np.array_equal(a, b) for a, b in zip(before, driver.parameters(), strict=True)), what
        else:
            alone.step(parts)
        assert driver.report().skipped == min(max(number - 1, 0), 2)
    assert difference(driver, alone) < 1e-12
