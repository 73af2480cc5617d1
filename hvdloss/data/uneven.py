"""Ranks that run out of batches take part with empty ones until all ranks are done.

Whether a rank has more batches is in the ledger of every step, so all ranks know after a step whether there
is another one, without another message. A rank fetches one batch ahead to know it; an error in doing so is
sent the same way, and raised on every rank in its next step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from hvdloss.comm.agreement import raise_on_all_ranks
from hvdloss.comm.communicator import Communicator
from hvdloss.comm.messages import decode_all, decode_errors
from hvdloss.errors import AgreementError, ConfigError, RankError, UsageError

__all__ = ["Signals", "Uneven", "describe_batch", "empty_batch", "empty_like"]

Batch = TypeVar("Batch")
_END = object()


class Signals(Protocol):
    """How data loops exchange their status in the ledgers of an optimizer's steps."""

    @property
    def patience(self) -> int:
        """Number of batches within which ranks exchange a ledger."""

    @property
    def sync_status(self) -> tuple[int, bool]:
        """Number of exchanges so far, and whether any rank had more batches in the last one."""

    def send_status(self, more: bool, error: BaseException | None = None) -> None:
        """Send with the next exchange whether this rank has more batches, or the error that stops it."""


class Uneven(Generic[Batch]):
    """An iterable of batches that ends on all ranks at once: with empty batches on those that run out.

    Args:
        batches: this rank's; any number of them, also none.
        signals: of the optimizer that every batch's loss is for.
        communicator: of its ranks.
        array: returns dtype and shape of an array (a tensor) in a batch; None for anything else.
        zero: returns an array without rows like a given one, which it does not keep in memory; None for
            anything else.
        make: returns an array of a dtype's name and a shape.
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
        """Yield this rank's batches, then empty ones until every rank is done."""
        signals = self._signals
        this = self._loop = object()
        batches = iter(self.batches)
        ahead, error = self._held or self._fetch(batches)
        self._held, ended = None, False
        if self._template is _END and not self._learn_template(ahead, error):
            return
        idle = 0
        try:
            while True:
                own = ahead is not _END
                given = ahead if own else self._template
                failed = error
                self._save_position()
                if own:
                    ahead, error = self._fetch(batches)
                # After a failure there is one more batch: the empty one whose step sends it.
                signals.send_status(ahead is not _END or error is not None, failed)
                before = signals.sync_status[0]
                yield given
                after, more = signals.sync_status
                if after != before:
                    if failed is not None:  # all ranks know of it, and went on all the same
                        raise failed
                    idle = 0
                    if not more:
                        ended = True
                        self._save_position()  # by now this rank knows that its batches are used up
                        return
                    continue
                idle += not own
                if idle > signals.patience:
                    raise UsageError(
                        f"{idle} batches were given after this rank's own were used up, and the optimizer "
                        f"made no step: whether other ranks have more is exchanged in its steps. Call "
                        f"optimizer.step() in the loop over hvd.uneven(...)"
                    )
        finally:
            # One that an error ended may be closed when another is under way, or a position was loaded.
            if self._loop is this:
                self._loop = None
                signals.send_status(False)
                if not ended:
                    self._give_back(batches, ahead, error)

    def _give_back(self, batches: Iterator[Batch], ahead: Any, error: BaseException | None) -> None:
        """Return the batch read ahead when a loop ends early: it is the first of the next loop."""
        if batches is self.batches:
            self._held = (ahead, error)
            return
        if hasattr(batches, "close"):
            batches.close()
        if self._position is None:
            return
        if hasattr(self.batches, "set_position"):
            self.batches.set_position(self._position)
        elif hasattr(self.batches, "load_state_dict"):
            self.batches.load_state_dict(self._position)

    def _fetch(self, batches: Iterator[Batch]) -> tuple[Any, BaseException | None]:
        """Return the next batch, or `_END`; and the error of this rank, if any."""
        try:
            return next(batches), None
        except StopIteration:
            return _END, None
        except AgreementError:
            raise  # on all ranks
        except Exception as error:
            if isinstance(error, RankError) and error.ranks:
                raise  # on all ranks as well
            return _END, error

    def _learn_template(self, first: Any, error: BaseException | None) -> bool:
        """Make an empty batch to use as a template; return whether any rank has a batch at all.

        Raises:
            RankError: on every rank, where one could not read its first batch.

        Collectives: two small gathers.
        """
        communicator = self._communicator()
        description = None
        if first is not _END:
            try:
                description = describe_batch(first, self._array)
            except ConfigError as found:
                error = found
        raise_on_all_ranks(communicator, error, "hvdloss.uneven.first", "before the first step")
        texts = communicator.all_gather_bytes(json.dumps(description).encode(), "hvdloss.uneven.batch")
        known = [one for one in decode_all(texts, "kind of batch") if one is not None]
        if not known:
            return False
        # From the rank's own batch, if it has any: JSON knows neither devices nor kinds of containers.
        if description is None:
            with decode_errors("kind of batch"):
                self._template = empty_batch(known[0], self._make)
        else:
            self._template = empty_like(first, self._zero)
        return True

    def epochs(self, count: int) -> Iterator[int]:
        """Yield the numbers of the remaining epochs out of `count`; see the loader's ``epochs``."""
        return iter(self.batches.epochs(count))  # type: ignore[attr-defined]

    # -- position ---------------------------------------------------------------------------------

    def _save_position(self) -> None:
        """Save the position after the batch that is about to be yielded, before the next one is fetched."""
        if hasattr(self.batches, "get_position"):  # of ours: cheap, and no collective
            self._position = self.batches.get_position()
        elif hasattr(self.batches, "state_dict"):
            self._position = self.batches.state_dict()

    def state_dict(self) -> Any:
        """Return the position of the batches; the last one yielded is consumed, the one read ahead is not.

        Raises:
            UsageError: they have no position.
        """
        if not hasattr(self.batches, "state_dict"):
            raise UsageError(f"{type(self.batches).__name__} has no state_dict(), so no position")
        if self._position is None:
            return self.batches.state_dict()
        return (
            self.batches.state_dict(self._position)
            if hasattr(self.batches, "get_position")
            else self._position
        )

    def start_state(self) -> Any:
        """Return the position at which the loop began; no collectives."""
        return self.batches.start_state() if hasattr(self.batches, "start_state") else self.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Restore a position."""
        load = getattr(self.batches, "load_state_dict", None)
        if load is None:
            raise UsageError(f"{type(self.batches).__name__} has no load_state_dict(), so no position")
        load(state)
        # In an elastic job there may be ranks now without a template.
        self._position, self._held, self._template, self._loop = None, None, _END, None


# -- what a batch looks like ----------------------------------------------------------------------


def describe_batch(batch: Any, array: Callable[[Any], tuple[str, Sequence[int]] | None]) -> dict[str, Any]:
    """Return the structure of a batch as JSON: its containers, and dtypes and shapes of its arrays.

    Args:
        batch: arrays, whose first axis is rows, in tuples, lists and dicts; a list of anything else has one
            entry per row.
        array: returns an array's dtype and shape; None for anything else.

    Raises:
        ConfigError: something of another kind, which cannot be made without rows.
    """
    found = array(batch)
    if found is not None:
        return {"array": [found[0], list(found[1])]}
    if isinstance(batch, Mapping):
        return {"dict": [[key, describe_batch(value, array)] for key, value in batch.items()]}
    if isinstance(batch, tuple | list):
        parts = [describe_batch(value, array) for value in batch]
        if isinstance(batch, list) and not any("value" not in part for part in parts):
            return {"list": []}  # of rows
        return {"tuple" if isinstance(batch, tuple) else "list": parts}
    if batch is None or isinstance(batch, str | int | float | bool):
        return {"value": batch}
    raise ConfigError(
        f"batches: hold a {type(batch).__name__}, which cannot be made without rows; use tensors or arrays "
        f"in tuples, lists and dicts"
    )


def empty_like(batch: Any, zero: Callable[[Any], Any]) -> Any:
    """Return a batch without rows like another one, in the same kinds of containers.

    Args:
        batch: as for :func:`describe_batch`.
        zero: returns an array without rows like a given one; None for anything else.
    """
    found = zero(batch)
    if found is not None:
        return found
    if isinstance(batch, Mapping):
        parts = {key: empty_like(value, zero) for key, value in batch.items()}
        return parts if type(batch) is dict else type(batch)(parts)  # type: ignore[call-arg]
    if isinstance(batch, tuple):
        values = [empty_like(value, zero) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else tuple(values)
    if isinstance(batch, list):  # of arrays, or with an entry per row
        held = any(zero(value) is not None or isinstance(value, Mapping | tuple | list) for value in batch)
        return [empty_like(value, zero) for value in batch] if held else []
    return batch


def empty_batch(description: Mapping[str, Any], make: Callable[[str, list[int]], Any]) -> Any:
    """Return a batch without rows from its description.

    Args:
        description: from :func:`describe_batch`, maybe of another rank.
        make: returns an array of a dtype's name and a shape.
    """
    ((kind, value),) = description.items()
    if kind == "array":
        return make(value[0], [0, *value[1][1:]] if value[1] else [])
    if kind == "dict":
        return {key: empty_batch(part, make) for key, part in value}
    if kind in ("tuple", "list"):
        parts = [empty_batch(part, make) for part in value]
        return tuple(parts) if kind == "tuple" else parts
    return value
