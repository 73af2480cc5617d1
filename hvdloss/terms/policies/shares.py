"""Batch shares: more samples for faster ranks, at the same global batch."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss._util.apportion import apportion
from hvdloss.errors import ConfigError, UsageError
from hvdloss.terms.policies.period import SyncPeriod
from hvdloss.terms.term import Decision, Policy, StepStats

__all__ = ["BatchShares", "SharedBatches"]

Array = npt.NDArray[np.float64]


class BatchShares(Policy):
    """Gives each rank a share of every global batch in proportion to its measured speed.

    Exact, because the contract holds for uneven shares: the step's gradient is that of the global batch
    however it is split. Speed is samples per second of computation, the median over the last `every`
    exchanges; time spent waiting for other ranks does not count. Shares change only where that is predicted
    to shorten the step by at least `gain` more than noise alone would suggest.

    Args:
        batch_size: samples in a global batch, over all ranks; fixed.
        every: exchanges between two decisions.
        gain: least predicted saving, as a share of the step's time without communication.
        min_per_rank: least samples of a global batch on each rank.
        delay: steps from a decision until it takes effect, at least as many as a loader prefetches:
            ``num_workers * prefetch_factor`` of a PyTorch DataLoader.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    state_attrs = ("step",)
    per_rank_state_attrs = ("_before", "_from", "_plans", "_seconds")

    def __init__(
        self, batch_size: int, *, every: int = 10, gain: float = 0.05, min_per_rank: int = 1, delay: int = 0
    ) -> None:
        for name, value, low in (
            ("batch_size", batch_size, 1),
            ("every", every, 1),
            ("min_per_rank", min_per_rank, 0),
            ("delay", delay, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name}={value!r} of BatchShares must be an integer of at least {low}")
        if not 0 <= gain < 1:
            raise ConfigError(f"gain={gain!r} of BatchShares must lie in [0, 1)")
        self.batch_size, self.every, self.gain = batch_size, every, gain
        self.min_per_rank, self.delay = min_per_rank, delay
        self.rank: int | None = None
        self.step = 0  # the last finished one

    def reset(self, rank: int, size: int) -> None:
        """Start with even shares."""
        self.rank = rank
        self.step = 0
        self._before = (0, 0)  # the finished ones before it
        self._period: SyncPeriod | None = None
        self._from = [0]
        self._plans = [apportion(self.batch_size, np.ones(size), self.min_per_rank)]
        self._seconds: list[Array] = []

    def sizes_at(self, step: int) -> npt.NDArray[np.int64]:
        """Return each rank's samples in step number `step`, from 1; int64 ``(ranks,)``.

        Raises:
            UsageError: a step so far ahead that a decision may still change it.
        """
        if self.rank is None:
            raise UsageError("the ranks are not known yet: make the DistributedOptimizer before the batches")
        # No decisions are made between two exchanges.
        known = 1 if self._period is None else self._period.period
        if step > self.step + known + self.delay:
            raise UsageError(
                f"the batch of step {step} was asked for after step {self.step}: a loader that reads ahead "
                f"needs BatchShares(..., delay={step - self.step - known}) or more"
            )
        return self._at(step)

    def _at(self, step: int) -> npt.NDArray[np.int64]:
        return self._plans[bisect.bisect_right(self._from, step) - 1]

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Each rank's samples in the next step."""
        return self.sizes_at(self.step + 1)

    def on_step_end(self, term: Any, step: StepStats) -> Sequence[Decision]:
        """Measure; choose new shares if that is due and pays."""
        computation = step.column("computation")  # of the step (or local steps) before this one
        (start, end), self._before = self._before, (self.step, step.step)
        self.step = step.step
        self._period = next((policy for policy in term.policies if isinstance(policy, SyncPeriod)), None)
        # The first steps compile, allocate and connect.
        if end < 3 or (computation <= 0).any():
            return ()
        samples = np.sum([self._at(one) for one in range(start + 1, end + 1)], axis=0)
        self._seconds.append(computation / np.maximum(samples, 1))
        if len(self._seconds) < self.every:
            return ()
        measured, self._seconds = np.array(self._seconds), []
        per_sample = np.median(measured, axis=0)
        current = self._plans[-1]
        if self._from[-1] > step.step:  # a decision that has not taken effect yet
            return ()
        planned = apportion(self.batch_size, 1.0 / per_sample, self.min_per_rank)
        before, after = float((current * per_sample).max()), float((planned * per_sample).max())
        threshold = self.gain + _noise_share(measured / per_sample)
        if before - after < threshold * before or (planned == current).all():
            return ()
        self._from.append(step.step + 1 + self.delay)
        self._plans.append(planned)
        slowest = int(np.argmax(current * per_sample))
        return [
            Decision(
                step.step,
                "batch sizes",
                current.tolist(),
                planned.tolist(),
                f"rank {slowest} computes {before:.4g} s a step, as long as any; in proportion to speed "
                f"the longest takes {after:.4g} s ({1 - after / before:.0%} less)",
            )
        ]


def _noise_share(relative: Array) -> float:
    """Return by what share noise alone raises the largest of many ranks' medians.

    Of thousands of ranks some always look slow, and shares would change at every decision.

    Args:
        relative: measurements over their rank's median, ``(measurements, ranks)``.
    """
    count, ranks = relative.shape
    scatter = 1.4826 * float(np.median(np.abs(relative - 1.0)))  # standard deviation, were it normal
    of_median = 1.2533 * scatter / math.sqrt(count)
    # The largest of so many standard normals is expected here (Blom 1958).
    return of_median * NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


class SharedBatches:
    """This rank's part of every global batch of one epoch, as lists of indices.

    The same permutation on all ranks, split into global batches, each split by the shares of its step:
    together the ranks see every sample exactly once. Use it as ``batch_sampler`` of a PyTorch DataLoader,
    or iterate over it. Iterating again is the next epoch.

    Args:
        samples: size of the data set.
        shares: the shares; its rank must be known (make the optimizer first).
        shuffle: permute the samples differently in each epoch.
        seed: of the permutation; equal on all ranks.
        drop_last: leave out an incomplete last batch.
    """

    def __init__(
        self,
        samples: int,
        shares: BatchShares,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if samples < 0:
            raise ConfigError(f"samples={samples!r} must be at least 0")
        self.samples, self.shares, self.shuffle, self.seed = samples, shares, shuffle, seed
        self.drop_last = drop_last
        self.epoch = 0

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        whole, rest = divmod(self.samples, self.shares.batch_size)
        return whole + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's indices, step by step."""
        epoch, self.epoch = self.epoch, self.epoch + 1
        order = np.arange(self.samples)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.samples)
        first = self.shares.step + 1
        size = self.shares.batch_size
        for number in range(len(self)):
            batch = order[number * size : (number + 1) * size]
            sizes = self.shares.sizes_at(first + number)
            if len(batch) < size:
                sizes = apportion(len(batch), sizes)
            assert self.shares.rank is not None
            start = int(sizes[: self.shares.rank].sum())
            yield batch[start : start + int(sizes[self.shares.rank])].tolist()
