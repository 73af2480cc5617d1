"""Packed sequences: however they are cut and spread, a step is that of one process with the whole ones."""

from __future__ import annotations

import itertools

import numpy as np

from tests.laws.driver import Alone, Batch, Driver, Packed, difference, elements, network
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3")
EXACT = 1e-11


def sequences(rng: np.random.Generator, count: int, *, padding: int = 3) -> Packed:
    """Return sequences of 1 to 7 tokens one after another, and padding, whose targets are NaN."""
    lengths = rng.integers(1, 8, count)
    names = rng.choice(10**6, count, replace=False)
    batch = elements(rng, int(lengths.sum()) + padding)
    end = len(batch.x) - padding
    batch.y[end:] = np.nan
    of = [
        np.append(np.repeat(x, lengths), np.full(padding, fill))[:, None]
        for x, fill in ((names, -1), (rng.integers(0, 3, count), 0), (rng.uniform(0.1, 3.0, count), 1.0))
    ]
    return Packed(batch, *of)


def unpacked(whole: Packed, *, groups: bool = False, weighted: bool = True) -> Batch:
    """Return the elements with their weights in the mean over sequences, found one sequence at a time."""
    x, y, w = whole.batch
    c = np.zeros_like(w)
    total = {}
    for name in np.unique(whole.ids[whole.ids >= 0]):
        there = (whole.ids == name)[:, 0]
        if w[there].any():
            u = whole.weight[there][0, 0] if weighted else 1.0
            group = whole.groups[there][0, 0]
            total[group] = total.get(group, 0.0) + u
            c[there] = u * w[there] / w[there].sum()
    if groups:
        for group, sum_of_weights in total.items():
            c[whole.groups == group] /= sum_of_weights
    return Batch(x, y, c)


def rows(whole: Packed, which: np.ndarray, *, groups: bool, weighted: bool) -> Packed:
    """Return some of the elements."""
    batch = Batch(*(a[which] for a in whole.batch))
    return Packed(
        batch,
        whole.ids[which],
        whole.groups[which] if groups else None,
        whole.weight[which] if weighted else None,
    )


def deal(rng: np.random.Generator, whole: Packed, parts: int, how: str, **options: bool) -> list[Packed]:
    """Cut sequences into parts; any may be empty.

    `how`: "whole" sequences, each in one part; "any" elements anywhere; cut at "ends", in the order in which
    they lie.
    """
    count = len(whole.ids)
    if how == "whole":
        names, slot = np.unique(whole.ids, return_inverse=True)
        place = rng.integers(0, parts, len(names))[slot.ravel()]
    elif how == "any":
        place = rng.integers(0, parts, count)
    else:
        place = np.searchsorted(np.sort(rng.integers(0, count + 1, parts - 1)), np.arange(count), "right")
    return [rows(whole, np.flatnonzero(place == part), **options) for part in range(parts)]


def train(
    driver: Driver, seed: int, how: str, *, groups: bool = False, weighted: bool = True, passes: int = 1
) -> float:
    """Take steps of random packings; return how far off averages of ranks would be."""
    rng = np.random.default_rng(seed)
    start = network(rng)
    driver.build(start, reduction="sequence_mean", passes=passes)
    alone, wrong = Alone(start), 0.0
    for _ in range(3):
        whole = sequences(rng, int(rng.integers(3, 12)))
        parts = deal(rng, whole, driver.size * passes, how, groups=groups, weighted=weighted)
        mine = parts[driver.rank * passes : (driver.rank + 1) * passes]
        if passes > 1:
            mine = [part for part in mine if len(part.ids)]  # ranks may have different numbers of them
        driver.step_packed(mine, None if how == "whole" else how)
        right = unpacked(whole, groups=groups, weighted=weighted)
        loss = alone.step([right])
        report = driver.report()
        assert abs(report.loss / loss - 1) < EXACT, (report.loss, loss)
        assert report.elements == int((whole.batch.w * (whole.ids >= 0) != 0).sum())
        tokens = Batch(*whole.batch[:2], whole.batch.w * (whole.ids >= 0))
        wrong = max(wrong, abs(alone.gradients([tokens])[0] / alone.gradients([right])[0] - 1))
    error = difference(driver, alone)
    assert error < EXACT, error
    assert wrong > 1e-3  # or these sequences would not tell
    return error


def law_packed_sequences_are_the_unpacked_ones(driver: Driver) -> dict[str, float]:
    return {"error": train(driver, 21, "whole")}


@needs("gloo-2", more="gloo-3 mpi-2")
def law_sequences_may_be_cut_by_ranks(driver: Driver) -> dict[str, float]:
    ways = itertools.product(("any", "ends"), (False, True))
    return {
        f"{how}{', groups' * groups}": train(driver, 22 + number, how, groups=groups, weighted=number != 2)
        for number, (how, groups) in enumerate(ways)
    }


@needs("gloo-2", more="gloo-3 mpi-2")
def law_sequences_may_be_cut_by_micro_batches(driver: Driver) -> dict[str, float]:
    return {how: train(driver, seed, how, passes=3) for seed, how in ((26, "any"), (27, "ends"))}
