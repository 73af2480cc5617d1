"""How an optimizer's gradients travel: the plan, its buckets, and what they hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import torch
from hvdloss.comm.communicator import Communicator
from hvdloss.comm.plan import Bucket, ParameterInfo, plan_buckets
from hvdloss.comm.tuning import Tuning
from hvdloss.terms.term import CommStats
from hvdloss.torch.buckets import (
    FlatBucket,
    LoneGradient,
    SparseSlot,
    Wire,
    beyond,
    weighed,
    weighed_sparse,
)
from hvdloss.torch.compression import Compression
from hvdloss.torch.engines.group import EngineGroup
from hvdloss.torch.parameters import OptimizerParameters

__all__ = ["GradientReducer", "Options"]


@dataclasses.dataclass(frozen=True)
class Options:
    """How an optimizer's gradients travel, as it was told.

    Attributes: see :func:`hvdloss.torch.DistributedOptimizer`.
    """

    compression: Any
    predivide: float
    groups: Any
    sparse_as_dense: bool
    process_set: Any
    check_every: int | None
    tuning: Tuning


def _any_of(found: list[Any]) -> Any:
    """Return above 0 if any of these bools is True: a number, or a tensor where there are tensors."""
    waiting = [one for one in found if isinstance(one, torch.Tensor)]
    here = float(any(one for one in found if not isinstance(one, torch.Tensor)))
    return torch.stack(waiting).any().double() + here if waiting else here


class UnplannedGradients:
    """Scaled gradients of a step before there is a plan, each by itself, and the order in which they came."""

    def __init__(self) -> None:
        self.order: dict[int, None] = {}  # of ids of parameters
        self.fired: set[int] = set()  # in the pass that is under way
        self.held: dict[int, torch.Tensor] = {}

    def begin_step(self) -> None:
        """Forget what the last step held."""
        self.held.clear()
        self.fired.clear()

    def note(self, p: torch.nn.Parameter) -> None:
        """Note that a parameter's gradient is ready."""
        self.fired.add(id(p))
        self.order[id(p)] = None

    @torch.no_grad()
    def accumulate(self, parameters: Sequence[torch.nn.Parameter], scale: Any) -> None:
        """Add ``scale * p.grad`` of the parameters whose gradients came, and set their ``.grad`` None."""
        for p in parameters:
            if id(p) not in self.fired or p.grad is None:
                continue
            grad, p.grad = p.grad.detach(), None
            # Sums of many weights do not fit float16.
            grad = grad.float() if grad.dtype is torch.float16 else grad
            grad = (weighed if grad.layout is torch.strided else weighed_sparse)(grad, scale)
            held = self.held.get(id(p))
            self.held[id(p)] = grad if held is None else held + grad
        self.fired.clear()

    def nonfinite(self, parameters: Sequence[torch.nn.Parameter], wire: Wire) -> Any:
        """Return above 0 if a gradient is NaN, infinite, or too large to be summed."""
        grads = [*self.held.values(), *(p.grad for p in parameters if p.grad is not None)]
        return _any_of(
            [
                beyond(
                    (g if g.layout is torch.strided else g.coalesce().values()).detach().reshape(-1),
                    wire.limit(g.dtype),
                )
                for g in grads
            ]
        )


