"""Choices that depend on the machine and not on the mathematics: how gradients are sent.

Each can be given as an argument or in an environment variable; otherwise a rule decides, which
``docs/explanation/performance.md`` gives reasons for. What was chosen, and by what, stands in the
StepReport, and ``hvdloss doctor`` shows what would be chosen.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from typing import Any

from hvdloss.comm.plan import BUCKET_BYTES, FIRST_BUCKET_BYTES, UNBUCKETED_BYTES
from hvdloss.errors import ConfigError

__all__ = ["Choice", "Tuning", "choose", "cycle_time", "launched", "remove_invalid_settings"]

MIB = 2**20
#: By environment variable: what it chooses.
VARIABLES = {
    "HVDLOSS_BUCKET_CAP_MB": "a bucket of gradients is closed when it holds this many MiB",
    "HVDLOSS_FIRST_BUCKET_MB": "the same for the first bucket of a step",
    "HVDLOSS_UNBUCKETED_MB": "a gradient of this many MiB is reduced in place, without a bucket; inf: none",
    "HVDLOSS_TABLE_RANKS": "up to this many ranks all ledgers are exchanged in every step; else their sums",
    "HVDLOSS_OVERLAP": "1: buckets are reduced during the backward pass; 0: after it",
}


#: Up to this number of ranks a table of all ledgers costs no more than their sums
#: (docs/explanation/performance.md).
TABLE_RANKS = 64


@dataclass(frozen=True)
class Choice:
    """A value, and what decided: ``"argument"``, an environment variable's name, or ``"rule"``."""

    value: float
    by: str


@dataclass(frozen=True)
class Tuning:
    """How gradients are sent.

    Attributes:
        bucket_cap_mb: a bucket is closed when it holds this many MiB.
        first_bucket_mb: the same for the first bucket of a step, so that communication starts early.
        unbucketed_mb: a gradient of this many MiB is reduced in place: a copy into a bucket would cost more
            than a message of its own.
        overlap: 1 to reduce buckets during the backward pass, 0 after it.
        table_ranks: up to this number of ranks every rank's ledger is exchanged in every step, so that
            reports of single ranks cost nothing; with more only the ledgers' sums
            (:mod:`hvdloss.losses.ledger`).
    """

    bucket_cap_mb: Choice
    first_bucket_mb: Choice
    unbucketed_mb: Choice
    overlap: Choice
    table_ranks: Choice

    def sums(self, size: int) -> bool:
        """Return whether only the sums of ledgers are exchanged, with `size` ranks."""
        return size > self.table_ranks.value

    @property
    def bucket_bytes(self) -> int:
        """The bucket's size in bytes, at least 1."""
        return max(1, round(self.bucket_cap_mb.value * MIB))

    @property
    def first_bytes(self) -> int:
        """The first bucket's size in bytes, at least 1."""
        return max(1, round(self.first_bucket_mb.value * MIB))

    @property
    def unbucketed_bytes(self) -> int | None:
        """The size in bytes from which a gradient is not bucketed; None for never."""
        return None if math.isinf(self.unbucketed_mb.value) else max(1, round(self.unbucketed_mb.value * MIB))

    def shared(self) -> dict[str, float]:
        """Return what must be equal on all ranks, for the consistency check of the first step."""
        names = ("bucket_cap_mb", "first_bucket_mb", "unbucketed_mb", "table_ranks")
        return {name: getattr(self, name).value for name in names}

    def as_dict(self) -> dict[str, Any]:
        """Return value and decider of each choice, as plain values; None stands for infinity."""
        return {
            name: {"value": None if math.isinf(choice.value) else choice.value, "by": choice.by}
            for name, choice in vars(self).items()
        }


def choose(
    *,
    bucket_cap_mb: float | None = None,
    overlap: bool | None = None,
    environ: Mapping[str, str] | None = None,
) -> Tuning:
    """Return the choices for this process.

    Args:
        bucket_cap_mb: MiB above 0, or None to leave it to the environment or the rule.
        overlap: likewise.
        environ: the environment; the process's own if None.

    Raises:
        ConfigError: a value that cannot be used, naming the argument or the variable.
    """
    environ = os.environ if environ is None else environ
    bucket = _choice(bucket_cap_mb, "bucket_cap_mb", "HVDLOSS_BUCKET_CAP_MB", BUCKET_BYTES / MIB, environ)
    first = _choice(None, "", "HVDLOSS_FIRST_BUCKET_MB", min(FIRST_BUCKET_BYTES / MIB, bucket.value), environ)
    alone = _choice(None, "", "HVDLOSS_UNBUCKETED_MB", UNBUCKETED_BYTES / MIB, environ, most=math.inf)
    asked = None if overlap is None else float(overlap)
    overlapping = _choice(asked, "overlap", "HVDLOSS_OVERLAP", 1.0, environ, switch=True)
    table = _choice(None, "", "HVDLOSS_TABLE_RANKS", TABLE_RANKS, environ, what="ranks above 0")
    return Tuning(bucket, first, alone, overlapping, table)


def launched(hvd: Any, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return what the launch decided about communication, in the form of :meth:`Tuning.as_dict`.

    Args:
        hvd: a Horovod module, initialised.
        environ: the environment; the process's own if None.
    """
    mpi, gloo = bool(hvd.mpi_enabled()), bool(hvd.gloo_enabled())
    controller = "mpi" if mpi else "gloo" if gloo else "none"
    return {"controller": {"value": controller, "by": "launch"}, "cycle_time_ms": asdict(cycle_time(environ))}


def cycle_time(environ: Mapping[str, str] | None = None) -> Choice:
    """Return how often Horovod looks for work, in milliseconds, and what decided it."""
    text = (os.environ if environ is None else environ).get("HOROVOD_CYCLE_TIME")
    if not text:
        return Choice(1.0, "rule")
    try:
        return Choice(float(text), "HOROVOD_CYCLE_TIME")
    except ValueError:  # to Horovod what is no number is 0
        return Choice(0.0, "HOROVOD_CYCLE_TIME")


def remove_invalid_settings(environ: MutableMapping[str, str] | None = None) -> None:
    """Remove settings from the environment that were not made by the user; before Horovod is initialised.

    ``horovod.run()`` of Horovod 0.28.1 gives its ranks a cycle time and a cache capacity of ``(None,)``,
    which Horovod reads as 0: its thread then never rests, and every step is negotiated in full.
    """
    environ = os.environ if environ is None else environ
    for name in ("HOROVOD_CYCLE_TIME", "HOROVOD_CACHE_CAPACITY"):
        if environ.get(name) == "(None,)":
            del environ[name]


def _choice(
    argument: float | None,
    name: str,
    variable: str,
    rule: float,
    environ: Mapping[str, str],
    *,
    switch: bool = False,
    most: float = 1e6,
    what: str = "MiB above 0",
) -> Choice:
    if argument is not None:
        return Choice(_checked(argument, f"{name}={argument!r}", switch, most, what), "argument")
    text = environ.get(variable, "").strip()
    if text:
        return Choice(_checked(text, f"{variable}={text!r}", switch, most, what), variable)
    return Choice(rule, "rule")


def _checked(value: Any, shown: str, switch: bool, most: float, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if switch and number not in (0.0, 1.0):
        raise ConfigError(f"{shown} must be 0 or 1")
    if not switch and not 0 < number <= most:
        raise ConfigError(f"{shown} must be a number of {what}")
    return number
