"""Ranks that run out of batches keep contributing nothing until all are through.

Whether a rank has more rides in the ledger of every step, so all ranks know after a step whether there is
another one, without a word more. A rank looks one batch ahead to know it; what goes wrong in doing so is
told the same way, and raised on every rank in its next step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from hvdloss.agreement import raise_together
from hvdloss.communicator import Communicator
from hvdloss.errors import AgreementError, ConfigError, RankError, UsageError
from hvdloss.hearing import hear, hearing

__all__ = ["Signals", "Uneven", "cut", "structure", "without_rows"]

Batch = TypeVar("Batch")
_END = object()


class Signals(Protocol):
    """What an optimizer lets its ranks tell each other in their ledgers."""

    @property
    def patience(self) -> int:
        """After so many batches at the latest ranks have exchanged a ledger."""

    @property
    def heard(self) -> tuple[int, bool]:
        """How many exchanges there were, and whether a rank had more by the last one."""

    def tell(self, more: bool, error: BaseException | None = None) -> None:
        """Say in the next exchange whether this rank has more batches, or why it cannot go on."""


class Uneven(Generic[Batch]):
    """An iterable of batches that ends on all ranks at once: with empty batches on those that run out.

    Args:
        batches: this rank's; any number of them, also none.
        signals: of the optimizer that every batch's loss is for.
        communicator: of its ranks.
        array: tells dtype and shape of an array (a tensor) in a batch; None for what is none.
        zero: returns an array without rows like a given one, which it does not keep in memory; None for
            what is none.
        make: makes an array of a dtype's name and a shape.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        signals: Signals,
        communicator: Callable[[], Communicator],
        *,
        array: Callable[[Any], tuple[str, Sequence[int]] | None],
        zero: Callable[[Any], Any],
        make: Callable[[str, list[int]], Any],
    ) -> None:
        try:
            iter(batches)
        except TypeError:
            raise ConfigError(f"batches={type(batches).__name__} cannot be iterated over") from None
        self.batches, self._signals, self._communicator = batches, signals, communicator
        self._array, self._zero, self._make = array, zero, make
        self._template: Any = _END
        self._position: Any = None
        self._held: tuple[Any, BaseException | None] | None = None  # read ahead in a loop that was left
        self._loop: object = None  # the one under way

    def __iter__(self) -> Iterator[Batch]:
        """Give this rank's batches, then empty ones until every rank is through."""
        signals = self._signals
        this = self._loop = object()
        batches = iter(self.batches)
        ahead, error = self._held or self._fetch(batches)
        self._held, ended = None, False
        if self._template is _END and not self._know(ahead, error):
            return
        idle = 0
        try:
            while True:
                own = ahead is not _END
                given = ahead if own else self._template
                failed = error
                self._note()
                if own:
                    ahead, error = self._fetch(batches)
                # Until a failure is to be told there is one batch more: the empty one that tells it.
                signals.tell(ahead is not _END or error is not None, failed)
                before = signals.heard[0]
                yield given
                after, more = signals.heard
                if after != before:
                    if failed is not None:  # all ranks were told, and went on all the same
                        raise failed
                    idle = 0
                    if not more:
                        ended = True
                        self._note()  # by now this rank knows that its batches are used up
                        return
                    continue
                idle += not own
                if idle > signals.patience:
                    raise UsageError(
                        f"{idle} batches were given after this rank's own were used up, and the optimizer "
                        f"made no step: whether other ranks have more is told in its steps. Call "
                        f"optimizer.step() in the loop over hvd.uneven(...)"
                    )
        finally:
            # One that an error ended may be closed when another is under way, or a position was loaded.
            if self._loop is this:
                self._loop = None
                signals.tell(False)
                if not ended:
                    self._give_back(batches, ahead, error)

    def _give_back(self, batches: Iterator[Batch], ahead: Any, error: BaseException | None) -> None:
        """Leave a loop before its end: the batch read ahead is the next loop's first."""
        if batches is self.batches:
            self._held = (ahead, error)
            return
        if hasattr(batches, "close"):
            batches.close()
        if self._position is None:
            return
        if hasattr(self.batches, "rewind"):
            self.batches.rewind(self._position)
        elif hasattr(self.batches, "load_state_dict"):
            self.batches.load_state_dict(self._position)

    def _fetch(self, batches: Iterator[Batch]) -> tuple[Any, BaseException | None]:
        """Return the next batch, or that there is none; and what went wrong on this rank."""
        try:
            return next(batches), None
        except StopIteration:
            return _END, None
        except AgreementError:
            raise  # on all ranks
        except Exception as error:
            if isinstance(error, RankError) and error.ranks:
                raise  # as well: they have told each other
            return _END, error

    def _know(self, first: Any, error: BaseException | None) -> bool:
        """Learn what a batch without rows looks like; return whether any rank has a batch at all.

        Raises:
            RankError: on every rank, where one could not read its first batch.

        Collectives: two small gathers.
        """
        communicator = self._communicator()
        told = None
        if first is not _END:
            try:
                told = structure(first, self._array)
            except ConfigError as found:
                error = found
        raise_together(communicator, error, "hvdloss.uneven.first", "before the first step")
        texts = communicator.gather(json.dumps(told).encode(), "hvdloss.uneven.batch")
        known = [one for one in hear(texts, "kind of batch") if one is not None]
        if not known:
            return False
        # From the rank's own batch, if it has any: JSON knows neither devices nor kinds of containers.
        if told is None:
            with hearing("kind of batch"):
                self._template = without_rows(known[0], self._make)
        else:
            self._template = cut(first, self._zero)
        return True

    def epochs(self, count: int) -> Iterator[int]:
        """Give the numbers of the epochs that are left of so many; see the loader's ``epochs``."""
        return iter(self.batches.epochs(count))  # type: ignore[attr-defined]

    # -- position ---------------------------------------------------------------------------------

    def _note(self) -> None:
        """Keep the position behind the batch that is about to be given, before the next one is fetched."""
        if hasattr(self.batches, "mark"):  # of ours: cheap, and no collective
            self._position = self.batches.mark()
        elif hasattr(self.batches, "state_dict"):
            self._position = self.batches.state_dict()

    def state_dict(self) -> Any:
        """Return the position of the batches; the one given last counts as used, the one ahead does not.

        Raises:
            UsageError: they have none.
        """
        if not hasattr(self.batches, "state_dict"):
            raise UsageError(f"{type(self.batches).__name__} has no state_dict(), so no position")
        if self._position is None:
            return self.batches.state_dict()
        return self.batches.state_dict(self._position) if hasattr(self.batches, "mark") else self._position

    def start_state(self) -> Any:
        """Return the position at which the loop began; no collective."""
        return self.batches.start_state() if hasattr(self.batches, "start_state") else self.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Go on from a position."""
        load = getattr(self.batches, "load_state_dict", None)
        if load is None:
            raise UsageError(f"{type(self.batches).__name__} has no load_state_dict(), so no position")
        load(state)
        # In an elastic job there are ranks now that do not know what a batch is.
        self._position, self._held, self._template, self._loop = None, None, _END, None


# -- what a batch looks like ----------------------------------------------------------------------


def structure(batch: Any, array: Callable[[Any], tuple[str, Sequence[int]] | None]) -> dict[str, Any]:
    """Return what a batch is made of, as JSON: how its parts are held, and arrays' dtypes and shapes.

    Args:
        batch: arrays, whose first axis is rows, in tuples, lists and dicts; a list of anything else has one
            entry per row.
        array: tells an array's dtype and shape; None for what is no array.

    Raises:
        ConfigError: something of another kind, of which nobody knows what it is without rows.
    """
    found = array(batch)
    if found is not None:
        return {"array": [found[0], list(found[1])]}
    if isinstance(batch, Mapping):
        return {"dict": [[key, structure(value, array)] for key, value in batch.items()]}
    if isinstance(batch, tuple | list):
        parts = [structure(value, array) for value in batch]
        if isinstance(batch, list) and not any("value" not in part for part in parts):
            return {"list": []}  # of rows
        return {"tuple" if isinstance(batch, tuple) else "list": parts}
    if batch is None or isinstance(batch, str | int | float | bool):
        return {"value": batch}
    raise ConfigError(
        f"batches: hold a {type(batch).__name__}, of which nobody knows what it is without rows; give "
        f"tensors or arrays in tuples, lists and dicts"
    )


def cut(batch: Any, zero: Callable[[Any], Any]) -> Any:
    """Return a batch without rows like another one, held in the same kinds of containers.

    Args:
        batch: as for :func:`structure`.
        zero: returns an array without rows like a given one; None for what is no array.
    """
    found = zero(batch)
    if found is not None:
        return found
    if isinstance(batch, Mapping):
        parts = {key: cut(value, zero) for key, value in batch.items()}
        return parts if type(batch) is dict else type(batch)(parts)  # type: ignore[call-arg]
    if isinstance(batch, tuple):
        values = [cut(value, zero) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else tuple(values)
    if isinstance(batch, list):  # of arrays, or with an entry per row
        held = any(zero(value) is not None or isinstance(value, Mapping | tuple | list) for value in batch)
        return [cut(value, zero) for value in batch] if held else []
    return batch


def without_rows(told: Mapping[str, Any], make: Callable[[str, list[int]], Any]) -> Any:
    """Return a batch of this :func:`structure` that has no rows.

    Args:
        told: by :func:`structure`, maybe on another rank.
        make: makes an array of a dtype's name and a shape.
    """
    ((kind, value),) = told.items()
    if kind == "array":
        return make(value[0], [0, *value[1][1:]] if value[1] else [])
    if kind == "dict":
        return {key: without_rows(part, make) for key, part in value}
    if kind in ("tuple", "list"):
        parts = [without_rows(part, make) for part in value]
        return tuple(parts) if kind == "tuple" else parts
    return value