class GradientReducer:
    """An optimizer's gradients on their way: planned once, then the same messages in every step.

    Args:
        parameters: the optimizer's.
        options: how they travel.
        name: of the optimizer, on the wire.

    Attributes:
        wire: sums and gathers them.
        buckets: in the plan's order, in which they are launched on every rank.
        unbucketed: those of the buckets that are large gradients by themselves.
        ledger_bucket: the bucket in whose tail ledgers travel; None where none can.
        sparse: gradients that are gathered.
        slots: by ``id`` of a parameter, its bucket and its place there.
        unplanned: what a step holds before there is a plan.
        planned: whether there is one.
        ledgers_moved: whether gradients can no longer travel as planned, since compression changed.
    """

    def __init__(self, parameters: OptimizerParameters, options: Options, name: str) -> None:
        self._parameters, self._options, self._name = parameters, options, name
        self._group = EngineGroup(options.process_set, own_order=True, named=False)
        self._compression = options.compression
        self.wire = Wire(self._group, options.compression)
        self.reset()

    def reset(self) -> None:
        """Plan again at the next step, from what that step sees."""
        self.buckets: list[FlatBucket | LoneGradient] = []
        self.unbucketed: list[LoneGradient] = []
        self.ledger_bucket: FlatBucket | None = None
        self.sparse: list[SparseSlot] = []
        self.slots: dict[int, tuple[FlatBucket | LoneGradient, int]] = {}
        self.unplanned = UnplannedGradients()
        self.planned = False
        self._densified: list[torch.nn.Parameter] = []
        self.ledgers_moved = False
        self._planned_for: tuple[int, list[Any]] = (0, [])

    def is_outdated(self) -> bool:
        """Return whether the plan is for other ranks (an elastic job) or parameters (``model.double()``)."""
        return self.planned and self._planned_for != self._now()

    def _now(self) -> tuple[int, list[Any]]:
        return self._options.process_set.size(), self._parameters.kinds()

    @property
    def planned_size(self) -> int:
        """How many ranks the plan is for."""
        return self._planned_for[0]

    def compress(self, on: bool) -> None:
        """Have gradients travel as float16 from now on, or as they are."""
        wanted = Compression.fp16 if on else Compression.none
        if wanted is not self._compression:
            self._compression = wanted
            self.wire = Wire(self._group, wanted)
            self.ledgers_moved = not self.ledgers_moved  # where they travel depends on it

    def _all(self) -> Iterator[FlatBucket | LoneGradient | SparseSlot]:
        yield from self.buckets
        yield from self.sparse

    # -- a step -----------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Forget what the last step held."""
        for slot in self._all():
            slot.begin_step()
        self.unplanned.begin_step()

    def keep_views(self) -> None:
        """Take new views of buffers for gradients whose memory the user changed."""
        for bucket in self.buckets:
            if isinstance(bucket, FlatBucket):
                bucket.keep_views()

    def note(self, p: torch.nn.Parameter) -> None:
        """Note the gradient of a parameter that no bucket waits for."""
        if not self.planned:
            self.unplanned.note(p)

    def came(self) -> bool:
        """Return whether a gradient came in the pass that is under way to one that a bucket waits for."""
        return any(bucket.fired_count for bucket in self.buckets)

    def end_pass(self, scale: Any | None) -> None:
        """Take in the gradients of a pass; None: leave those of something else to be looked at."""
        for slot in self._all():
            if scale is not None:
                slot.absorb(scale)
            slot.begin_pass()
        if not self.planned and scale is not None:
            self.unplanned.accumulate(self._parameters.all(), scale)

    def fill(self, bucket: FlatBucket | LoneGradient, leftover: Any, launch: Callable[[], None]) -> None:
        """Launch a bucket that is full, in the order of the plan on every rank.

        Whichever gradients come first on this rank, or do not come: the ledgers' bucket is not waited for.
        """
        bucket.full = True
        for slot in self.buckets:
            if slot is self.ledger_bucket or slot.launched:
                continue
            if not slot.full:
                break
            launch()
            slot.launch(leftover, self.wire)

    def seal(self, leftover: Any) -> None:
        """Complete what this rank gives, and look at it."""
        for slot in self._all():
            slot.seal(leftover, self.wire)

    def drop(self) -> None:
        """Have this rank give nothing, as one without any backward pass."""
        for slot in self._all():
            slot.begin_step()
        for p in self._parameters.all():
            p.grad = None
        self.unplanned.held.clear()

    def nonfinite(self) -> Any:
        """Return above 0 if a gradient of this rank is NaN, infinite or too large: a number, or a tensor."""
        if not self.planned:
            return self.unplanned.nonfinite(self._parameters.all(), self.wire)
        return _any_of([slot.bad for slot in self._all()])

    def launch(self, leftover: Any) -> None:
        """Start every reduction that has not started, but the ledgers', whose bucket is completed."""
        for slot in self._all():
            if not slot.launched and slot is not self.ledger_bucket:
                slot.launch(leftover, self.wire)
        if self.ledger_bucket is not None and not self.ledger_bucket.sealed:
            self.ledger_bucket.seal(leftover, self.wire)

    def launch_ledgers(self, leftover: Any) -> None:
        """Start the ledgers' bucket, which tells of the others."""
        if self.ledger_bucket is not None and not self.ledger_bucket.launched:
            self.ledger_bucket.launch(leftover, self.wire)

    def keep_local(self, leftover: Any) -> None:
        """Complete a step whose gradients stay on this rank."""
        wire = Wire(None, Compression.none)
        for slot in self._all():
            if isinstance(slot, LoneGradient):
                slot.used = slot.there
            slot.launch(leftover, wire)

    def finish(self, denominator: float) -> None:
        """Wait for the sums, divide, and give the parameters their gradients."""
        for slot in self._all():
            slot.finish(denominator)

    def restore_sparse(self) -> None:
        """Give gradients that travelled dense their sparse form again."""
        for p in self._densified:
            if p.grad is not None:
                p.grad = p.grad.to_sparse(1)

    def exceeds(self) -> bool:
        """Return whether a reduced gradient is NaN or infinite."""
        return any(bool(beyond(slot.handed, torch.finfo(slot.handed.dtype).max)) for slot in self._all())

    def drain(self) -> None:
        """Wait for what is under way, and drop it."""
        for slot in self._all():
            slot.drain()

    def counts(self, small: int) -> dict[str, int]:
        """Return how many messages a step sends, with so many `small` ones, and what they hold."""
        return {
            "messages": len(self.buckets) + 2 * len(self.sparse) + (self.ledger_bucket is None) + small,
            "buckets": len(self.buckets) - len(self.unbucketed),
            "unbucketed": len(self.unbucketed),
            "sparse": len(self.sparse),
        }

    def travelled(self, messages: int) -> CommStats:
        """Return how this step's gradients travelled."""
        flats = [b.flat if isinstance(b, FlatBucket) else b.parameters[0] for b in self.buckets]
        return CommStats(
            messages=messages,
            bytes=sum(self.wire.bytes_of(flat) for flat in flats),
            full_bytes=sum(flat.numel() * flat.element_size() for flat in flats),
        )

    def is_half(self) -> bool:
        """Return whether any gradient travels as float16."""
        return any(self.wire.is_half(dtype) for dtype in {p.dtype for p in self._parameters.all()})

    # -- the plan ---------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Return what must be equal on all ranks."""
        options, groups = self._options, self._options.groups
        return {
            "compression": getattr(self._compression, "__name__", str(self._compression)),
            "gradient_predivide_factor": options.predivide,
            "sparse_as_dense": options.sparse_as_dense,
            "groups": groups if isinstance(groups, int) else bool(groups),
            **options.tuning.shared(),
        }

    def infos(self) -> list[ParameterInfo]:
        """Return what ranks compare of the parameters."""

        def is_sparse(p: torch.nn.Parameter) -> bool:
            held = self.unplanned.held.get(id(p), p.grad)
            return held is not None and held.layout is not torch.strided

        return [
            ParameterInfo(
                self._parameters.name(p),
                tuple(p.shape),
                f"{p.dtype} {p.device.type}".removeprefix("torch."),
                p.element_size(),
                is_sparse(p),
                trained=self._parameters.is_trained(p),
                gradient=_gradient_kind(p),
            )
            for p in self._parameters.all()
        ]

    def order(self) -> list[int]:
        """Return the places of the parameters in the order in which their gradients came."""
        place = {id(p): i for i, p in enumerate(self._parameters.all())}
        return [place[key] for key in self.unplanned.order]

    def plan(
        self, infos: Sequence[ParameterInfo], order: Sequence[int], ledger_length: Callable[[Any], int]
    ) -> None:
        """Make the buckets.

        Args:
            infos: of the parameters, as all ranks agree.
            order: places of the parameters, in which gradients become ready.
            ledger_length: by dtype, how many numbers the ledgers have in a bucket.
        """
        options, parameters = self._options, self._parameters.all()
        if options.sparse_as_dense:
            self._densified = [p for p, info in zip(parameters, infos, strict=True) if info.sparse]
            infos = [dataclasses.replace(info, sparse=False) for info in infos]
        # A frozen parameter joins a plan when it is trained, which makes a new one.
        trained = [i for i, p in enumerate(parameters) if self._parameters.is_trained(p)]
        position = {i: n for n, i in enumerate(trained)}
        index = {id(p): i for i, p in enumerate(parameters)}
        groups = options.groups
        if groups is not None and not isinstance(groups, int):
            groups = [[position[index[id(p)]] for p in g if index.get(id(p)) in position] for g in groups]
        layouts = plan_buckets(
            [infos[i] for i in trained],
            [position[i] for i in order if i in position],
            bucket_bytes=options.tuning.bucket_bytes,
            first_bytes=options.tuning.first_bytes,
            unbucketed_bytes=options.tuning.unbucketed_bytes,
            groups=groups,
        )
        self._allocate(layouts, [parameters[i] for i in trained], ledger_length)
        self.sparse = [
            SparseSlot(parameters[i], f"{self._name}.sparse.{i}") for i in trained if infos[i].sparse
        ]
        self.slots = {key: (bucket, i) for bucket in self.buckets for key, i in bucket.place.items()}

    def _allocate(
        self, layouts: list[Bucket], members: list[torch.nn.Parameter], ledger_length: Callable[[Any], int]
    ) -> None:
        """Make the buckets. The last one that can takes the ledgers along, which saves a message."""
        carriers = [
            n
            for n, layout in enumerate(layouts)
            if not layout.unbucketed and self.wire.is_exact(members[layout.members[0].index].dtype)
        ]
        alone = sum(layout.unbucketed for layout in layouts)
        for n, layout in enumerate(layouts):
            name = f"{self._name}.bucket.{n}"
            if layout.unbucketed:
                self.unbucketed.append(LoneGradient(layout, members, name))
                self.buckets.append(self.unbucketed[-1])
            elif carriers and n == carriers[-1]:
                dtype = members[layout.members[0].index].dtype
                self.ledger_bucket = FlatBucket(layout, members, name, ledger_length(dtype) + alone)
                self.buckets.append(self.ledger_bucket)
            else:
                self.buckets.append(FlatBucket(layout, members, name))

    def fill_plan(self, factor: float, communicator: Communicator) -> None:
        """Fill the plan with what this step holds, times `factor`.

        Collectives: one small all-reduce, where there are gradients without a bucket.
        """
        slot = {id(p): bucket for bucket in self.buckets for p in bucket.parameters}
        slot.update({id(one.parameter): one for one in self.sparse})  # type: ignore[misc]
        for key, held in self.unplanned.held.items():
            slot[key].put(key, held * factor)
        self.unplanned.begin_step()
        if self.unbucketed:  # this step's ledgers are under way without them
            there = np.array([float(lone.there) for lone in self.unbucketed])
            self.set_used(communicator.all_reduce(there, f"{self._name}.lone"))
        self.planned, self._planned_for = True, self._now()

    def set_used(self, counts: Sequence[float]) -> None:
        """Note on how many ranks there is each gradient without a bucket."""
        for lone, count in zip(self.unbucketed, counts, strict=True):
            lone.used = bool(count)


def _gradient_kind(p: torch.nn.Parameter) -> str:
    """Return the dtype of a parameter's gradient, where it is another than the parameter's."""
    dtype = getattr(p, "grad_dtype", None) or p.dtype
    return "" if dtype is p.dtype else str(dtype).removeprefix("torch.")
