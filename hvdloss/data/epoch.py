"""Where an epoch stands, so that it can go on: after a crash, and on another number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Generic

from hvdloss.checks import whole
from hvdloss.data.sharding import Rule, Samples
from hvdloss.errors import ConfigError

__all__ = ["Epoch"]


class Epoch(Generic[Samples]):
    """One pass over a data set on some ranks: which samples each has yet to see, and which were seen.

    What every rank has taken is a count per rank; the samples follow from the sharding. The state is
    therefore small, and where the epoch goes on with other ranks, what is left is shared out again.

    Args:
        sharding: the rule; equal on all ranks.
        ranks: how many there are.
        number: of the epoch, from 0.

    >>> from hvdloss.data import Contiguous
    >>> epoch = Epoch(Contiguous(10), ranks=2)
    >>> epoch.take([3, 2])
    >>> [left.tolist() for left in Epoch.of(Contiguous(10), epoch.state(), ranks=3).left]
    [[3, 4], [7, 8], [9]]
    """

    def __init__(self, sharding: Rule[Samples], ranks: int, number: int = 0) -> None:
        self.sharding, self.number = sharding, number
        self.shards: list[Samples] = sharding.shards(ranks, number)
        self._parts: list[list[int]] = []
        self.taken = [0] * ranks

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return len(self.shards)

    @property
    def left(self) -> list[Samples]:
        """The samples each rank has yet to see, in order."""
        return [shard[taken:] for shard, taken in zip(self.shards, self.taken, strict=True)]

    @property
    def untouched(self) -> bool:
        """Whether no sample was seen yet."""
        return not any(map(any, [*self._parts, self.taken]))

    @property
    def over(self) -> bool:
        """Whether every sample was seen."""
        return all(taken == len(shard) for shard, taken in zip(self.shards, self.taken, strict=True))

    def take(self, counts: Sequence[int]) -> None:
        """Note that each rank has used so many more of its samples.

        Raises:
            ConfigError: not one count per rank, or more than a rank has left; nothing is noted then.
        """
        if len(counts) != self.ranks:
            raise ConfigError(f"counts={list(counts)} must be one per rank, of {self.ranks}")
        after = [taken + int(count) for taken, count in zip(self.taken, counts, strict=True)]
        for rank, (count, end) in enumerate(zip(counts, after, strict=True)):
            if count < 0 or end > len(self.shards[rank]):
                raise ConfigError(
                    f"counts={list(counts)}: rank {rank} has {len(self.shards[rank]) - self.taken[rank]} "
                    f"samples left"
                )
        self.taken = after

    def steps(self, batch_size: int) -> int:
        """Return in how many steps all ranks are through, with so many samples each at most per step."""
        batch_size = whole("batch_size", batch_size, 1)
        return max(-(-len(left) // batch_size) for left in self.left)

    def batches(self, rank: int, batch_size: int) -> Iterator[Samples]:
        """Give a rank's batches of what is left, as many as the longest rank has; the last may be empty.

        Does not :meth:`take` them: a batch is used when its step is over.
        """
        mine = self.left[rank]
        for step in range(self.steps(batch_size)):
            yield mine[step * batch_size : (step + 1) * batch_size]

    def took(self, steps: int, batch_size: int) -> None:
        """Note that so many steps of :meth:`batches` are over, on every rank."""
        self.take([min(steps * batch_size, len(left)) for left in self.left])

    # -- going on ---------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return where the epoch stands: small, JSON-able, the same on all ranks."""
        return {
            "version": 1,
            "epoch": self.number,
            "parts": [list(part) for part in self._parts] + [list(self.taken)],
            "sharding": self.sharding.settings(),
        }

    @classmethod
    def of(cls, sharding: Rule[Samples], state: Any, ranks: int) -> Epoch[Samples]:
        """Return the epoch that `state` tells of, to go on with so many ranks.

        With as many ranks as before each goes on with its own shard; otherwise what is left is shared out
        anew. Every sample is seen exactly once either way.

        Raises:
            ConfigError: the state is not one, or of another data set, seed or rule.
        """
        parts, number = _checked(state)
        settings = json.loads(json.dumps(sharding.settings()))
        if state["sharding"] != settings:
            names = [
                k for k in {*settings, *state["sharding"]} if settings.get(k) != state["sharding"].get(k)
            ]
            raise ConfigError(
                f"the state is of other data: {', '.join(sorted(names))} differ(s) ("
                + "; ".join(
                    f"{k}: {state['sharding'].get(k)!r} then, {settings.get(k)!r} now" for k in sorted(names)
                )
                + "); go on with the data set, seed and sharding that the epoch began with"
            )
        epoch = cls(sharding, len(parts[0]), number)
        for place, taken in enumerate(parts):
            if place:
                epoch._again(len(taken))
            epoch.take(taken)
        if ranks != epoch.ranks:
            epoch._again(ranks)
        return epoch

    def _again(self, ranks: int) -> None:
        """Share what is left out over so many ranks, in the epoch's order."""
        rest = self.sharding.rest(self.left, self.number)
        self._parts.append(list(self.taken))
        self.shards = self.sharding.split(rest, ranks, self.number, len(self._parts))
        self.taken = [0] * ranks


def _checked(state: Any) -> tuple[list[list[int]], int]:
    """Return what each rank took in each part of an epoch, and its number.

    Raises:
        ConfigError: this is no state of an epoch.
    """

    def count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    good = (
        isinstance(state, dict)
        and state.get("version") == 1
        and count(state.get("epoch"))
        and isinstance(state.get("sharding"), dict)
        and isinstance(parts := state.get("parts"), list)
        and parts
        and all(isinstance(part, list) and part and all(count(one) for one in part) for part in parts)
    )
    if not good:
        raise ConfigError(f"state={str(state)[:200]} is no state of an epoch, as Epoch.state() gives it")
    return state["parts"], state["epoch"]
