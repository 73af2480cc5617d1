"""What the gradient that arrives at a loss says of the loop it comes from."""

from __future__ import annotations

import math
from collections.abc import Iterable

from hvdloss.errors import ConfigError, UsageError

__all__ = [
    "SAME",
    "another_error",
    "bypassed_error",
    "changed_gradients_error",
    "changed_gradients_warning",
    "divided_by",
    "division_error",
    "factor_of_passes",
    "late_error",
    "uneven_division_error",
    "unheard_error",
    "weight_gradient_error",
]

_NEAR = 1e-5  # a division in float32 is not exact, nor is the multiplication by a scale before it

SAME = 1e-9  # relative: up to here two factors are one


def factor_of_passes(passes: Iterable[tuple[float, float]], before: float) -> tuple[float, float]:
    """Return the factor of a rank's losses, and whether it changed.

    Args:
        passes: of each backward pass what its elements weigh, and what its loss was multiplied with.
        before: the factor that all ranks had last.

    Returns:
        The factor (0 without any weight), and 0 where it is the one before, 1 where it is another, 2 where
        passes had different ones.

    >>> factor_of_passes([(3.0, 2.0), (0.0, 9.0)], 1.0), factor_of_passes([(3.0, 2.0), (1.0, 1.0)], 1.0)
    ((2.0, 1.0), (2.0, 2.0))
    """
    factors = [factor for weight, factor in passes if weight > 0 and math.isfinite(factor)]
    if not factors:
        return 0.0, 0.0
    if max(factors) - min(factors) > SAME * max(map(abs, factors)):
        return max(factors), 2.0
    return factors[0], float(abs(factors[0] - before) > SAME * abs(before))


def divided_by(gradient: float, passes: int, scales: Iterable[float] = ()) -> bool:
    """Return whether a loss was divided by the number of passes before its backward pass.

    Args:
        gradient: what arrived at the loss: 1 without anything else.
        passes: backward passes of a step.
        scales: what a GradScaler may have multiplied with.

    >>> divided_by(0.25, 4), divided_by(16384.0, 4, [65536.0]), divided_by(65536.0, 4, [65536.0])
    (True, True, False)
    """
    if passes < 2:
        return False
    whole = [1.0, *scales]
    if any(abs(gradient - s) <= _NEAR * s for s in whole):
        return False
    return any(abs(gradient * passes - s) <= _NEAR * s for s in whole)


def another_error(names: str, ours: str, way_out: str = "") -> UsageError:
    """Return the error of a backward pass through objectives that an optimizer or tape does not have.

    `way_out`: what to do where several can be had.
    """
    return UsageError(
        f"a backward pass went through the loss of the objective {names}, which is not the one of this "
        f"optimizer or tape: the ranks' means of it would be averaged by what {ours!r} weighs. {way_out}Let "
        f"one objective have all losses of an element (a function that returns their sum, for each element), "
        f"call this one for each of them where their weights are equal, or train on each in steps of its own"
    )


def unheard_error(names: str) -> UsageError:
    """Return the error of a backward pass through an objective, with an optimizer that has none."""
    return UsageError(
        f"a backward pass went through the loss of the objective {names}, of which this optimizer knows "
        f"nothing: the ranks' means of it would be averaged as if all held the same. Give it to the "
        f"optimizer: DistributedOptimizer(optimizer, objective=...)"
    )


def division_error(divisor: int, passes: int) -> UsageError:
    """Return the error of losses divided by another number than that of the passes declared."""
    return UsageError(
        f"the loss was divided by {divisor}, the number of this step's backward passes, but "
        f"backward_passes_per_step={passes}. An objective divides by what all micro-batches of all ranks "
        f"hold: leave the division out, loss.backward()"
    )


def uneven_division_error(passes: int) -> UsageError:
    """Return the error of several calls of an objective in a pass, multiplied with what may be a division."""
    return UsageError(
        f"losses of several calls of the objective were multiplied with 1/{passes} before one backward pass, "
        f"which is also one over backward_passes_per_step: it cannot be known whether that divides by the "
        f"micro-batches, which an objective does itself, or is the part of each. Leave a division by the "
        f"micro-batches out; give parts of another size, or put them into one function of the elements"
    )


def weight_gradient_error(name: str, detached: str) -> ConfigError:
    """Return the error of weights that carry a gradient.

    Args:
        name: of the objective.
        detached: the framework's expression for the weights without it.
    """
    return ConfigError(
        f"weight= of {name} carries a gradient: weights are data, and what they depend on would "
        f"not learn from them. Pass {detached}, or make them part of the loss: "
        f"Objective(lambda prediction, target: ...), or a function of sums (hvdloss.losses.SumsLoss)"
    )


_REDUCED_FIRST = (
    "Let the optimizer clip (clipnorm=, global_clipnorm=, clipvalue=), which acts on the gradient of all "
    "ranks' elements; or have the tape give that one (hvd.DistributedGradientTape(tape, objective)), change "
    "it, and apply it with a plain optimizer"
)


def changed_gradients_error() -> UsageError:
    """Return the error of gradients that were changed, not linearly, before they were reduced."""
    return UsageError(
        f"what tape.gradient gave was clipped, or changed by its own values, before the optimizer took it: "
        f"on each rank that rank's own gradient. {_REDUCED_FIRST}"
    )


def changed_gradients_warning() -> str:
    """Return what to say of gradients of which it is not known what was done to them."""
    return (
        f"the gradients given to the optimizer are not those that tape.gradient gave, but were made of this "
        f"rank's own: exact if they were multiplied with one number on all ranks, or added up, and wrong if "
        f"they were clipped. {_REDUCED_FIRST}"
    )


def bypassed_error(step: int) -> UsageError:
    """Return the error of a step whose backward passes came to no parameter."""
    return UsageError(
        f"step {step}: a backward pass went through the objective, but came to no parameter of this "
        f"optimizer: torch.autograd.grad returns this rank's own gradients, which are not reduced, and "
        f"frozen or detached outputs have none. Call loss.backward()"
    )


def late_error(step: int, rank: int) -> UsageError:
    """Return the error of gradients that were changed on a rank, before the update, and not on all."""
    return UsageError(
        f"step {step}: gradients were changed on rank {rank} between loss.backward() and optimizer.step(), "
        f"which not all ranks can have done: one with fewer micro-batches than backward_passes_per_step, "
        f"or none, has the gradient of all ranks only from optimizer.synchronize() on, or in step(). This "
        f"rank was not updated. Call optimizer.synchronize() on every rank before you change gradients "
        f"(clip_grad_norm_ and a GradScaler's unscale_ do so)"
    )


def no_optimizer_warning(name: str) -> str:
    """Return the warning about an objective whose gradients no optimizer reduces, with several ranks."""
    return (
        f"the objective {name!r} belongs to no optimizer: the gradient of its loss is that of this rank's "
        f"own mean, and where it is averaged over ranks, each counts the same. Give it to the optimizer: "
        f"hvd.DistributedOptimizer(optimizer, model.named_parameters(), objective)"
    )


def alone_warning(shapes: list[tuple[int, ...]]) -> str:
    """Return what to say of parameters that a loss depends on, and no distributed optimizer has."""
    return (
        f"{len(shapes)} parameter(s) that the loss depends on (the first of shape {shapes[0]}) are in no "
        f"DistributedOptimizer: their gradients stay this rank's own, and ranks train them apart. Wrap their "
        f"optimizer too, hvd.DistributedOptimizer(optimizer, model.named_parameters(), hvd.Objective(...)), "
        f"or give them to this one in a parameter group"
    )
