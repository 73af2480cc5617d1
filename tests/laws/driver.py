"""What an adapter lends so that the laws can be tried on it, and the one process that they are held against.

The model is small and given by its numbers, so that every framework builds the same one: ``tanh(x W + b) V``
under a weighted squared error, trained by plain gradient descent. `Alone` computes it in NumPy, by hand and
without this library or any framework; a driver computes it with all ranks. What is compared are parameters:
with plain gradient descent they tell the gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

RATE = 0.05
Parameters = list[np.ndarray]  # W (5, 4), b (4,), V (4, 1)


class Batch(NamedTuple):
    """A micro-batch: inputs (n, 5), targets (n, 1), weights (n, 1)."""

    x: np.ndarray
    y: np.ndarray
    w: np.ndarray


class Packed(NamedTuple):
    """A micro-batch whose elements are tokens of sequences: all arrays (n, 1).

    Attributes:
        batch: the tokens.
        ids: of sequences, negative for padding.
        groups: of sequences; None for none.
        weight: of sequences; None for all 1.
    """

    batch: Batch
    ids: np.ndarray
    groups: np.ndarray | None = None
    weight: np.ndarray | None = None


class Driver(Protocol):
    """An adapter's way to take steps."""

    rank: int
    size: int

    def build(
        self,
        parameters: Parameters,
        *,
        reduction: str = "mean",
        nonfinite: str = "raise",
        penalty: float = 0.0,
        passes: int = 1,
    ) -> None:
        """Make the model with these numbers, an objective and whatever steps need.

        Args:
            parameters: of one dtype, which is the model's.
            reduction, nonfinite: the objective's.
            passes: the most micro-batches that any rank has in a step.
            penalty: that many times the sum of squares of all parameters is added to the loss.
        """

    def step(self, micro_batches: Sequence[Batch]) -> float | None:
        """Take one step with this rank's micro-batches; return its own loss, if the adapter shows that.

        Raises:
            Exception: what the adapter raises; in a graph TensorFlow's own, with our text.
        """

    def step_packed(self, micro_batches: Sequence[Packed], cut: str | None) -> float | None:
        """Take one step, of the reduction "sequence_mean".

        `cut`: where sequences may be cut over ranks, as `link_segments` takes it; None: they are whole.
        """

    def parameters(self) -> Parameters:
        """Return copies of this rank's parameters."""

    def report(self) -> Any:
        """Return the report of the last step that was taken (`hvdloss.StepReport`), or None."""

    def gather(self, array: np.ndarray) -> np.ndarray:
        """Return the arrays of all ranks, one after another along a new first axis."""


class Alone:
    """One process that sees every element."""

    def __init__(self, parameters: Parameters, penalty: float = 0.0, reduction: str = "mean") -> None:
        self.numbers = [p.astype(np.float64) for p in parameters]
        self.penalty, self.reduction = penalty, reduction

    def gradients(self, batches: Sequence[Batch]) -> tuple[float, Parameters]:
        """Return the loss of the elements of all batches, without the penalty, and its gradients."""
        x, y, w = (
            np.concatenate([np.asarray(b[i], np.float64) for b in batches if len(b.x)]) for i in range(3)
        )
        there = w[:, 0] != 0
        x, y, w = x[there], y[there], w[there]
        W, b, V = self.numbers
        h = np.tanh(x @ W + b)
        off = h @ V - y
        over = {"mean": w.sum(), "sum": 1.0, "batch_mean": float(len(w))}[self.reduction]
        out = 2 * w * off / over  # derivative by the prediction
        inner = out @ V.T * (1 - h**2)
        return float((w * off**2).sum() / over), [x.T @ inner, inner.sum(0), h.T @ out]

    def step(self, batches: Sequence[Batch]) -> float:
        """Take one step with the elements of all ranks; return their loss, without the penalty."""
        loss, gradients = self.gradients(batches)
        self.numbers = [
            p - RATE * (g + 2 * self.penalty * p) for p, g in zip(self.numbers, gradients, strict=True)
        ]
        return loss

    def plain_averaging_is_off_by(self, batches: Sequence[Batch]) -> float:
        """Return how far the mean of local gradients is from the right one, relative to its largest entry."""
        _, right = self.gradients(batches)
        local = [self.gradients([batch])[1] if batch.w.any() else [0 * g for g in right] for batch in batches]
        mean = [np.mean(parts, 0) for parts in zip(*local, strict=True)]
        off = max(float(np.abs(a - b).max()) for a, b in zip(mean, right, strict=True))
        return off / max(float(np.abs(g).max()) for g in right)


def network(rng: np.random.Generator, dtype: Any = np.float64) -> Parameters:
    """Return the parameters of a model."""
    return [rng.normal(size=shape).astype(dtype) for shape in ((5, 4), (4,), (4, 1))]


def elements(rng: np.random.Generator, count: int, dtype: Any = np.float64) -> Batch:
    """Return elements that drift, so that averages of parts are wrong; a fifth of the weights are zero."""
    drift = np.linspace(-2.0, 2.0, count)[:, None]
    x = rng.normal(size=(count, 5)) + drift
    y = rng.normal(size=(count, 1)) + drift
    w = rng.uniform(0.1, 3.0, size=(count, 1)) * (rng.uniform(size=(count, 1)) > 0.2)
    w[:1] = 1.0
    return Batch(x.astype(dtype), y.astype(dtype), w.astype(dtype))


def split(rng: np.random.Generator, whole: Batch, parts: int, *, empty: bool = True) -> list[Batch]:
    """Cut a batch into parts at random; some may be empty."""
    count = len(whole.x)
    if empty:
        inner = rng.integers(0, count + 1, size=parts - 1)
    else:
        inner = rng.choice(np.arange(1, count), size=parts - 1, replace=False)
    where = [0, *sorted(int(i) for i in inner), count]
    return [Batch(*(a[i:j] for a in whole)) for i, j in itertools.pairwise(where)]


def difference(driver: Driver, alone: Alone) -> float:
    """Return the largest difference of parameters, relative to the largest; they are equal on all ranks."""
    worst, scale = 0.0, max(float(np.abs(p).max()) for p in alone.numbers)
    for mine, right in zip(driver.parameters(), alone.numbers, strict=True):
        everywhere = driver.gather(mine)
        assert (everywhere == everywhere[0]).all(), "parameters differ between ranks"
        worst = max(worst, float(np.abs(mine - right).max()))
    return worst / scale


def raised(call: Callable[[], Any], name: str, *words: str) -> None:
    """Assert that a call raises this error, with these words; or TensorFlow's own with its text."""
    try:
        call()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        for word in (name, *words):
            assert word in text, (word, text)
        return
    raise AssertionError(f"no {name}")
