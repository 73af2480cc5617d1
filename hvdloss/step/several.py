"""Several losses in one backward pass: L = sum_j c_j f_j, each with a denominator of its own over all ranks.

With one loss the denominator may become known after the backward pass, since it is the same for every
gradient. Gradients of several losses are already mixed in a parameter's, so each is given its part of the
step on its way: in micro-batch m of rank k the gradient of loss j's local mean, N_jkm / W_jkm, is multiplied
with

    W_jkm / W_j * P,     W_j = sum over ranks and micro-batches of W_jkm,  P = number of their backward passes

and each pass then weighs 1 / P. The sum is c_j dN_j / W_j for each loss, and what was added to the losses (a
penalty) counts once. The sums W_j and P are one message, which is sent before the first gradient is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss.errors import ConfigError, HvdlossError, NoWeightError, UsageError
from hvdloss.losses.passes import divided_by, uneven_division_error
from hvdloss.losses.reduction import ArrayOps
from hvdloss.step.objective import Listener, ObjectiveBase
from hvdloss.step.report import LossReport
from hvdloss.terms.controller import Controller

__all__ = ["COLUMNS", "Objectives", "gradient_factor", "loss_reports"]

#: What ranks sum up of each loss of a step. `calls` are those that a backward pass went through (or left out,
#: with the factor 0), `factor` and `factor_squared` what they were multiplied with.
COLUMNS = ("numerator", "weight", "elements", "calls", "factor", "factor_squared", "nonfinite")

_EQUAL = 1e-11  # of variances: factors equal to some 1e-6, as float32 has them
_ALIKE = 1e-8  # of variances too
_COUNTED = 1e-6  # a user's sum of weights may be one of float32


class Objectives(Mapping[str, Any]):
    """The objectives of an optimizer by name, each for one of the losses that are added up.

    To an optimizer it is one objective, whose denominator is the number of backward passes.

    Args:
        objectives: by name; or a sequence, whose names are those of their losses ("mse", "mse.1", ...).

    Raises:
        ConfigError: none, one of them twice, what is no objective, or what cannot be combined.
    """

    reduction = "mean"  # over backward passes
    whole = None

    def __init__(self, objectives: Mapping[str, Any] | Sequence[Any]) -> None:
        if not isinstance(objectives, Mapping):
            found: dict[str, Any] = {}
            for one in objectives:
                name = str(getattr(one, "name", one))
                found[name if name not in found else f"{name}.{len(found)}"] = one
            objectives = found
        self._named = dict(objectives)
        for name, one in self._named.items():
            if not isinstance(name, str) or not isinstance(one, ObjectiveBase):
                raise ConfigError(f"objective={{{name!r}: {one!r}}}: give names (texts) and Objectives")
        each = list(self._named.values())
        if not each or len({id(one) for one in each}) < len(each):
            raise ConfigError(
                f"objective={self._named!r}: give an Objective of its own for each loss; "
                f'hvd.Objective("mse") may be made twice'
            )
        policies = sorted({one.nonfinite for one in each})
        if len(policies) > 1:
            raise ConfigError(f"nonfinite={' and '.join(map(repr, policies))}: give all objectives the same")
        if policies == ["drop"]:
            raise ConfigError(
                'nonfinite="drop" with several objectives: the denominators have a rank\'s part before it '
                'can be known that its gradients are NaN; choose "skip" or "raise"'
            )
        with_terms = [name for name, one in self._named.items() if one.terms]
        if with_terms:
            raise ConfigError(
                f"terms= of the objective {with_terms[0]!r}: an optimizer with several objectives has no "
                f"terms; leave them out, or train with one objective"
            )
        if len({id(one.process_set) for one in each if one.process_set is not None}) > 1:
            raise ConfigError("process_set: give all objectives of an optimizer the same, or none")
        self.nonfinite = policies[0]
        self.name = " + ".join(self._named)
        self.controller = Controller()
        self.terms = ()

    def __getitem__(self, name: str) -> Any:
        return self._named[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    @property
    def process_set(self) -> Any:
        """The ranks that share a step; None for the optimizer's."""
        return next((one.process_set for one in self._named.values() if one.process_set is not None), None)

    @process_set.setter
    def process_set(self, value: Any) -> None:
        for one in self._named.values():
            one.process_set = value

    @property
    def passes(self) -> int:
        """Backward passes per step, as the optimizer declares."""
        return int(max(one.passes for one in self._named.values()))

    @passes.setter
    def passes(self, value: int) -> None:
        for one in self._named.values():
            one.passes = value

    def attach(self, listener: Listener[Any], passes: int = 1) -> None:
        """Notify `listener` of each backward pass through one of them."""
        for one in self._named.values():
            one.attach(listener, passes)

    def detach(self, listener: Listener[Any]) -> None:
        """Tell `listener` no more."""
        for one in self._named.values():
            one.detach(listener)

    def listeners(self) -> list[Listener[Any]]:
        """Return the optimizers that are notified of a backward pass through any of them."""
        every = [listener for one in self._named.values() for listener in one.listeners()]
        return list({id(listener): listener for listener in every}.values())

    def settings(self) -> dict[str, Any]:
        """Return what must be equal on all ranks."""
        inside = {
            f"{name}.{key}": v for name, one in self._named.items() for key, v in one.settings().items()
        }
        return {"objectives": list(self._named), "nonfinite": self.nonfinite, **inside}

    def __repr__(self) -> str:
        return f"Objectives({self._named!r})"


