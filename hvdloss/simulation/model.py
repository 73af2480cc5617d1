"""Training on ranks that are not there: what a plan would cost, before machines are rented for it.

A model says how long ranks compute (:class:`ComputeModel`), how long sums over them take
(:class:`NetworkModel`) and how the loss falls (:class:`LossModel`). :func:`simulate_training` makes of
that, exchange by exchange, the table of ledgers that real ranks would have exchanged, passes it to
the controller that real ranks run (:class:`hvdloss.terms.controller.Controller`), and does what that decides:
the shares of the batch, the synchronisation period, compression. Nothing that decides is written twice.

Time is modelled, not spent: a step of ten thousand ranks costs about a millisecond.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss._util.apportion import apportion
from hvdloss.comm.communicator import OneProcess
from hvdloss.comm.plan import BUCKET_BYTES, FIRST_BUCKET_BYTES
from hvdloss.errors import ConfigError
from hvdloss.losses.ledger import COLUMN, LEDGER_WIDTH
from hvdloss.terms.communication import CommunicationCost
from hvdloss.terms.controller import Controller
from hvdloss.terms.link import LinkModel, probe_sizes
from hvdloss.terms.policies.compression import AdaptiveCompression
from hvdloss.terms.policies.log import record
from hvdloss.terms.policies.period import SyncPeriod
from hvdloss.terms.policies.shares import BatchShares
from hvdloss.terms.term import CommStats, Decision, Policy

__all__ = [
    "ComputeModel",
    "Figures",
    "LossModel",
    "NetworkModel",
    "Outcome",
    "TrainingPlan",
    "simulate_training",
]

Array = npt.NDArray[np.float64]
Sizes = npt.NDArray[np.int64]

# Of a step's computation, what a backward pass takes: about twice the forward pass; buckets overlap it.
BACKWARD = 2 / 3


@dataclass(frozen=True)
class ComputeModel:
    """How long a rank computes in one step: ``fixed + samples * per_sample * slow * noise + delay``.

    Attributes:
        per_sample: seconds per sample, forward, backward and what grows with the batch.
        fixed: seconds per step whatever the batch: kernels to start, the optimizer's update.
        noise: scatter of single steps: a lognormal factor of mean 1, the standard deviation of whose
            logarithm this is. 0.05 is a quiet machine, 0.3 a shared one.
        tail: probability that a rank is delayed in a step by something temporary.
        tail_seconds: the least such delay; delays are Pareto distributed from there on.
        tail_shape: of the Pareto distribution, above 0; the smaller the heavier. At most 1 has no mean.
        slow: by rank, how many times as long its samples always take.
        slow_share: share of all ranks, chosen by the seed, whose samples take `slow_factor` times as long.
        slow_factor: of those.

    Heavy tails are what is seen of many machines: J. Dean and L. Barroso, "The Tail at Scale",
    Communications of the ACM 56 (2013).

    Raises:
        ConfigError: a number out of its range.
    """

    per_sample: float = 1e-3
    fixed: float = 0.0
    noise: float = 0.0
    tail: float = 0.0
    tail_seconds: float = 0.1
    tail_shape: float = 1.5
    slow: Mapping[int, float] = field(default_factory=dict)
    slow_share: float = 0.0
    slow_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("per_sample", "fixed", "noise", "tail_seconds"):
            _check(self, name)
        _check(self, "tail", most=1.0)
        _check(self, "slow_share", most=1.0)
        _check(self, "tail_shape", above=True)
        _check(self, "slow_factor", above=True)
        _check_by_number(self, "slow", "rank", "factor")
        if not self.per_sample and not self.fixed:
            raise ConfigError("ComputeModel(per_sample=0, fixed=0): a step must take some time")

    def factors(self, ranks: int, seed: int = 0) -> Array:
        """Return how many times as long each rank's samples take; float64 ``(ranks,)``.

        Raises:
            ConfigError: `slow` names a rank that is not there.
        """
        _check_there(self, "slow", ranks, "ranks")
        out = np.ones(ranks)
        chosen = np.random.default_rng([seed, 0]).permutation(ranks)[: round(self.slow_share * ranks)]
        out[chosen] = self.slow_factor
        out[list(self.slow)] = list(self.slow.values())
        return out

    def seconds(self, samples: npt.ArrayLike, factors: Array, rng: np.random.Generator) -> Array:
        """Draw how long each rank computes for its samples; float64 ``(ranks,)``."""
        out = np.asarray(samples) * (self.per_sample * factors)
        if self.noise:
            out *= _mean_one(self.noise, rng, len(out))
        out += self.fixed
        if self.tail:
            late = np.flatnonzero(rng.random(len(out)) < self.tail)
            out[late] += self.tail_seconds * (1.0 - rng.random(len(late))) ** (-1.0 / self.tail_shape)
        return out


@dataclass(frozen=True)
class NetworkModel:
    """How long a sum over all ranks takes: by a ring all-reduce, or by halving and doubling.

    In a ring of p ranks a message goes h = 2(p-1) hops, and each link carries 2(p-1)/p of the payload;
    all links work at once, so the slowest sets the pace (P. Patarasuk and X. Yuan, "Bandwidth optimal
    all-reduce algorithms", JPDC 69, 2009). By recursive halving and doubling the hops are
    h = 2 ceil(log2 p), at the same payload (R. Thakur, R. Rabenseifner and W. Gropp, "Optimization of
    Collective Communication Operations in MPICH", IJHPCA 19, 2005)::

        per_exchange + messages * h * latency + 2 (p-1)/p * bytes / bandwidth

    With several ranks per host the sum is hierarchical: scattered among the ranks of a host over their
    local link, summed over the hosts (the above, with hosts for ranks), gathered on the host again.

    Attributes:
        latency: seconds per message and hop.
        bandwidth: bytes per second of each link, in each direction; may be infinite.
        per_exchange: seconds per exchange that grow with neither ranks nor messages: the agreement that
            everybody is ready, which messages under way together share.
        slow: bytes per second of single links, by number: link k leads from rank k to the next (from host
            k, with several ranks per host).
        overlap: share of a sum of gradients that can overlap the backward pass; never more
            than the backward pass lasts (two thirds of the computation). Sums of parameters overlap
            nothing.
        jitter: scatter of single sums: standard deviation of the logarithm of a factor of mean 1.
        handling: seconds per byte that a rank is busy with gradients besides sending them: copying,
            scaling, dividing. Nothing of it is hidden.
        parameter_handling: the same for an exchange of parameters after local steps.
        algorithm: ``"ring"`` (Gloo's) or ``"halving"``.
        local_ranks: ranks per host.
        local_latency: seconds per message and hop inside a host.
        local_bandwidth: bytes per second inside a host.

    Raises:
        ConfigError: a number out of its range.
    """

    latency: float = 50e-6
    bandwidth: float = 1.25e9
    per_exchange: float = 0.0
    slow: Mapping[int, float] = field(default_factory=dict)
    overlap: float = 0.0
    jitter: float = 0.0
    handling: float = 0.0
    parameter_handling: float = 0.0
    algorithm: str = "ring"
    local_ranks: int = 1
    local_latency: float = 5e-6
    local_bandwidth: float = 1e10

    def __post_init__(self) -> None:
        for name in ("latency", "per_exchange", "jitter", "handling", "parameter_handling", "local_latency"):
            _check(self, name)
        for name in ("bandwidth", "local_bandwidth"):
            if getattr(self, name) != math.inf:
                _check(self, name, above=True)
        _check(self, "overlap", most=1.0)
        _check_by_number(self, "slow", "link", "rate")
        _check_count(self, "local_ranks", 1)
        if self.algorithm not in ("ring", "halving"):
            raise ConfigError(f"algorithm={self.algorithm!r} of NetworkModel must be 'ring' or 'halving'")

    @classmethod
    def from_link(cls, link: LinkModel, **more: Any) -> NetworkModel:
        """Return the model of a link that was measured on real ranks.

        As a ring, it takes as long on any number of ranks as ``link.predict(..., ranks=...)`` says.

        Args:
            link: with a fit, of two ranks at least.
            more: other attributes.

        Raises:
            ConfigError: no fit, or one rank.
        """
        fit = link.fit()
        if fit is None:
            raise ConfigError(
                f"link has no fit yet ({len(link)} times): measure sums of two sizes at least "
                f"(hvdloss.terms.link.calibrate does)"
            )
        return cls.from_fits({link.ranks: (fit.alpha, fit.beta)}, **more)

    @classmethod
    def from_fits(cls, fits: Mapping[int, tuple[float, float]], **more: Any) -> NetworkModel:
        """Return the model of fits t = alpha * messages + bytes / beta on one or several numbers of ranks.

        One fit cannot tell what of alpha grows with the ranks, and all of it is taken to; several can
        (least squares on relative errors, neither part below 0). The rate is the geometric mean of theirs.

        Args:
            fits: (alpha in seconds per message, beta in payload bytes per second) by number of ranks.
            more: other attributes.

        Raises:
            ConfigError: no fit, fewer than two ranks, or numbers that are none of a link.
        """
        if not fits:
            raise ConfigError("fits={}: at least one fit of a link is needed")
        for ranks, (alpha, beta) in fits.items():
            if not isinstance(ranks, int) or ranks < 2:
                raise ConfigError(f"fits of ranks={ranks!r}: a link is measured on two ranks at least")
            if not (0 <= alpha < math.inf and beta > 0):
                raise ConfigError(
                    f"fits: alpha={alpha!r}, beta={beta!r} on {ranks} ranks: alpha must be finite and at "
                    f"least 0, beta above 0"
                )
        hops = np.array([2.0 * (ranks - 1) for ranks in fits])
        alphas = np.array([alpha for alpha, _ in fits.values()])
        constant, latency = _constant_and_slope(hops, alphas)
        rates = [beta * 2 * (ranks - 1) / ranks for ranks, (_, beta) in fits.items()]
        bandwidth = math.exp(math.fsum(map(math.log, rates)) / len(rates))
        found = {"latency": latency, "per_exchange": constant, "bandwidth": bandwidth}
        return cls(**{**found, **more})

    def seconds(self, bytes: float, messages: float, ranks: int) -> float:
        """Return how long a sum over ranks takes, without overlap, jitter, handling; 0 for one rank.

        Args:
            bytes: of payload that each rank contributes, over all messages.
            messages: number of all-reduces.
            ranks: over which.

        Raises:
            ConfigError: `slow` names a link that is not there.
        """
        hosts = -(-ranks // self.local_ranks)
        inside = min(ranks, self.local_ranks)
        _check_there(self, "slow", hosts, "hosts" if self.local_ranks > 1 else "ranks")
        if ranks == 1:
            return 0.0
        rate = min([self.bandwidth, *self.slow.values()])
        hop = self._hops(hosts) * self.latency + self._hops(inside) * self.local_latency
        between = 2 * (hosts - 1) / hosts * bytes / rate
        within = 2 * (inside - 1) / inside * bytes / self.local_bandwidth
        return self.per_exchange + messages * hop + between + within

    def _hops(self, ranks: int) -> int:
        return 2 * (ranks - 1 if self.algorithm == "ring" else math.ceil(math.log2(ranks)))

    def draw(self, bytes: float, messages: float, ranks: int, rng: np.random.Generator) -> float:
        """Return :meth:`seconds` with jitter."""
        out = self.seconds(bytes, messages, ranks)
        return out * float(_mean_one(self.jitter, rng, 1)[0]) if self.jitter else out


@dataclass(frozen=True)
class LossModel:
    """A declared loss curve, so that rules that follow the loss have one to follow. It predicts nothing.

    After e effective steps the loss is ``floor + (start - floor) (1 + e / scale)^-exponent``, a power law
    toward a floor, as is found for many models and data sets (J. Hestness et al., "Deep Learning Scaling
    is Predictable, Empirically", arXiv:1712.00409, 2017). A step with the gradient of all ranks is one
    effective step; one of tau local steps is ``1 / (1 + slowdown)`` of one, with the slowdown
    that :class:`hvdloss.terms.policies.SyncPeriod` reckons with. The size of the batch, an outer optimizer
    and compression do not change the curve.

    Attributes:
        start: the loss of the first step.
        floor: where it goes, at least 0 and below `start`.
        exponent: above 0.
        scale: effective steps, above 0.
        noise: scatter of single batches: standard deviation of the logarithm of a factor of mean 1.
        drift: how far ranks move apart in local steps: the variance of their moves over the square of the
            mean one; r in SyncPeriod's docstring.

    Raises:
        ConfigError: a number out of its range.
    """

    start: float = 2.5
    floor: float = 0.2
    exponent: float = 0.5
    scale: float = 100.0
    noise: float = 0.0
    drift: float = 1.0

    def __post_init__(self) -> None:
        for name in ("start", "exponent", "scale"):
            _check(self, name, above=True)
        for name in ("floor", "noise", "drift"):
            _check(self, name)
        if self.floor >= self.start:
            raise ConfigError(f"floor={self.floor!r} of LossModel must lie below start={self.start!r}")

    def after(self, effective: float) -> float:
        """Return the loss after this number of effective steps."""
        return float(
            self.floor + (self.start - self.floor) * (1.0 + effective / self.scale) ** -self.exponent
        )


@dataclass(frozen=True)
class TrainingPlan:
    """A training to simulate.

    Attributes:
        ranks: their number.
        batch_size: samples of a step, over all ranks.
        bytes: of the gradients, which are as large as the parameters.
        steps: optimizer steps.
        policies: what the measurements drive: at most one each of
            :class:`hvdloss.terms.policies.BatchShares` (of the same `batch_size`),
            :class:`hvdloss.terms.policies.SyncPeriod` and
            :class:`hvdloss.terms.policies.AdaptiveCompression`; none is plain synchronous training with equal
            shares.
        compute: model of the computation.
        network: model of all-reduces.
        loss: model of the loss.
        messages: all-reduces for the gradients of a step; None for the default buckets.
        price: of a second of communication, in units of the loss, for a period by the price.
        seed: of all random numbers. What ranks compute in step n does not depend on decisions, so plans with
            the same seed can be compared.

    Raises:
        ConfigError: a number out of its range, or shares of another batch.
    """

    ranks: int
    batch_size: int
    bytes: float
    steps: int = 300
    policies: Sequence[Policy] = ()
    compute: ComputeModel = field(default_factory=ComputeModel)
    network: NetworkModel = field(default_factory=NetworkModel)
    loss: LossModel = field(default_factory=LossModel)
    messages: int | None = None
    price: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("ranks", 1), ("batch_size", 1), ("steps", 1), ("seed", 0)):
            _check_count(self, name, low)
        if self.messages is not None:
            _check_count(self, "messages", 1)
        _check(self, "bytes")
        for policy in self.policies:
            if not isinstance(policy, BatchShares | SyncPeriod | AdaptiveCompression):
                raise ConfigError(
                    f"policies has {policy!r}: simulated are BatchShares, SyncPeriod and AdaptiveCompression"
                )
            if isinstance(policy, BatchShares) and policy.batch_size != self.batch_size:
                raise ConfigError(
                    f"batch_size={self.batch_size} of the plan, but {policy.batch_size} of its BatchShares; "
                    f"give both the same"
                )

    def plain(self) -> TrainingPlan:
        """Return the same training without policies: synchronous, with equal shares."""
        return replace(self, policies=(), price=0.0)

    @property
    def buckets(self) -> int:
        """Number of messages for the gradients of a step."""
        if self.messages is not None:
            return self.messages
        return 1 + math.ceil(max(0.0, self.bytes - FIRST_BUCKET_BYTES) / BUCKET_BYTES)

    def controller(self) -> Controller:
        """Return a controller with this plan's policies, as an objective would have."""
        return Controller((CommunicationCost(self.price, policies=self.policies),))


@dataclass(frozen=True)
class Figures:
    """Statistics of some steps.

    Attributes:
        steps: their number.
        seconds: of all of them.
        step_seconds: the mean.
        samples_per_second: over all ranks.
        efficiency: that, as a share of the rate of the same ranks with the same samples without any
            waiting or communication: the sum of each rank's own samples per second of computation.
        computing: share of all ranks' seconds spent computing.
        waiting: for slower ranks.
        moving: blocked by the exchange itself. The three add up to 1.
    """

    steps: int
    seconds: float
    step_seconds: float
    samples_per_second: float
    efficiency: float
    computing: float
    waiting: float
    moving: float


@dataclass(frozen=True)
class Outcome:
    """The result of a simulated training.

    Attributes:
        plan: that was simulated.
        step_seconds: of each step, float64 ``(steps,)``; local steps share their time equally.
        losses: of each step's batch, float64 ``(steps,)``.
        periods: the synchronisation period of each step; int64 ``(steps,)``.
        effective_steps: value of all steps, by the loss model.
        overall: of all steps.
        second_half: of its second half, when policies have adapted.
        decisions: of the controller, oldest first.
        sizes: each rank's samples in the last step, int64 ``(ranks,)``.
        compressed: whether the last exchange was.
        exchanges: their number.
        bytes: that each rank sent in all of them.
    """

    plan: TrainingPlan
    step_seconds: Array
    losses: Array
    periods: Sizes
    effective_steps: float
    overall: Figures
    second_half: Figures
    decisions: list[Decision]
    sizes: Sizes
    compressed: bool
    exchanges: int
    bytes: float

    @property
    def seconds(self) -> float:
        """The simulated time of the whole training."""
        return self.overall.seconds

    def seconds_to(self, loss: float) -> float | None:
        """Return when the loss model's curve was first at `loss` or below; None if never."""
        reached = np.flatnonzero(self.losses <= loss)
        return float(self.step_seconds[: reached[0]].sum()) if len(reached) else None

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the plan's models, ready for JSON."""
        return {
            "ranks": self.plan.ranks,
            "batch_size": self.plan.batch_size,
            "overall": asdict(self.overall),
            "second_half": asdict(self.second_half),
            "effective_steps": self.effective_steps,
            "exchanges": self.exchanges,
            "bytes": self.bytes,
            "compressed": self.compressed,
            "sizes": self.sizes.tolist(),
            "decisions": [asdict(one) for one in self.decisions],
            "step_seconds": self.step_seconds.tolist(),
            "losses": self.losses.tolist(),
            "periods": self.periods.tolist(),
        }


def simulate_training(
    plan: TrainingPlan,
    *,
    log: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Train on ranks that are not there, as `plan` says.

    The policies are those of real ranks, and see what real ranks would report: a step's
    times in the ledgers of the step after. The first step, and one after compression was switched, is
    done together whatever the period, as the optimizers do it.

    Args:
        plan: what to simulate; its policies are reset.
        log: file to record what the controller sees and decides (:func:`hvdloss.terms.policies.log.record`);
            it must not exist.
        progress: called as ``progress(steps done, steps)`` after every step.

    Raises:
        ConfigError: the plan asks for ranks or links that are not there, has fewer samples than its
            shares must give, or the log cannot be written.

    Collectives: none.
    """
    controller = plan.controller()
    run = _Run(plan, controller)
    if log is not None:
        record(controller, log)
    run.prepare()
    for step in range(1, plan.steps + 1):
        run.step(step)
        if progress is not None:
            progress(step, plan.steps)
    return run.outcome()


@dataclass
class _Sums:
    """What has come about so far; the difference of two is what came about between them."""

    steps: int
    wall: float
    moving: float
    samples: Array  # of each rank
    computing: Array

    def copy(self) -> _Sums:
        return replace(self, samples=self.samples.copy(), computing=self.computing.copy())

    def since(self, before: _Sums) -> Figures:
        steps, wall = self.steps - before.steps, self.wall - before.wall
        samples, computing = self.samples - before.samples, self.computing - before.computing
        busy = computing > 0
        ideal = float((samples[busy] / computing[busy]).sum())
        rate = float(samples.sum()) / wall
        shares = float(computing.mean()) / wall, (self.moving - before.moving) / wall
        return Figures(
            steps=steps,
            seconds=wall,
            step_seconds=wall / steps,
            samples_per_second=rate,
            efficiency=rate / ideal,
            computing=shares[0],
            waiting=max(0.0, 1.0 - shares[0] - shares[1]),
            moving=shares[1],
        )


class _Run:
    """A training under way."""

    def __init__(self, plan: TrainingPlan, controller: Controller) -> None:
        self.plan, self.controller = plan, controller
        controller.reset(0, plan.ranks)
        self.shares = controller.policy(BatchShares)
        self.period = controller.policy(SyncPeriod)
        self.compression = controller.policy(AdaptiveCompression)
        self.even = apportion(plan.batch_size, np.ones(plan.ranks))
        self.factors = plan.compute.factors(plan.ranks, plan.seed)
        # A stream each, so that what one model draws does not depend on another.
        self.of_compute, self.of_network, self.of_loss = (
            np.random.default_rng([plan.seed, number]) for number in (1, 2, 3)
        )
        self.planned = False  # whether the optimizers have built their buckets
        self.compressed = False
        self.times = np.zeros((2, plan.ranks))  # communication and computation of the exchange before
        self.together = 0.0
        self.effective = 0.0
        self.exchanges = 0
        self.bytes = 0.0
        self.step_seconds: list[float] = []
        self.losses: list[float] = []
        self.periods: list[int] = []
        self.sums = _Sums(0, 0.0, 0.0, np.zeros(plan.ranks), np.zeros(plan.ranks))
        self.half = self.begun = self.sums.copy()
        self._start_local_steps()

    def _start_local_steps(self) -> None:
        self.taken = 0
        self.computed = np.zeros(self.plan.ranks)
        self.seen = np.zeros(self.plan.ranks)
        self.lost = np.zeros(self.plan.ranks)

    def prepare(self) -> None:
        """Do what real ranks do before the first step: fit the link, if a policy needs it."""
        cost = self.controller.terms[0]
        assert isinstance(cost, CommunicationCost)
        plan = self.plan
        if cost.calibrates and plan.ranks > 1:
            link = LinkModel(plan.ranks)
            for size, repeats in probe_sizes():
                for _ in range(repeats):
                    seconds = plan.network.draw(size, 1, plan.ranks, self.of_network)
                    if seconds > 0:
                        link.add(seconds, size)
            self.controller.prepared_override = [link.state_dict()]
        self.controller.prepare(OneProcess())

    def step(self, step: int) -> None:
        """Take a step, and exchange if that is due."""
        plan = self.plan
        if self.compression is not None and self.compression.on != self.compressed:
            self.compressed = self.compression.on
            self.planned = False
        period = self.period.period if self.period is not None and self.planned else 1
        sizes = self.even if self.shares is None else self.shares.sizes_at(step)
        self.sizes = sizes
        seconds = plan.compute.seconds(sizes, self.factors, self.of_compute)
        loss = plan.loss.after(self.effective)
        if plan.loss.noise:
            loss *= float(_mean_one(plan.loss.noise, self.of_loss, 1)[0])
        self.losses.append(loss)
        self.effective += 1.0 / (1.0 + self._slowdown(period))
        self.computed += seconds
        self.seen += sizes
        self.lost += loss * sizes
        self.taken += 1
        if self.taken >= period or step == plan.steps:
            self._exchange(step, parameters=period > 1)
            self.planned = True

    def _slowdown(self, period: int) -> float:
        if self.period is None or period == 1:
            return 0.0
        return self.period.slowdown(period, self.plan.loss.drift)

    def _exchange(self, step: int, parameters: bool) -> None:
        """Sum over ranks, notify the controller, and start over."""
        plan, network, ranks = self.plan, self.plan.network, self.plan.ranks
        comm_stats, more = self._comm_stats(parameters)
        whole = network.draw(comm_stats.bytes + more, comm_stats.messages, ranks, self.of_network)
        slowest = float(self.computed.max())
        exposed = whole if parameters else whole - min(network.overlap * whole, BACKWARD * slowest)
        if ranks > 1:
            exposed += plan.bytes * (network.parameter_handling if parameters else network.handling)

        table = np.zeros((ranks, LEDGER_WIDTH + self.controller.width))
        for name, values in (
            ("numerator", self.lost),
            ("denominator", self.seen),
            ("weight", self.seen),
            ("elements", self.seen),
            ("micro_batches", self.taken),
            ("communication", self.times[0]),
            ("computation", self.times[1]),
            ("mean_update_sqnorm", self.together),
        ):
            table[:, COLUMN[name]] = values
        if parameters:
            # Squared lengths in units of the mean move's: ranks drift as the loss model says.
            table[:, COLUMN["drift_sqnorm"]] = self.seen * (1.0 + plan.loss.drift)
            self.together = 1.0
        self.controller.on_step_end(step, table, comm_stats)

        self.times[0] = slowest - self.computed + exposed
        self.times[1] = self.computed
        wall = slowest + exposed
        self.step_seconds += [wall / self.taken] * self.taken
        self.periods += [self.taken] * self.taken
        self.exchanges += 1
        self.bytes += comm_stats.bytes + more
        sums = self.sums
        sums.steps, sums.wall, sums.moving = step, sums.wall + wall, sums.moving + exposed
        sums.samples += self.seen
        sums.computing += self.computed
        if self.half is self.begun and plan.steps // 2 <= step < plan.steps:
            self.half = sums.copy()
        self._start_local_steps()

    def _comm_stats(self, parameters: bool) -> tuple[CommStats, float]:
        """Return the statistics of the exchange, as adapters report it, and the bytes they leave out."""
        ranks, full = self.plan.ranks, self.plan.bytes
        sent = full / 2 if self.compressed else full
        apart = 8.0 * ranks * LEDGER_WIDTH  # the ledgers, in a message of their own
        if parameters:
            return CommStats(2, int(sent), int(full), self.taken, True), apart
        if self.compressed:
            return CommStats(self.plan.buckets + 1, int(sent), int(full)), apart
        # In the tail of a bucket of float32, where an entry of the ledgers takes the place of four.
        riding = full + 2 * apart
        return CommStats(self.plan.buckets, int(riding), int(riding)), 0.0

    def outcome(self) -> Outcome:
        """Return what it came to."""
        return Outcome(
            plan=self.plan,
            step_seconds=np.array(self.step_seconds),
            losses=np.array(self.losses),
            periods=np.array(self.periods),
            effective_steps=self.effective,
            overall=self.sums.since(self.begun),
            second_half=self.sums.since(self.half),
            decisions=self.controller.decisions,
            sizes=self.sizes,
            compressed=self.compressed,
            exchanges=self.exchanges,
            bytes=self.bytes,
        )


# -- numbers ------------------------------------------------------------------------------------------


def _mean_one(sigma: float, rng: np.random.Generator, count: int) -> Array:
    """Draw lognormal factors of mean 1."""
    return np.asarray(np.exp(sigma * rng.standard_normal(count) - sigma * sigma / 2))


def _constant_and_slope(x: Array, y: Array) -> tuple[float, float]:
    """Return (a, b), neither below 0, of y = a + b x with the least relative errors; a = 0 for one point."""
    by = np.where(y > 0, y, 1.0)
    if len(x) > 1:
        columns = np.stack([1 / by, x / by], axis=1)
        (a, b), *_ = np.linalg.lstsq(columns, y / by, rcond=None)
        if a >= 0 and b >= 0:
            return float(a), float(b)
        if b < 0:  # what does not grow with the ranks is all there is
            return float((y / by**2).sum() / (1 / by**2).sum()), 0.0
    return 0.0, float((x * y / by**2).sum() / (x * x / by**2).sum())


def _check(owner: Any, name: str, *, above: bool = False, most: float = math.inf) -> None:
    value = getattr(owner, name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= most or value == math.inf or (above and value == 0):
        least = "above 0" if above else "of at least 0"
        what = f"{least} and at most {most:g}" if most < math.inf else f"{least} and finite"
        raise ConfigError(f"{name}={value!r} of {type(owner).__name__} must be a number {what}")


def _check_count(owner: Any, name: str, low: int) -> None:
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name}={value!r} of {type(owner).__name__} must be an integer of at least {low}")


def _check_by_number(owner: Any, name: str, of: str, what: str) -> None:
    for number, value in getattr(owner, name).items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ConfigError(f"{name} of {type(owner).__name__} has {of} {number!r}; they count from 0")
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(
                f"{name} of {type(owner).__name__} gives {of} {number} the {what} {value!r}, which must be "
                f"above 0 and finite"
            )


def _check_there(owner: Any, name: str, count: int, what: str) -> None:
    missing = [number for number in getattr(owner, name) if number >= count]
    if missing:
        raise ConfigError(
            f"{name} of {type(owner).__name__} names number {missing[0]}, but there are {count} {what}, "
            f"counted from 0"
        )
