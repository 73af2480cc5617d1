"""Decisions about training that all ranks take in the same step, from numbers of all of them."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from hvdloss.comm.communicator import Communicator, OneProcess
from hvdloss.comm.messages import decode_all
from hvdloss.errors import (
    AgreementError,
    ConfigError,
    HvdlossError,
    NonFiniteLossError,
    NoWeightError,
    WeightError,
)
from hvdloss.train.files import write_atomically

__all__ = ["BestCheckpoint", "EarlyStopping", "Monitor", "merged_value"]

NAN_POLICIES = ("worse", "raise")
_WRITING = "could not write the best state"


def merged_value(
    communicator: Communicator, value: Any, weight: Any = None, *, name: str = "hvdloss.value"
) -> float:
    """Return one number for all ranks, the same to the last bit.

    Args:
        communicator: the ranks.
        value: a mean of this rank, with `weight`; else a number that all ranks have already (from
            ``Metrics.compute``, or ``optimizer.last_step.loss``).
        weight: what the value is a mean of, on this rank: the sum of weights, or how many samples. The result
            is sum w v / sum w over ranks, that of one process. A rank of weight 0 has no say.
        name: of the exchange.

    Returns:
        A float; NaN where a value that counts is.

    Raises:
        AgreementError: values without a weight that differ between ranks, which would decide differently;
            or a weight on some ranks only.
        ConfigError, WeightError: no number, or a weight that is negative, NaN or infinite.
        NoWeightError: weights that are all 0. All on every rank alike.

    Collectives: one gather of two numbers.
    """
    ranks = decode_all(communicator.all_gather_bytes(_encode_value(value, weight), name), "value", _is_value)
    for rank, (_, _, fault) in enumerate(ranks):
        if fault:
            raise ConfigError(f"rank {rank}: {fault}")
    values = [float(v) for v, _, _ in ranks]
    weights = [None if w is None else float(w) for _, w, _ in ranks]
    given = [w is not None for w in weights]
    if any(given) and not all(given):
        without = ", ".join(str(rank) for rank, there in enumerate(given) if not there)
        raise AgreementError(
            f"a weight was given on some ranks, but not on {without}; give one on all or none"
        )
    if not any(given):
        # NaN is not equal to itself, but to all ranks' NaN.
        apart = [
            r for r, v in enumerate(values) if v != values[0] and not (v != v and values[0] != values[0])
        ]
        if apart:
            raise AgreementError(
                f"value differs between ranks: rank {apart[0]} has {values[apart[0]]!r}, rank 0 has "
                f"{values[0]!r}. Give its weight (the number of samples) on every rank, to have the mean of "
                f"all ranks; or the value of all ranks, as Metrics.compute() gives it"
            )
        return values[0]
    total = []
    for rank, w in enumerate(weights):
        assert w is not None
        if not (math.isfinite(w) and w >= 0):
            raise WeightError(f"rank {rank}: weight={w!r} must be finite and at least 0")
        total.append(w)
    if not sum(total) > 0:
        raise NoWeightError(f"value: its weight is 0 on all of {len(ranks)} rank(s), so there is no mean")
    parts = [w * v for w, v in zip(total, values, strict=True) if w > 0]
    # Not fsum of infinities of both signs, which raises.
    above = math.fsum(parts) if all(map(math.isfinite, parts)) else sum(parts)
    return above / math.fsum(total)


def _is_value(message: Any) -> bool:
    """Whether a rank's message is a number, a weight or None, and an error or None."""
    value, weight, fault = message
    if fault:
        return isinstance(fault, str)
    float(value)
    return weight is None or float(weight) is not None


def _encode_value(value: Any, weight: Any) -> bytes:
    """Encode a rank's value and weight, or their error, which all ranks raise."""
    numbers: list[Any] = []
    for name, number in (("value", value), ("weight", weight)):
        if number is None and name == "weight":
            numbers.append(None)
            continue
        try:
            numbers.append(repr(float(number)))
        except (TypeError, ValueError):
            return json.dumps([None, None, f"{name}={number!r} is no number"]).encode()
    return json.dumps([*numbers, None]).encode()