def gradient_factor(ops: ArrayOps, own: Any, total: Any, passes: Any) -> Any:
    """Return the factor of the gradient of a call's local mean; 0 without weight on any rank.

    Args:
        ops: the framework's operations.
        own, total: the denominator of the call, and of all calls of the step; float64 scalars.
        passes: backward passes of all ranks.
    """
    there = total != 0
    safe = ops.where(there, total, ops.ones_like(total))
    return ops.where(there, own * passes / safe, ops.zeros_like(total))


def loss_reports(
    objectives: Objectives,
    totals: npt.NDArray[np.float64],
    table: npt.NDArray[np.float64],
    step: int,
    size: int,
) -> dict[str, LossReport]:
    """Return what each loss came to in a step, by name; equal on all ranks, as the sums are.

    Args:
        objectives: whose losses they are.
        totals: their denominators, summed over ranks, float64 ``(len(objectives),)``.
        table: the sums over ranks of :data:`COLUMNS`, float64 ``(len(objectives), 7)``.
        step: its number, for messages.
        size: number of ranks.

    Raises:
        UsageError: a loss was not multiplied with the same number everywhere; or one of all ranks' elements
            was not called in every pass that the optimizer declares.
        NoWeightError: no element of any loss has a weight.
    """
    reports = {}
    for (name, one), total, sums in zip(objectives.items(), totals.tolist(), table.tolist(), strict=True):
        numerator, weight, elements, calls, factor, squared, nonfinite = sums
        if calls * squared - factor * factor > _EQUAL * calls * squared:
            mean = factor / calls
            spread = max(squared / calls - mean * mean, 0.0) ** 0.5
            raise UsageError(
                f"step {step}: the loss {name!r} was multiplied with different numbers on ranks, or in "
                f"micro-batches: {mean:.6g} on average, with a standard deviation of {spread:.2g}. A loss of "
                f"all ranks has one factor. Nothing was updated. Leave out what a rank divides by itself, "
                f"and where the factor comes from the values of losses, take those of all ranks: "
                f"hvd.global_losses(...)"
            )
        every = size * one.passes
        if one.global_loss is not None and calls not in (0, every):
            raise UsageError(
                f"step {step}: the loss {name!r} of all ranks' elements was called {calls:.0f} times, and "
                f"not {every}, on {size} rank(s) with backward_passes_per_step={one.passes}. Nothing was "
                f"updated. Call it on every rank in every pass, with no elements where there are none"
            )
        denominator = 1.0 if one.reduction == "sum" else total
        known = bool(weight) and not nonfinite
        reports[name] = LossReport(
            value=numerator / denominator if known else float("nan"),
            weight=weight,
            elements=round(elements),
            factor=factor / calls if calls else 0.0,
        )
    if not any(report.weight for report in reports.values()):
        raise NoWeightError(
            f"step {step}: no element with a weight above zero in any of the losses {', '.join(objectives)} "
            f"on any rank, so there is no mean to take. Nothing was updated. Skip the step on all ranks, or "
            f"check the weights."
        )
    return reports


def check_outside(names: Sequence[str], sums: npt.NDArray[np.float64]) -> None:
    """Check that what comes to parameters beside the losses is the same everywhere, as a penalty's gradient.

    A trained weight of a loss, as in ``exp(-s) * loss``, is not: its gradient is made of a rank's own value.

    Args:
        names: of the parameters.
        sums: over ranks and passes, float64 ``(len(names), 3)``: in how many such a gradient came, the sum of
            a number that tells of it, and of the square of that.

    Raises:
        UsageError: they differ.
    """
    count, one, square = sums.T
    apart = count * square - one * one > _ALIKE * count * square
    if apart.any():
        which = [name for name, wrong in zip(names, apart, strict=True) if wrong]
        names_of = ", ".join(which[:4]) + (" and others" if len(which) > 4 else "")
        raise UsageError(
            f"the gradient of {names_of} did not come through an objective, and differs between ranks or "
            f"micro-batches. Nothing was updated. If it weighs losses and is trained, take their values over "
            f"all ranks: hvd.global_losses(...); if it belongs to a loss of its own, give that an Objective"
        )


