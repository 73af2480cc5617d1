"""The bucketing plan: which gradients travel together.

Gradients of one dtype and device are laid side by side in flat buffers ("buckets") and reduced one
bucket at a time, so that a step has few messages and each starts as soon as its bucket is full. The
plan follows the order in which gradients became ready in the first backward pass; its first bucket is
small so that communication starts early (Li et al., "PyTorch Distributed", VLDB 2020, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hvdloss.errors import ConfigError

__all__ = ["Bucket", "Member", "ParameterInfo", "plan_buckets"]

BUCKET_BYTES = 25 * 2**20
FIRST_BUCKET_BYTES = 2**20


@dataclass(frozen=True)
class ParameterInfo:
    """What a plan must know of a parameter: everything equal on all ranks.

    Attributes:
        name: unique in the optimizer.
        shape: of the parameter and its gradient.
        kind: dtype and device type as text ("float32 cpu"); only equal kinds share a bucket.
        itemsize: bytes of one entry.
        sparse: whether its gradients are sparse, so that no bucket can hold them.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    itemsize: int
    sparse: bool = False

    @property
    def numel(self) -> int:
        """Number of entries."""
        count = 1
        for n in self.shape:
            count *= n
        return count


@dataclass(frozen=True)
class Member:
    """A parameter's place in a bucket: entries ``[start, stop)`` of the flat buffer."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Bucket:
    """A flat buffer's layout: its members' entries, then one flag per member.

    A flag counts the ranks on which that parameter had a gradient in the step, so that a parameter
    that none of them used keeps no gradient, as in one process.
    """

    kind: str
    members: tuple[Member, ...]

    @property
    def numel(self) -> int:
        """Number of gradient entries, flags not counted."""
        return self.members[-1].stop

    @property
    def length(self) -> int:
        """Number of entries of the buffer, flags included."""
        return self.numel + len(self.members)


def plan_buckets(
    parameters: Sequence[ParameterInfo],
    order: Sequence[int],
    *,
    bucket_bytes: int = BUCKET_BYTES,
    first_bytes: int = FIRST_BUCKET_BYTES,
    groups: int | Sequence[Sequence[int]] | None = None,
) -> list[Bucket]:
    """Return the buckets of all dense `parameters`, in the order in which they will fill.

    Args:
        parameters: all of the optimizer's, in an order that is the same on all ranks.
        order: indices into `parameters`, first ready first; those it leaves out come last.
        bucket_bytes: a bucket is closed when it holds at least this many bytes.
        first_bytes: the same for the first bucket of each kind.
        groups: like Horovod's: a number of buckets to aim at, or lists of indices that must share one.

    Raises:
        ConfigError: sizes below 1, or an index twice or out of range.
    """
    if bucket_bytes < 1 or first_bytes < 1:
        raise ConfigError(f"bucket_bytes={bucket_bytes} and first_bytes={first_bytes} must be at least 1")
    if len(set(order)) != len(order) or any(not 0 <= i < len(parameters) for i in order):
        raise ConfigError(f"order={list(order)} names a parameter twice or one that is not there")
    seen = set(order)
    full = [*order, *(i for i in range(len(parameters)) if i not in seen)]
    full = [i for i in full if not parameters[i].sparse]
    forced: dict[int, int] = {}
    if isinstance(groups, int):
        if groups > 0:
            total = sum(parameters[i].numel * parameters[i].itemsize for i in full)
            bucket_bytes = first_bytes = max(1, -(-total // groups))
    elif groups is not None:
        for number, group in enumerate(groups):
            forced.update(dict.fromkeys(group, number))

    closed: list[Bucket] = []
    open_members: dict[tuple[str, int | None], list[int]] = {}
    begun: set[str] = set()

    def close(key: tuple[str, int | None]) -> None:
        members, start = [], 0
        for i in open_members.pop(key):
            stop = start + parameters[i].numel
            members.append(Member(i, start, stop))
            start = stop
        closed.append(Bucket(key[0], tuple(members)))

    remaining: dict[tuple[str, int | None], int] = {
        (parameters[i].kind, g): sum(
            1 for j in full if forced.get(j) == g and parameters[j].kind == parameters[i].kind
        )
        for i, g in forced.items()
        if i in set(full)
    }
    for i in full:
        info = parameters[i]
        key = (info.kind, forced.get(i))
        open_members.setdefault(key, []).append(i)
        if key[1] is not None:
            done = len(open_members[key]) == remaining[key]
        else:
            held = sum(parameters[j].numel * info.itemsize for j in open_members[key])
            done = held >= (bucket_bytes if info.kind in begun else first_bytes)
        if done:
            begun.add(info.kind)
            close(key)
    for key in list(open_members):
        close(key)
    return closed