class Monitor:
    """Watches a number that is to fall or to rise; what the classes here share.

    Args:
        mode: ``"min"``: lower is better; ``"max"``: higher.
        min_delta: by how much a number must be better than the best one to count as better, at least 0.
        nan: what a NaN means: ``"worse"``, than any number, so that it is never the best; or ``"raise"``.
        communicator: returns the ranks when called.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    def __init__(
        self,
        *,
        mode: str = "min",
        min_delta: float = 0.0,
        nan: str = "worse",
        communicator: Callable[[], Communicator] = OneProcess,
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError(f"mode={mode!r} is not known; choose 'min' or 'max'")
        if nan not in NAN_POLICIES:
            raise ConfigError(f"nan={nan!r} is not known; choose 'worse' or 'raise'")
        if not (math.isfinite(min_delta) and min_delta >= 0):
            raise ConfigError(f"min_delta={min_delta!r} must be finite and at least 0")
        self.mode, self.min_delta, self.nan = mode, min_delta, nan
        self._communicator = communicator
        #: The best number so far, None before the first.
        self.best: float | None = None
        #: How many numbers came.
        self.steps = 0
        #: Which of them was the best, counted from 0.
        self.best_step: int | None = None

    def _better(self, value: Any, weight: Any) -> float | None:
        """Return the number of all ranks if it is better than the best one.

        Raises:
            NonFiniteLossError: it is NaN, with ``nan="raise"``; on every rank.
        """
        number = merged_value(self._communicator(), value, weight, name=f"hvdloss.{type(self).__name__}")
        if math.isnan(number):
            if self.nan == "raise":
                raise NonFiniteLossError(
                    f"the value of all ranks is NaN, {self.steps} step(s) after the start; train with a "
                    f"lower learning rate, or pass nan='worse' to go on"
                )
            return None
        if self.best is not None:
            gain = self.best - number if self.mode == "min" else number - self.best
            if not gain > self.min_delta:
                return None
        return number

    def _note(self, better: float | None) -> None:
        if better is not None:
            self.best, self.best_step = better, self.steps
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return where it stands, JSON-able, the same on all ranks."""
        return {"best": self.best, "best_step": self.best_step, "steps": self.steps}

    def load_state_dict(self, state: Any) -> None:
        """Go on from there.

        Raises:
            ConfigError: not a state that :meth:`state_dict` gives; nothing is changed then.
        """
        mine = self.state_dict()
        good = (
            isinstance(state, dict)
            and state.keys() == mine.keys()
            and isinstance(state["best"], int | float | None)
            and type(state["steps"]) is int
            and state["steps"] >= 0
            and (state["best_step"] is None or type(state["best_step"]) is int)
        )
        if not good:
            raise ConfigError(
                f"state={str(state)[:200]} must have {', '.join(mine)}, as state_dict() gives it"
            )
        vars(self).update(state)


