"""Batches changed at random, with numbers that follow from rank, epoch and step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from hvdloss.errors import ConfigError, UsageError
from hvdloss.train.seeds import generator_for

__all__ = ["TransformedBatches"]


class TransformedBatches:
    """Batches of a loader, each changed by a function that is given random numbers of its own.

    Numbers follow from the seed, the rank, the epoch and the step in it: ranks get different ones, a rerun
    the same, and an epoch resumed in the middle those it would have had.

    Args:
        loader: any iterable of batches. Iterating again is the next epoch; a loader with ``state_dict`` goes
            on with its epoch where the loop was left.
        transform: ``(batch, rng) -> batch``, with a ``numpy.random.Generator``. Called in the process that
            iterates, on batches without rows too.
        seed: of the run, equal on all ranks.
        rank: this process's.

    Raises:
        ConfigError: an argument that cannot be used.

    Collectives: none.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        transform: Callable[[Any, np.random.Generator], Any],
        *,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        if not callable(transform):
            raise ConfigError(f"transform={transform!r} must be a function (batch, rng) -> batch")
        generator_for(seed, rank=rank)
        self.loader, self.transform, self.seed, self.rank = loader, transform, seed, rank
        self.epoch, self.step, self._begun = 0, 0, False

    def __len__(self) -> int:
        """Return the loader's length."""
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """Yield the remaining batches of this epoch, or those of the next one."""
        if self._begun and not hasattr(self.loader, "state_dict"):
            self.epoch, self.step = self.epoch + 1, 0  # an interrupted loop is not continued
        self._begun = True
        for batch in self.loader:
            rng = generator_for(self.seed, rank=self.rank, epoch=self.epoch, step=self.step, stream="batch")
            self.step += 1
            yield self.transform(batch, rng)
        self.epoch, self.step, self._begun = self.epoch + 1, 0, False

    def get_position(self) -> Any:
        """Return the current position for a later :meth:`state_dict`."""
        position = getattr(self.loader, "get_position", None)
        return self.epoch, self.step, position() if position else self._inner()

    def set_position(self, position: Any) -> None:
        """Go back to an earlier position of an interrupted loop, from :meth:`get_position`."""
        self.epoch, self.step, inner = position
        if hasattr(self.loader, "set_position"):
            self.loader.set_position(inner)
        elif inner is not None and hasattr(self.loader, "load_state_dict"):
            self.loader.load_state_dict(inner)

    def _inner(self) -> Any:
        state = getattr(self.loader, "state_dict", None)
        return state() if state else None

    def state_dict(self, position: Any = None) -> dict[str, Any]:
        """Return the position, with the loader's; the batch given last counts as used.

        Args:
            position: an earlier one of this loop, from :meth:`get_position`; None for the current one.

        Collectives: those of the loader's own.
        """
        epoch, step, inner = self.get_position() if position is None else position
        if hasattr(self.loader, "get_position"):
            inner = self.loader.state_dict(inner)  # type: ignore[attr-defined]
        return {"version": 1, "epoch": epoch, "step": step, "loader": inner}

    def load_state_dict(self, state: Any) -> None:
        """Resume from a position. A loader without ``load_state_dict`` must be brought there by other means.

        Raises:
            ConfigError: no position, or one that the loader does not take; nothing is changed then.
            UsageError: the position has a part for a loader with ``load_state_dict``, which this has not.
        """
        good = (
            isinstance(state, dict)
            and state.get("version") == 1
            and "loader" in state
            and all(type(state.get(name)) is int and state[name] >= 0 for name in ("epoch", "step"))
        )
        if not good:
            raise ConfigError(f"state={str(state)[:200]} is no position, as state_dict() gives it")
        if state["loader"] is not None:
            load = getattr(self.loader, "load_state_dict", None)
            if load is None:
                raise UsageError(f"{type(self.loader).__name__} has no load_state_dict()")
            load(state["loader"])
        # Not begun: what is iterated over next is this epoch, from the step on.
        self.epoch, self.step, self._begun = state["epoch"], state["step"], False