def twice_error(name: str) -> UsageError:
    """Return the error of an objective that was called more than once for a backward pass."""
    return UsageError(
        f"the objective {name!r} was called more than once for one backward pass: it cannot be known whether "
        f"these are one mean or several. Give each loss an Objective of its own, or one call all elements"
    )


def value_error(name: str) -> UsageError:
    """Return the error of a gradient made of a rank's own value of a loss."""
    return UsageError(
        f"a gradient depends on the value of the loss {name!r}, which is this rank's own mean: that of a "
        f"trained factor, or of a product, root or power of losses. Take their values over all ranks: "
        f"hvd.global_losses(...)"
    )


def changed_factor_warning(name: str) -> str:
    """Return what to say of a factor that changes between steps, and may be trained."""
    return (
        f"what the loss {name!r} is multiplied with changes between steps. A schedule is exact; a trained "
        f"factor (exp(-s) * loss + s, say) gets its gradient from each rank's own mean, unless the values "
        f"are those of all ranks: hvd.global_losses(...)"
    )


def left_out_error(name: str) -> UsageError:
    """Return the error of a call that is not in the denominators, which were on their way already."""
    return UsageError(
        f"the loss {name!r} had a backward pass of its own, after the denominators of this step were summed "
        f"over ranks. Add up the losses and call backward() once, or say ahead what all passes of the step "
        f"weigh: optimizer.expect(...)"
    )


def unexpected_error(passes: int) -> UsageError:
    """Return the error of accumulation whose denominators are not known before it begins."""
    return UsageError(
        f"backward_passes_per_step={passes} with several objectives: each loss's weight in all micro-batches "
        f"of all ranks must be known before the first backward pass of a step. Call "
        f"optimizer.expect({{...}}, passes=...) before it, on every rank (docs/howto/several-losses.md says "
        f"how, and what to do where the weights come from the model)"
    )


def check_expected(
    objectives: Objectives,
    weights: Mapping[str, float],
    found: Sequence[float],
    passes: tuple[int, int],
    factors: Sequence[float],
) -> HvdlossError | None:
    """Return the error of a rank whose step is not what it said ahead; None if it is.

    Args:
        objectives: the optimizer's.
        weights: by name, what was said.
        found: what the step's calls weighed, in the objectives' order.
        passes: declared and actual number.
        factors: what the calls were multiplied with.
    """
    for divisor in sorted({passes[1], objectives.passes}):
        if factors and all(divided_by(factor, divisor) for factor in factors):
            return uneven_division_error(divisor)
    if passes[0] != passes[1]:
        return UsageError(
            f"optimizer.expect(..., passes={passes[0]}), but this step had {passes[1]} backward passes; say "
            f"as many as this rank makes"
        )
    for (name, one), weighed in zip(objectives.items(), found, strict=True):
        said = float(weights.get(name, 0.0))
        if one.reduction != "sum" and abs(said - weighed) > _COUNTED * max(abs(said), abs(weighed)):
            what = {
                "mean": "the sum of the weights of its elements",
                "batch_mean": "the number of its elements with a weight",
                "sequence_mean": "the number of its sequences with a weight (linked ones tell: sequences())",
            }[one.reduction]
            return UsageError(
                f"optimizer.expect({{{name!r}: {said:.9g}}}), but the calls of {name!r} weighed "
                f"{weighed:.9g} in this step; say {what}, of all micro-batches of this rank"
            )
    return None


def check_weights(objectives: Objectives, weights: Mapping[str, Any], passes: int) -> list[float]:
    """Return what was said ahead of each objective as a number, in their order.

    Raises:
        ConfigError: an unknown name, a number that is no weight, no number of passes.
    """
    unknown = [name for name in weights if name not in objectives]
    if unknown:
        raise ConfigError(f"expect({unknown[0]!r}): the objectives are {', '.join(map(repr, objectives))}")
    if isinstance(passes, bool) or not isinstance(passes, int) or not 0 <= passes <= objectives.passes:
        raise ConfigError(f"passes={passes!r} must be from 0 to backward_passes_per_step={objectives.passes}")
    numbers = [float(weights.get(name, 0.0)) for name in objectives]
    for name, number in zip(objectives, numbers, strict=True):
        if not 0 <= number < float("inf"):
            raise ConfigError(f"expect({{{name!r}: {number!r}}}): a weight is finite and at least 0")
    return numbers