class EarlyStopping(Monitor):
    """Decides when to stop: after `patience` steps without a better number, on all ranks in the same step.

    ::

        stopping = hvd.EarlyStopping(patience=3)
        for epoch in range(100):
            ...
            if stopping.step(metrics.compute()["loss"]):
                break

    Source: Prechelt, "Early Stopping - But When?" (1998).

    Args:
        patience: number of steps in a row without a better number before it stops, at least 0 (stops
            at the first, as 1 does).
        mode, min_delta, nan: see :class:`Monitor`.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    def __init__(self, patience: int = 0, **options: Any) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 0:
            raise ConfigError(f"patience={patience!r} must be an integer of at least 0")
        super().__init__(**options)
        self.patience = patience

    @property
    def waited(self) -> int:
        """How many steps in a row were without a better number."""
        return self.steps if self.best_step is None else self.steps - self.best_step - 1

    @property
    def stopped(self) -> bool:
        """Whether to stop."""
        return self.steps > 0 and self.waited >= max(self.patience, 1)

    def step(self, value: Any, weight: Any = None) -> bool:
        """Record a number, and return whether to stop, equal on all ranks.

        Args:
            value, weight: see :func:`merged_value`: a number that all ranks have, or this rank's mean and
                what it is a mean of.

        Raises:
            HvdlossError: see :func:`merged_value` and :class:`Monitor`; on every rank alike.

        Collectives: one gather of two numbers.
        """
        self._note(self._better(value, weight))
        return self.stopped


class BestCheckpoint(Monitor):
    """Keeps the best state so far in a file: one rank writes it, whole or not at all.

    Args:
        path: of the file; it need only be there for the rank that writes.
        root: the rank that writes and reads.
        mode, min_delta, nan: see :class:`Monitor`.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    def __init__(self, path: str | os.PathLike[str], *, root: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.path, self.root = Path(path), root

    def write(self, file: IO[Any], state: Any) -> None:
        """Write a state; the frameworks override it."""
        file.write(state)

    def step(self, value: Any, state: Any, weight: Any = None) -> bool:
        """Write the state if the number is better than all before; return whether, the same on all ranks.

        Args:
            value, weight: see :func:`merged_value`.
            state: what to write; or a function that gives it, called on every rank (so it may use
                collectives) if there is something to write.

        Raises:
            HvdlossError: see :func:`merged_value` and :class:`Monitor`; ConfigError where the file could not
                be written, or `state` raised: the former file is kept, and the number is not taken note of.
                All on every rank alike.

        Collectives: one gather of two numbers; where the state is written another one of a few bytes, two if
        it is a function.
        """
        better = self._better(value, weight)
        if better is not None:
            held = [state]
            if callable(state):  # on all ranks, before anything is written
                self._on_all_ranks(lambda: held.insert(0, state()), "could not give the best state")
            if self._communicator().rank == self.root:
                self._on_all_ranks(
                    lambda: write_atomically(self.path, lambda file: self.write(file, held[0])), _WRITING
                )
            else:
                self._on_all_ranks(lambda: None, _WRITING)
        self._note(better)
        return better is not None

    def _on_all_ranks(self, act: Callable[[], Any], what: str) -> None:
        """Run `act` on every rank; raise on all if it fails on one."""
        problem = ""
        try:
            act()
        except Exception as error:  # raised on every rank below
            problem = f"{type(error).__name__}: {error}"
            cause: Exception | None = error
        else:
            cause = None
        texts = self._communicator().all_gather_bytes(problem.encode(), f"hvdloss.{type(self).__name__}.done")
        for rank, text in enumerate(texts):
            if text:
                raise ConfigError(f"path={str(self.path)!r}: rank {rank} {what}: {text.decode()}") from cause

    def parsed(self, parse: Callable[[IO[bytes]], Any]) -> Any:
        """Return what `parse` finds in the file, on every rank.

        Raises:
            ConfigError: it cannot be read, or `parse` cannot make anything of it; on every rank.

        Collectives: those of :meth:`read`.
        """
        data = self.read()
        try:
            return parse(io.BytesIO(data))
        except HvdlossError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"path={str(self.path)!r}: {len(data)} bytes that are no state that this wrote "
                f"({type(error).__name__}: {text}); the file is damaged, or another kind of file"
            ) from error

    def read(self) -> bytes:
        """Return the file's bytes on every rank.

        Raises:
            ConfigError: it cannot be read; on every rank.

        Collectives: two gathers, one of them of the file's bytes.
        """
        held: list[bytes] = [b""]

        def read() -> None:
            if self._communicator().rank == self.root:
                held[0] = self.path.read_bytes()

        self._on_all_ranks(read, "could not read the best state")
        return self._communicator().all_gather_bytes(held[0], f"hvdloss.{type(self).__name__}.read")[
            self.root
        ]
