"""The bucket plan: which gradients are reduced together.

Gradients of one dtype and device are concatenated in flat buffers ("buckets") and reduced one bucket at a
time, so that a step has few messages and each starts as soon as its bucket is full. The plan follows the
order in which gradients became ready in the first backward pass; its first bucket is small so that
communication starts early (Li et al., "PyTorch Distributed", VLDB 2020, section 3.2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from hvdloss.errors import ConfigError

__all__ = ["Bucket", "Member", "ParameterInfo", "plan_buckets"]

BUCKET_BYTES = 25 * 2**20
FIRST_BUCKET_BYTES = 2**20
# From this size on, a copy into a bucket costs more than a message of its own
# (docs/explanation/performance.md).
UNBUCKETED_BYTES = 4 * 2**20


@dataclass(frozen=True)
class ParameterInfo:
    """What a plan needs to know of a parameter: all of it equal on all ranks.

    Attributes:
        name: unique in the optimizer.
        shape: of the parameter and its gradient.
        kind: dtype and device type as text ("float32 cpu"); only equal kinds share a bucket.
        itemsize: bytes of one entry.
        sparse: whether its gradients are sparse, so that no bucket can hold them.
        trained: whether it gets gradients.
        gradient: dtype and layout of its gradients as text, where they differ from the parameter's.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    itemsize: int
    sparse: bool = False
    trained: bool = True
    gradient: str = ""

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

    A flag counts the ranks on which that parameter had a gradient in the step, so that a parameter without
    any gets no gradient, as in one process. An `unbucketed` one has no buffer: its only member's gradient
    is reduced in place, and its flag is sent elsewhere.
    """

    kind: str
    members: tuple[Member, ...]
    unbucketed: bool = False

    @property
    def numel(self) -> int:
        """Number of gradient entries, without flags."""
        return self.members[-1].stop

    @property
    def length(self) -> int:
        """Number of entries of the buffer, with flags."""
        return self.numel if self.unbucketed else self.numel + len(self.members)


def plan_buckets(
    parameters: Sequence[ParameterInfo],
    order: Sequence[int],
    *,
    bucket_bytes: int = BUCKET_BYTES,
    first_bytes: int = FIRST_BUCKET_BYTES,
    unbucketed_bytes: int | None = None,
    groups: int | Sequence[Sequence[int]] | None = None,
) -> list[Bucket]:
    """Return the buckets of all dense `parameters`, in the order in which they will fill.

    Args:
        parameters: all of the optimizer's, in an order that is the same on all ranks.
        order: indices into `parameters`, first ready first; those it leaves out come last.
        bucket_bytes: a bucket is closed when it holds at least this many bytes.
        first_bytes: the same for the first bucket of each kind.
        unbucketed_bytes: a parameter of at least this many bytes is not bucketed; None to bucket all, as
            with `groups`.
        groups: like Horovod's: a number of buckets to aim at, or lists of indices that must share one.

    Raises:
        ConfigError: sizes below 1, or an index twice or out of range.
    """
    if min(bucket_bytes, first_bytes, unbucketed_bytes or 1) < 1:
        raise ConfigError(
            f"bucket_bytes={bucket_bytes}, first_bytes={first_bytes} and unbucketed_bytes={unbucketed_bytes} "
            f"must be at least 1"
        )
    if len(set(order)) != len(order) or any(not 0 <= i < len(parameters) for i in order):
        raise ConfigError(f"order={list(order)} names a parameter twice or one that is not there")
    seen = set(order)
    full = [*order, *(i for i in range(len(parameters)) if i not in seen)]
    full = [i for i in full if not parameters[i].sparse]
    forced = _forced_groups(groups, len(parameters))
    if isinstance(groups, int) and groups > 0:
        total = sum(parameters[i].numel * parameters[i].itemsize for i in full)
        bucket_bytes = first_bytes = max(1, -(-total // groups))

    def key_of(i: int) -> tuple[str, int | None]:
        return parameters[i].kind, forced.get(i)

    waiting = Counter(key_of(i) for i in full)  # members of each forced group yet to come
    open_members: dict[tuple[str, int | None], list[int]] = {}
    held: Counter[tuple[str, int | None]] = Counter()
    begun: set[str] = set()
    layouts: list[tuple[str, list[int], bool]] = []
    for i in full:
        key = key_of(i)
        size = parameters[i].numel * parameters[i].itemsize
        if unbucketed_bytes is not None and not groups and size >= unbucketed_bytes:
            begun.add(key[0])
            layouts.append((key[0], [i], True))
            continue
        open_members.setdefault(key, []).append(i)
        held[key] += size
        waiting[key] -= 1
        limit = bucket_bytes if key[0] in begun else first_bytes
        if not waiting[key] if key[1] is not None else held[key] >= limit:
            begun.add(key[0])
            layouts.append((key[0], open_members.pop(key), False))
            held[key] = 0
    layouts += [(key[0], members, False) for key, members in open_members.items()]
    # A bucket fills when its last member is ready.
    position = {i: n for n, i in enumerate(full)}
    layouts.sort(key=lambda layout: position[layout[1][-1]])
    return [_lay_out(kind, members, parameters, unbucketed) for kind, members, unbucketed in layouts]


def _forced_groups(groups: int | Sequence[Sequence[int]] | None, count: int) -> dict[int, int]:
    """Return the group number of each parameter that lists of indices force into one."""
    if isinstance(groups, int):
        if groups < 0:
            raise ConfigError(f"groups={groups} must be at least 0, or lists of parameters")
        return {}
    named = [i for group in groups or () for i in group]
    if len(set(named)) != len(named) or any(not 0 <= i < count for i in named):
        raise ConfigError(
            f"groups={[list(group) for group in groups or ()]} names a parameter twice or one that is "
            f"not there"
        )
    return {i: number for number, group in enumerate(groups or ()) for i in group}


def _lay_out(kind: str, members: list[int], parameters: Sequence[ParameterInfo], unbucketed: bool) -> Bucket:
    ends = list(accumulate(parameters[i].numel for i in members))
    places = (Member(i, s, e) for i, s, e in zip(members, [0, *ends], ends, strict=False))
    return Bucket(kind, tuple(places), unbucketed)
