"""What ranks wrote of the steps of a script."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Call", "Evidence", "read"]

Vector = Any  # a float64 NumPy vector: the compared entries of all parameters


@dataclass(frozen=True)
class Call:
    """A loss of one micro-batch: it adds ``factor * numerator`` to what its rank differentiates.

    Attributes:
        name, reduction: of the loss.
        factor: what its elements' weighted sum was multiplied with.
        numerator: that sum.
        denominators: what the sum may be meant to be divided by, by name; the likeliest first.
        elements, present: how many there are, and how many of them have a weight other than 0.
        ours: whether it is one of this library's objectives.
    """

    name: str
    reduction: str
    factor: float
    numerator: float
    denominators: dict[str, float]
    elements: int = 0
    present: int = 0
    ours: bool = False


@dataclass(frozen=True)
class Evidence:
    """A step as all ranks saw it; lists are by rank.

    Attributes:
        names, sizes: of the parameters, and how many entries each has in a vector.
        dtype: what gradients were computed in: float64, float32, TF32 or 16 bits.
        observed: the gradient that the optimizer got.
        averaged: what a rank's own backward passes gave, before anybody reduced it.
        penalty: what of it came from no loss of samples.
        sums: the gradient of a rank's weighted sum of losses, by the loss's place in a pass.
        passes: the losses of each backward pass.
        problems: what the ranks could not tell.
        norms: of the parameters before the step.
        rows: a hash of each sample.
        batch_norms: layers that normalise by the rank's own batch.
        random: a hash of what dropout draws its numbers from; empty without dropout.
        sampler: samples, ranks, and how many samples an epoch has with those that it repeats; None without.
        reduced_by: hvdloss, Horovod, DDP, FSDP, or empty.
    """

    names: list[str]
    sizes: list[int]
    dtype: str
    observed: list[Vector]
    averaged: list[Vector]
    penalty: list[Vector]
    sums: dict[int, list[Vector]]
    passes: list[list[list[Call]]]
    problems: list[str] = field(default_factory=list)
    norms: list[list[float]] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    batch_norms: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)
    sampler: dict[str, int] | None = None
    reduced_by: str = ""

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self.observed)


def _merge(lines: Sequence[dict[str, Any]], arrays: Sequence[dict[str, Vector]]) -> Evidence:
    """Return a step out of each rank's line and vectors."""
    first = lines[0]
    problems = list(dict.fromkeys(text for line in lines for text in line["problems"]))
    if any(line["names"] != first["names"] for line in lines):
        problems.append("ranks update different parameters in the same step")
        return Evidence(first["names"], first["sizes"], first["dtype"], [], [], [], {}, [], problems)
    places = sorted({int(name[3:]) for one in arrays for name in one if name.startswith("sum")})
    zeros = np.zeros(sum(first["sizes"]))
    return Evidence(
        names=first["names"],
        sizes=first["sizes"],
        dtype=first["dtype"],
        observed=[one["observed"] for one in arrays],
        averaged=[one["averaged"] for one in arrays],
        penalty=[one["penalty"] for one in arrays],
        sums={place: [one.get(f"sum{place}", zeros) for one in arrays] for place in places},
        passes=[[[Call(**call) for call in one] for one in line["passes"]] for line in lines],
        problems=problems,
        norms=[line["norms"] for line in lines],
        rows=[line["rows"] for line in lines],
        batch_norms=list(dict.fromkeys(name for line in lines for name in line["batch_norms"])),
        random=[line["random"] for line in lines],
        sampler=first["sampler"],
        reduced_by=first["reduced_by"],
    )


def read(folder: Path, ranks: int) -> list[Evidence]:
    """Return the steps that all ranks finished, and in which somebody had a loss.

    Args:
        folder: where the ranks wrote to.
        ranks: how many there are.
    """
    lines = []
    for rank in range(ranks):
        path = folder / f"{rank}.jsonl"
        lines.append([json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [])
    steps = []
    for number, of_ranks in enumerate(zip(*lines, strict=False)):
        if not any(line["passes"] for line in of_ranks):
            continue
        arrays = []
        for rank in range(ranks):
            with np.load(folder / f"{rank}-{number}.npz", allow_pickle=False) as file:
                arrays.append(dict(file))
        steps.append(_merge(of_ranks, arrays))
    return steps
