"""What an all-reduce costs: t = alpha * messages + bytes / beta, fitted to measured times.

Hockney's model (R. Hockney, "The communication challenge for MPP", Parallel Computing 20, 1994): alpha
is what a message costs however small it is, beta the bytes per second of a large one. :class:`LinkModel`
fits both from times as they come, predicts times of other sizes, other numbers of ranks and other links,
and says how sure it is; :func:`calibrate` measures a few sums for it.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hvdloss.comm.communicator import Communicator
from hvdloss.comm.messages import decode_all, decode_errors
from hvdloss.errors import ConfigError, UsageError

__all__ = ["Fit", "LinkModel", "Prediction", "calibrate", "probe_sizes", "ring_beta"]

Array = npt.NDArray[np.float64]

TUKEY = 4.685  # of the biweight: 95 % efficiency for normal errors
NORMAL = 1.4826  # standard deviations in a median absolute deviation of normal errors
# Errors below this are taken for noise however well the rest fits: a straight line is not true to 1 %,
# and sizes must not be dropped because others repeat well.
LEAST_SCALE = 0.03
POINTS = 32  # designs among which the fit looks for where to start
ITERATIONS = 100
FEWEST = 4  # times of a size, if the budget allows
BALANCED = 1e-3  # times are weighed by their prediction, but by no less than this part of themselves


@dataclass(frozen=True)
class Fit:
    """A fitted link.

    Attributes:
        alpha: seconds per message, at least 0.
        beta: payload bytes per second, above 0; infinite if size does not matter.
        alpha_std: standard error of alpha; infinite where there are as many times as unknowns.
        beta_std: standard error of beta.
        samples: number of times that the fit uses.
        residual: how far times typically lie from the fit, as a part of the predicted time (the median
            absolute deviation, as a standard deviation).
    """

    alpha: float
    beta: float
    alpha_std: float
    beta_std: float
    samples: int
    residual: float


@dataclass(frozen=True)
class Prediction:
    """A predicted time.

    Attributes:
        seconds: the time.
        std: standard error of `seconds` as the fit knows it; single measurements scatter around it by
            :attr:`Fit.residual` besides.
    """

    seconds: float
    std: float


class _Sample(NamedTuple):
    seconds: float
    bytes: float
    messages: float

    @property
    def design(self) -> tuple[float, float]:
        """What was sent, whatever time it took."""
        return self.bytes, self.messages


class _Solution(NamedTuple):
    """A fit with what predictions need of it: (alpha, 1 / beta) and their covariance."""

    fit: Fit
    inverse: float
    covariance: tuple[float, float, float]  # var alpha, var inverse, their covariance


class LinkModel:
    """The all-reduce time of a group of ranks, learned from measured times.

    The fit minimises relative errors with Tukey's biweight, so that microseconds and seconds count alike
    and a fifth of all times may be ten times too long without harm; alpha and 1/beta are kept at least
    0. Its start is the pair of measured points whose line is near most others (bounded relative errors,
    as in an MM-estimator: V. Yohai, Annals of Statistics 15, 1987).

    Equal additions give equal numbers to the last bit, on every rank and machine.

    Args:
        ranks: number of ranks that the times are measured on.
        window: number of times that are kept. When there are more, the oldest of those with the most common
            (bytes, messages) goes, so that the steps of a long training do not push out the few times of
            other sizes that the fit needs.

    Raises:
        ConfigError: `ranks` below 1 or `window` below 2.
    """

    def __init__(self, ranks: int, window: int = 512) -> None:
        self.ranks = _count("ranks", ranks, 1)
        self.window = _count("window", window, 2)
        self._samples: list[_Sample] = []
        self._designs: Counter[tuple[float, float]] = Counter()
        self._solution: _Solution | None = None
        self._solved = True

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, seconds: float, bytes: float, messages: float = 1) -> None:
        """Add one measured time.

        Args:
            seconds: how long it took, above 0.
            bytes: of payload that each rank contributed, summed over the messages; at least 0.
            messages: number of consecutive all-reduces, at least 0; a mean may be broken.

        Raises:
            ConfigError: a number out of its range, or nothing sent at all.
        """
        sample = _Sample(
            _number("seconds", seconds, least=0.0, strictly=True),
            _number("bytes", bytes, least=0.0),
            _number("messages", messages, least=0.0),
        )
        if not sample.bytes and not sample.messages:
            raise ConfigError(f"bytes={bytes!r} and messages={messages!r}: nothing was sent in {seconds!r} s")
        self._samples.append(sample)
        self._designs[sample.design] += 1
        self._solved = False
        if len(self._samples) > self.window:
            most = max(self._designs.values())
            oldest = next(i for i, one in enumerate(self._samples) if self._designs[one.design] == most)
            design = self._samples.pop(oldest).design
            self._designs[design] -= 1
            if not self._designs[design]:
                del self._designs[design]

    def fit(self) -> Fit | None:
        """Return the fit to what was added so far; None while it could not tell alpha from beta.

        For that it needs two samples at least whose bytes per message differ. Costs some milliseconds
        after new times, nothing without.
        """
        solution = self._solve()
        return None if solution is None else solution.fit

    def _solve(self) -> _Solution | None:
        if not self._solved:
            self._solution = _solve(self._samples)
            self._solved = True
        return self._solution

    def predict(
        self,
        bytes: float,
        messages: float = 1,
        *,
        ranks: int | None = None,
        alpha: float | None = None,
        beta: float | None = None,
    ) -> Prediction:
        """Return the time of an all-reduce: here, on another number of ranks, or over another link.

        For another number of ranks the algorithm is taken to be a ring, over links like those measured:
        with p ranks a message takes 2(p-1) steps, and each link carries 2(p-1)/p of the payload (R.
        Thakur, R. Rabenseifner and W. Gropp, IJHPCA 19, 2005; P. Patarasuk and X. Yuan, JPDC 69, 2009).
        One rank sends nothing, in no time.

        Args:
            bytes: of payload that each rank contributes, summed over the messages.
            messages: number of consecutive all-reduces.
            ranks: predict for this number of ranks; None for the model's own.
            alpha: seconds per message instead of the fitted ones, as the model's own number of ranks
                would see them.
            beta: payload bytes per second instead of the fitted ones, as the model's own number of ranks
                would see them (:func:`ring_beta` gives them for a link's rate); may be infinite.

        Raises:
            ConfigError: a number out of its range; other ranks, where the model's own are only one.
            UsageError: there is no fit yet, and `alpha` or `beta` is not given.
        """
        b = _number("bytes", bytes, least=0.0)
        m = _number("messages", messages, least=0.0)
        wanted = self.ranks if ranks is None else _count("ranks", ranks, 1)
        inverse = None
        if alpha is not None:
            alpha = _number("alpha", alpha, least=0.0)
        if beta is not None:
            inverse = 1.0 / _number("beta", beta, least=0.0, strictly=True, most=math.inf)
        if wanted == 1:
            return Prediction(0.0, 0.0)
        if self.ranks == 1:
            raise ConfigError(f"ranks={wanted}: a model of one rank has seen no link to predict from")
        var_a = var_g = cov = 0.0  # what is given is known
        if alpha is None or inverse is None:
            solution = self._solve()
            if solution is None:
                raise UsageError(
                    f"the link model has no fit yet: of {len(self)} time(s), none differ in bytes per "
                    f"message. Add times of two sizes at least (hvdloss.terms.link.calibrate measures "
                    f"some), or give alpha and beta."
                )
            if alpha is None:
                alpha, var_a = solution.fit.alpha, solution.covariance[0]
            if inverse is None:
                inverse, var_g = solution.inverse, solution.covariance[1]
            if var_a and var_g:
                cov = solution.covariance[2]
        m *= (wanted - 1) / (self.ranks - 1)
        b *= _share(wanted) / _share(self.ranks)
        if math.isinf(var_a) or math.isinf(var_g):
            return Prediction(alpha * m + inverse * b, math.inf)
        variance = var_a * m * m + 2.0 * cov * m * b + var_g * b * b
        return Prediction(alpha * m + inverse * b, math.sqrt(max(variance, 0.0)))

    def state_dict(self) -> dict[str, Any]:
        """Return the whole model as plain numbers, lists and dicts, ready for JSON."""
        return {
            "ranks": self.ranks,
            "window": self.window,
            "samples": [[one.seconds, one.bytes, one.messages] for one in self._samples],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> LinkModel:
        """Return the model of a :meth:`state_dict`; it fits and predicts bitwise the same.

        Raises:
            ConfigError: not such a state.
        """
        try:
            model = cls(state["ranks"], state["window"])
            samples = [(seconds, size, messages) for seconds, size, messages in state["samples"]]
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"state={state!r:.200} is not what LinkModel.state_dict() returns") from error
        if len(samples) > model.window:
            raise ConfigError(f"state has {len(samples)} samples, more than its window={model.window}")
        for sample in samples:
            model.add(*sample)
        return model


def ring_beta(link: float, ranks: int) -> float:
    """Return the payload bytes per second of a ring all-reduce over links of `link` bytes per second.

    Each link carries 2(p-1)/p of the payload of p ranks (Patarasuk and Yuan 2009), in both directions at
    once: with two ranks the payload goes at the rate of the link. Infinite for one rank.

    Raises:
        ConfigError: `link` not above 0, `ranks` below 1.
    """
    rate = _number("link", link, least=0.0, strictly=True, most=math.inf)
    return rate / share if (share := _share(_count("ranks", ranks, 1))) else math.inf


def _share(ranks: int) -> float:
    """Return what part of the payload each link carries in a ring all-reduce."""
    return 2.0 * (ranks - 1) / ranks


# -- the fit ------------------------------------------------------------------------------------------


def _solve(samples: list[_Sample]) -> _Solution | None:
    """Return the fit; None if the samples' bytes per message are all the same.

    Sums are exact (math.fsum) and elementwise operations are IEEE's own, so the result does not depend
    on how NumPy was compiled, or on the processor.
    """
    if len({_ratio(one.design) for one in samples}) < 2:
        return None
    times: dict[tuple[float, float], list[float]] = {}
    for one in samples:
        times.setdefault(one.design, []).append(one.seconds)
    middles = [_Sample(statistics.median(t), *design) for design, t in times.items()]
    middles.sort(key=lambda one: (_ratio(one.design), one.design))
    t, b, m = (np.array(column) for column in zip(*samples, strict=True))
    alpha, inverse = _begin(middles)
    cutoff = TUKEY * max(_scale(_residuals(t, b, m, alpha, inverse)[0]), LEAST_SCALE)
    moments = (0.0, 0.0, 0.0)
    weights = np.zeros(len(t))
    for _ in range(ITERATIONS):
        residuals, by = _residuals(t, b, m, alpha, inverse)
        weights = _biweight(residuals / cutoff)
        x, y, z = m / by, b / by, t / by
        moments = math.fsum(weights * x * x), math.fsum(weights * x * y), math.fsum(weights * y * y)
        if not _regular(moments):  # all the weight is on one line through zero
            break
        before = alpha, inverse
        alpha, inverse = _least_squares(moments, math.fsum(weights * x * z), math.fsum(weights * y * z))
        if _near(before[0], alpha) and _near(before[1], inverse):
            break
    residuals, _ = _residuals(t, b, m, alpha, inverse)
    covariance = _covariance(moments, weights, residuals)
    beta = 1.0 / inverse if inverse else math.inf
    fit = Fit(
        alpha=alpha,
        beta=beta,
        alpha_std=math.sqrt(covariance[0]),
        beta_std=math.sqrt(covariance[1]) * beta * beta if inverse else math.inf,
        samples=len(samples),
        residual=_scale(residuals),
    )
    return _Solution(fit, inverse, covariance)


def _ratio(design: tuple[float, float]) -> float:
    """Return the bytes per message; times of equal ones cannot tell alpha from beta."""
    return design[0] / design[1] if design[1] else math.inf


def _begin(middles: list[_Sample]) -> tuple[float, float]:
    """Return (alpha, 1 / beta) of two of the points, or of one with the other 0: the line near most.

    Near: the sum over points of |t - p| / max(t, p), where what is far off counts no more than 1.
    """
    if len(middles) > POINTS:
        middles = [middles[i * (len(middles) - 1) // (POINTS - 1)] for i in range(POINTS)]
    lines: list[tuple[float, float]] = []
    for one, two in itertools.combinations(middles, 2):
        determinant = one.messages * two.bytes - two.messages * one.bytes
        if determinant:
            alpha = (one.seconds * two.bytes - two.seconds * one.bytes) / determinant
            inverse = (one.messages * two.seconds - two.messages * one.seconds) / determinant
            if alpha >= 0 and inverse >= 0:
                lines.append((alpha, inverse))
    lines += [(one.seconds / one.messages, 0.0) for one in middles if one.messages]
    lines += [(0.0, one.seconds / one.bytes) for one in middles if one.bytes]
    t, b, m = (np.array(column) for column in zip(*middles, strict=True))

    def distance(line: tuple[float, float]) -> float:
        p = line[0] * m + line[1] * b
        return math.fsum(np.abs(t - p) / np.maximum(t, p))

    return min(lines, key=distance)


def _residuals(t: Array, b: Array, m: Array, alpha: float, inverse: float) -> tuple[Array, Array]:
    """Return the relative errors, and the times that they are relative to."""
    p = alpha * m + inverse * b
    by = np.maximum(p, BALANCED * t)
    return (t - p) / by, by


def _scale(residuals: Array) -> float:
    return NORMAL * float(np.median(np.abs(residuals)))


def _biweight(u: Array) -> Array:
    """Return Tukey's weights, (1 - u^2)^2 inside of -1..1 and 0 outside."""
    inside = np.maximum(1.0 - u * u, 0.0)
    return inside * inside


def _regular(moments: tuple[float, float, float]) -> bool:
    xx, xy, yy = moments
    return xx * yy - xy * xy > 1e-12 * xx * yy


def _least_squares(moments: tuple[float, float, float], xz: float, yz: float) -> tuple[float, float]:
    """Return the non-negative (alpha, 1 / beta) of least weighted squares; two unknowns need no solver."""
    xx, xy, yy = moments
    determinant = xx * yy - xy * xy
    alpha, inverse = (xz * yy - yz * xy) / determinant, (yz * xx - xz * xy) / determinant
    if alpha < 0:
        return 0.0, yz / yy
    if inverse < 0:
        return xz / xx, 0.0
    return alpha, inverse


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-13 * max(a, b)


def _covariance(
    moments: tuple[float, float, float], weights: Array, residuals: Array
) -> tuple[float, float, float]:
    """Return the variances and the covariance of (alpha, 1 / beta), from the normal equations.

    Also where one of them is held at 0: how far above it might be is no better known then.
    """
    xx, xy, yy = moments
    freedom = math.fsum(weights) - 2.0
    if freedom <= 0 or not _regular(moments):
        return math.inf, math.inf, 0.0
    factor = math.fsum(weights * residuals * residuals) / freedom / (xx * yy - xy * xy)
    return yy * factor, xx * factor, -xy * factor


# -- calibration --------------------------------------------------------------------------------------


def probe_sizes() -> list[tuple[int, int]]:
    """Return (bytes, repeats) of a short calibration, smallest first: a fifth of a second on a fast link."""
    return [
        (8, 12),
        (2**10, 10),
        (2**14, 10),
        (2**17, 8),
        (2**19, 8),
        (2**20, 6),
        (2**21, 6),
        (2**22, 6),
    ]


def calibrate(
    communicator: Communicator, model: LinkModel, *, budget_s: float = 0.5, name: str = "hvdloss.probe"
) -> Fit | None:
    """Measure blocking sums of several sizes on all ranks, add their times to `model`, and return its fit.

    Every rank makes the same sums, whatever its own clock says: when to stop is decided from numbers that
    the ranks agreed on. A sum's time is the smallest over ranks, since the last rank did not wait;
    all ranks add the same times, so that models which were equal before are equal after, to the last bit.

    Args:
        communicator: the ranks, all of which must call.
        model: of as many ranks.
        budget_s: seconds that it may take. Over a slow link the larger sizes are left out; it takes
            longer only where sums are so slow that no size has shown by then that bytes take time.
        name: of the messages; each size has its own.

    Returns:
        The model's fit; None on one rank, where nothing is sent and nothing added.

    Raises:
        ConfigError: a budget that is not above 0, or a model of another number of ranks.

    Collectives: per size one sum to warm up; the sums that are timed; one small sum per decision; at the
    end one gather.
    """
    _number("budget_s", budget_s, least=0.0, strictly=True)
    if model.ranks != communicator.size:
        raise ConfigError(f"model is of ranks={model.ranks}, but the communicator has {communicator.size}")
    if communicator.size == 1:
        return None

    def timed(size: int) -> float:
        array = np.zeros(size // 8)
        began = time.perf_counter()
        communicator.all_reduce(array, f"{name}.{size}")
        return time.perf_counter() - began

    def agreed(seconds: float) -> tuple[float, float]:
        """Return the mean over ranks of `seconds`, and of the seconds spent so far."""
        mine = np.array([seconds, time.perf_counter() - began])
        mean = communicator.all_reduce(mine, f"{name}.agreed") / communicator.size
        return float(mean[0]), float(mean[1])

    began = time.perf_counter()
    sizes = probe_sizes()
    mine: list[tuple[int, list[float]]] = []
    typical: list[float] = []
    for (size, _), (following, _) in zip(sizes, [*sizes[1:], (0, 0)], strict=True):
        best = timed(size)  # the warm-up, which is no sample
        times: list[float] = []
        mine.append((size, times))
        typical.append(math.inf)
        fits = False
        # A single time may be a busy moment's: before that ends the calibration, look again.
        while not fits and len(times) < FEWEST:
            times.append(timed(size))
            best = min(best, times[-1])
            typical[-1], spent = agreed(best)
            growth = max(typical[-1] - typical[0], 0.0) / size * max(following - size, 0)
            fits = spent + (1 + FEWEST) * (typical[-1] + growth) <= budget_s
        if not fits and typical[-1] > 2.0 * typical[0]:
            break
    # Then each size in turn, so that a busy moment does not hit only one.
    for _ in range(max(most for _, most in sizes)):
        if spent + sum(typical) > budget_s:
            break
        for (size, times), (_, most) in zip(mine, sizes, strict=False):
            if len(times) < most:
                times.append(timed(size))
        _, spent = agreed(0.0)
    everyone = decode_all(communicator.all_gather_bytes(json.dumps(mine).encode(), f"{name}.all"), "times")
    with decode_errors("times"):
        for rows in zip(*everyone, strict=True):
            for seconds in zip(*(times for _, times in rows), strict=True):
                model.add(min(seconds), rows[0][0])
    return model.fit()


def _count(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ConfigError(f"{name}={value!r} must be an integer of at least {least}")
    return int(value)


def _number(name: str, value: float, *, least: float, strictly: bool = False, most: float = 1.7e308) -> float:
    """Return the value as a float in its range, infinity only where `most` is."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not least <= number <= most or (strictly and number == least):
        kind = "a number" if math.isinf(most) else "a finite number"
        raise ConfigError(
            f"{name}={value!r} must be {kind} {'above' if strictly else 'of at least'} {least:g}"
        )
    return number
