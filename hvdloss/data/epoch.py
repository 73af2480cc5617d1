"""The position in an epoch, to resume it: after a crash, and on another number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Generic

from hvdloss._util.checks import check_int
from hvdloss.data.sharding import Rule, Samples
from hvdloss.errors import ConfigError

__all__ = ["Epoch"]


class Epoch(Generic[Samples]):
    """One pass over a data set on some ranks: the samples remaining on each rank, and those consumed.

    What each rank has consumed is a count; the samples follow from the sharding. The state is therefore
    small, and where the epoch is resumed on another number of ranks, the remaining samples are sharded again.

    Args:
        sharding: the rule; equal on all ranks.
        ranks: their number.
        number: of the epoch, from 0.

    >>> from hvdloss.data import Contiguous
    >>> epoch = Epoch(Contiguous(10), ranks=2)
    >>> epoch.advance([3, 2])
    >>> epoch = Epoch.from_state_dict(Contiguous(10), epoch.state_dict(), ranks=3)
    >>> [indices.tolist() for indices in epoch.remaining]
    [[3, 4], [7, 8], [9]]
    """

    def __init__(self, sharding: Rule[Samples], ranks: int, number: int = 0) -> None:
        self.sharding, self.number = sharding, number
        self.shards: list[Samples] = sharding.shards(ranks, number)
        self._parts: list[list[int]] = []
        self.consumed = [0] * ranks

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.shards)

    @property
    def remaining(self) -> list[Samples]:
        """The samples remaining on each rank, in order."""
        return [shard[taken:] for shard, taken in zip(self.shards, self.consumed, strict=True)]

    @property
    def is_fresh(self) -> bool:
        """Whether no sample was consumed yet."""
        return not any(map(any, [*self._parts, self.consumed]))

    @property
    def exhausted(self) -> bool:
        """Whether all samples were consumed."""
        return all(taken == len(shard) for shard, taken in zip(self.shards, self.consumed, strict=True))

    def advance(self, counts: Sequence[int]) -> None:
        """Mark this number of samples as consumed on each rank.

        Raises:
            ConfigError: not one count per rank, or more than remain on a rank; nothing is changed then.
        """
        if len(counts) != self.ranks:
            raise ConfigError(f"counts={list(counts)} must be one per rank, of {self.ranks}")
        after = [taken + int(count) for taken, count in zip(self.consumed, counts, strict=True)]
        for rank, (count, end) in enumerate(zip(counts, after, strict=True)):
            if count < 0 or end > len(self.shards[rank]):
                raise ConfigError(
                    f"counts={list(counts)}: rank {rank} has {len(self.shards[rank]) - self.consumed[rank]} "
                    f"samples left"
                )
        self.consumed = after

    def steps(self, batch_size: int) -> int:
        """Return the number of steps until all ranks are done, with at most `batch_size` samples per rank."""
        batch_size = check_int("batch_size", batch_size, 1)
        return max(-(-len(left) // batch_size) for left in self.remaining)

    def batches(self, rank: int, batch_size: int) -> Iterator[Samples]:
        """Yield a rank's remaining batches, as many as the longest rank has; the last ones may be empty.

        Does not :meth:`advance`: a batch is consumed when its step is over.
        """
        mine = self.remaining[rank]
        for step in range(self.steps(batch_size)):
            yield mine[step * batch_size : (step + 1) * batch_size]

    def advance_steps(self, steps: int, batch_size: int) -> None:
        """Mark the samples of this number of steps of :meth:`batches` as consumed, on every rank."""
        self.advance([min(steps * batch_size, len(left)) for left in self.remaining])

    # -- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the epoch: small, JSON-able, equal on all ranks."""
        return {
            "version": 1,
            "epoch": self.number,
            "parts": [list(part) for part in self._parts] + [list(self.consumed)],
            "sharding": self.sharding.settings(),
        }

    @classmethod
    def from_state_dict(cls, sharding: Rule[Samples], state: Any, ranks: int) -> Epoch[Samples]:
        """Return the epoch of a :meth:`state_dict`, to resume on this number of ranks.

        With as many ranks as before, each continues its own shard; otherwise the remaining samples are
        sharded again. Every sample is seen exactly once either way.

        Raises:
            ConfigError: not such a state, or one of another data set, seed or rule.
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
                + "); resume with the data set, seed and sharding that the epoch began with"
            )
        epoch = cls(sharding, len(parts[0]), number)
        for place, taken in enumerate(parts):
            if place:
                epoch._reshard(len(taken))
            epoch.advance(taken)
        if ranks != epoch.ranks:
            epoch._reshard(ranks)
        return epoch

    def _reshard(self, ranks: int) -> None:
        """Shard the remaining samples over this number of ranks, in the epoch's order."""
        rest = self.sharding.rest(self.remaining, self.number)
        self._parts.append(list(self.consumed))
        self.shards = self.sharding.split(rest, ranks, self.number, len(self._parts))
        self.consumed = [0] * ranks


def _checked(state: Any) -> tuple[list[list[int]], int]:
    """Return what each rank consumed in each part of an epoch, and the epoch's number.

    Raises:
        ConfigError: not a state of an epoch.
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
        raise ConfigError(
            f"state={str(state)[:200]} is no state of an epoch, as Epoch.state_dict() returns it"
        )
    return state["parts"], state["epoch"]
