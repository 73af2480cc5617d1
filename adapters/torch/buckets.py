"""Flat gradient buffers and their way over the wire."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hvdloss.comm.plan import Bucket
from hvdloss.torch.compression import BF16Compressor
from hvdloss.torch.engines.group import EngineGroup
from hvdloss.torch.ops import on_host, to_device_async

__all__ = [
    "FlatBucket",
    "LoneGradient",
    "SparseSlot",
    "Wire",
    "absent",
    "beyond",
    "weighed",
    "weighed_sparse",
]

# Horovod sums these dtypes; others travel as a wider one.
_WIDER = {torch.bfloat16: torch.float32}
_SHORT = (torch.float16, torch.bfloat16)


def _scaled(tensor: torch.Tensor, scale: Any) -> bool:
    """Return whether multiplying `tensor` by `scale` would change anything (unknown on a device)."""
    return not (isinstance(scale, float) and scale == 1.0)


def absent(scale: Any) -> bool:
    """Return whether nothing is to be added, whatever it is: NaN times 0 would be NaN."""
    return isinstance(scale, float) and scale == 0.0


def beyond(x: torch.Tensor, limit: float) -> Any:
    """Return whether an entry of `x` is NaN, infinite, or above `limit` in size.

    A bool on a CPU; on a device a 0-dim bool tensor, for which nobody waits.

    One pass that only reads. On a CPU the sum of squares, which is as fast as memory and finite wherever all
    entries are of usual size, mostly settles it.
    """
    if not x.numel():
        return False
    if x.is_complex():
        x = torch.view_as_real(x).view(-1)
    if not on_host(x):
        low, high = torch.aminmax(x)
        return ~((low >= -limit) & (high <= limit))
    if x.dtype in (torch.float32, torch.float64):
        squares = float(torch.dot(x, x))
        if math.isfinite(squares) and squares <= limit * limit:
            return False
    low, high = torch.aminmax(x)
    return not (float(low) >= -limit and float(high) <= limit)


def weighed(gradient: torch.Tensor, scale: Any) -> torch.Tensor:
    """Return ``scale * gradient``, and zeros where `scale` is 0, whatever the gradient is.

    `scale` is a float, or a 0-dim tensor on a device, for which nobody waits.
    """
    if absent(scale):
        return torch.zeros_like(gradient)
    if isinstance(scale, float):
        return gradient * scale
    # A tensor's 0-dim factor would first be rounded to 16 bits, which a number is not.
    wide = gradient.float() if gradient.dtype in _SHORT else gradient
    return torch.where(scale == 0, 0, wide * scale).to(gradient.dtype)


def weighed_sparse(gradient: torch.Tensor, scale: Any) -> torch.Tensor:
    """Return ``scale * gradient`` of a sparse gradient; see :func:`weighed`."""
    return torch.sparse_coo_tensor(
        gradient._indices(),
        weighed(gradient._values(), scale),
        gradient.shape,
        check_invariants=False,
        is_coalesced=gradient.is_coalesced(),
    )


def _write(held: torch.Tensor, gradient: torch.Tensor, scale: Any) -> None:
    """Set to ``scale * gradient``; see :func:`weighed`."""
    if isinstance(scale, float):
        torch.mul(gradient, scale, out=held)
    elif held.dtype in _SHORT:
        held.copy_(weighed(gradient, scale))
    else:
        torch.mul(gradient, scale, out=held).masked_fill_(scale == 0, 0)


def _scale_(held: torch.Tensor, scale: Any) -> torch.Tensor:
    """Multiply in place; see :func:`weighed`."""
    if _scaled(held, scale):
        _write(held, held, scale)
    return held


def _add(held: torch.Tensor, gradient: torch.Tensor, scale: Any) -> None:
    """Add ``scale * gradient`` in place; see :func:`weighed`."""
    if isinstance(scale, float):
        held.add_(gradient, alpha=scale)
    else:
        held.add_(weighed(gradient, scale))


class _Reduction:
    """A sum over ranks that is under way, or not."""

    _finish: Callable[[], None] | None = None
    launched = False
    full = False  # whether all its gradients are there, in a step's last pass
    sealed = False  # whether what this rank gives is complete
    bad: Any = False  # and whether any of it is NaN, infinite, or too large to be summed (see `beyond`)

    def drain(self) -> None:
        """Wait for the reduction, if it is under way, and drop its result."""
        if self._finish is not None:
            finish, self._finish = self._finish, None
            finish()


class FlatBucket(_Reduction):
    """The gradients of some parameters of one dtype and device, side by side in one buffer.

    Holds, between the backward passes of a step, sum_m scale_m * gradient_m; then travels as one
    message; then is what the parameters' ``.grad`` are views of. After them come one flag per parameter,
    which counts the ranks that had a gradient for it, and a `tail` of so many entries for whoever else
    wants sums.
    """

    def __init__(
        self, layout: Bucket, parameters: list[torch.nn.Parameter], name: str, tail: int = 0
    ) -> None:
        self.layout = layout
        self.name = name
        self.parameters = [parameters[m.index] for m in layout.members]
        self.place = {id(p): i for i, p in enumerate(self.parameters)}
        like = self.parameters[0]
        self.flat = torch.zeros(layout.length + tail, dtype=like.dtype, device=like.device)
        self.body = self.flat[: layout.numel]
        self.flags = self.flat[layout.numel : layout.length]
        self.tail = self.flat[layout.length :]
        self.views = [self._view(i) for i in range(len(self.parameters))]
        self._places = [view.data_ptr() for view in self.views]
        # One pass for copy and scale pays off for large gradients, one call for all of them for small.
        self._fused = layout.numel >= 2**14 * len(self.parameters)
        self.begin_step()

    def _view(self, i: int) -> torch.Tensor:
        member = self.layout.members[i]
        return self.body[member.start : member.stop].view(self.parameters[i].shape)

    def keep_views(self) -> None:
        """Take new views of the buffer for gradients whose memory was changed (``model.double()``)."""
        for i, (view, place) in enumerate(zip(self.views, self._places, strict=True)):
            if view.data_ptr() != place or view.dtype is not self.flat.dtype:
                self.views[i] = self._view(i)

    def begin_step(self) -> None:
        """Forget what the last step wrote; the buffer itself is overwritten later, not cleared."""
        self.written = [False] * len(self.parameters)
        self.written_count = 0
        self.launched = self.full = self.sealed = self.bad = False
        self._finish = None
        self.begin_pass()

    def begin_pass(self) -> None:
        """Expect every parameter's gradient once more."""
        self.fired = [False] * len(self.parameters)
        self.fired_count = 0

    def fire(self, i: int) -> bool:
        """Note that the gradient of parameter `i` is ready; return whether all of the bucket's are."""
        if not self.fired[i]:
            self.fired[i] = True
            self.fired_count += 1
        return self.fired_count == len(self.fired)

    @torch.no_grad()
    def put(self, key: int, gradient: torch.Tensor) -> None:
        """Hold an already scaled gradient of the parameter whose ``id`` is `key`."""
        i = self.place[key]
        self.views[i].copy_(gradient.to_dense() if gradient.layout is not torch.strided else gradient)
        self.written[i] = True
        self.written_count += 1

    @torch.no_grad()
    def absorb(self, scale: Any) -> None:
        """Add ``scale * p.grad`` of the parameters that fired in this pass, and set their ``.grad`` None.

        `scale` is a float, or a 0-dim tensor on a device that nobody should wait for.
        """
        views, grads = [], []
        strided = torch.strided
        for i, p in enumerate(self.parameters):
            grad = p.grad
            if grad is None or not self.fired[i]:
                continue
            view = self.views[i]
            p.grad = None
            if absent(scale):
                if not self.written[i]:
                    self.written[i] = True
                    self.written_count += 1
                    view.zero_()
                continue
            if grad.layout is not strided:
                grad = grad.to_dense()
            if self.written[i]:
                _add(view, grad, scale)
                continue
            self.written[i] = True
            self.written_count += 1
            if grad is view:  # it was not set to None, so autograd has added to what lay here
                _scale_(view, scale)
            else:
                views.append(view)
                grads.append(grad)
        if not views:
            return
        if not _scaled(self.body, scale):
            torch._foreach_copy_(views, grads)
        elif self._fused or len(views) < len(self.views):
            for view, grad in zip(views, grads, strict=True):
                _write(view, grad, scale)
        else:
            torch._foreach_copy_(views, grads)
            _scale_(self.body, scale)

    @torch.no_grad()
    def seal(self, leftover: Any, wire: Wire) -> None:
        """Complete what this rank gives, and look at it; gradients that no backward pass touched go along.

        `leftover` is the step's scale for a gradient that was already there before (one process would
        keep it as well); a parameter without any gradient adds zero.
        """
        if self.written_count < len(self.views):
            for i, p in enumerate(self.parameters):
                if self.written[i]:
                    continue
                if p.grad is None:
                    self.views[i].zero_()
                else:
                    self.fired[i] = True
            self.absorb(leftover)
        self.flags.fill_(1)
        if self.written_count < len(self.views):
            self.flags.copy_(
                to_device_async(torch.tensor(self.written, dtype=self.flags.dtype), self.flags.device)
            )
        self.bad = beyond(self.body, wire.limit(self.body.dtype))
        self.sealed = True

    def launch(self, leftover: Any, wire: Wire) -> None:
        """Start the bucket's reduction."""
        if not self.sealed:
            self.seal(leftover, wire)
        self.launched = True
        self._finish = wire.send(self.flat, self.name)

    @torch.no_grad()
    def finish(self, denominator: float) -> None:
        """Wait for the sum, divide, and hand the gradients to the parameters."""
        self.drain()
        if denominator != 1.0:
            self.body.div_(denominator)
        self.handed = self.body
        used = None
        if self.written_count < len(self.views):
            used = self.flags.tolist()
        for i, p in enumerate(self.parameters):
            p.grad = self.views[i] if used is None or used[i] else None


class LoneGradient(_Reduction):
    """The gradient of one large parameter, which travels as it lies: a copy would cost a pass over it.

    A :class:`FlatBucket` of one parameter without a buffer. How many ranks had a gradient for it goes
    with the ledgers; `used` is to be set before :meth:`finish`.
    """

    def __init__(self, layout: Bucket, parameters: list[torch.nn.Parameter], name: str) -> None:
        self.name = name
        self.parameters = [parameters[layout.members[0].index]]
        self.place = {id(self.parameters[0]): 0}
        self.used = True
        self.begin_step()

    def begin_step(self) -> None:
        """Let go of the last step's gradient, which is now the parameter's."""
        self._held: torch.Tensor | None = None
        self._given = False  # once it is sealed: whether this rank had one, or adds zero
        self.launched = self.full = self.sealed = self.bad = False
        self._finish = None
        self.begin_pass()

    def begin_pass(self) -> None:
        """Expect the gradient once more."""
        self.fired_count = 0

    def fire(self, i: int) -> bool:
        """Note that the gradient is ready; return True, as it is all there is."""
        self.fired_count = 1
        return True

    @property
    def there(self) -> bool:
        """Whether this rank has a gradient in this step."""
        if self.sealed:
            return self._given
        return self._held is not None or self.parameters[0].grad is not None

    @torch.no_grad()
    def put(self, key: int, gradient: torch.Tensor) -> None:
        """Hold an already scaled gradient."""
        p = self.parameters[0]
        dense = gradient.to_dense() if gradient.layout is not torch.strided else gradient
        self._held = dense.to(p.dtype).contiguous()

    @torch.no_grad()
    def absorb(self, scale: Any) -> None:
        """Add ``scale * grad`` if the gradient came in this pass, and set ``.grad`` None."""
        p = self.parameters[0]
        grad = p.grad
        if not self.fired_count or grad is None:
            return
        p.grad = None
        if absent(scale):
            if self._held is None:
                self._held = torch.zeros_like(p, memory_format=torch.contiguous_format)
            return
        if grad.layout is not torch.strided:
            grad = grad.to_dense()
        if self._held is None:
            # Its own memory, which nobody else sees: autograd gives a parameter such a tensor.
            kept = grad.contiguous() if not grad.requires_grad else grad.detach().clone()
            self._held = _scale_(kept, scale)
        else:
            _add(self._held, grad, scale)

    @torch.no_grad()
    def seal(self, leftover: Any, wire: Wire) -> None:
        """Complete what this rank gives, and look at it: a gradient that no pass touched, or zero."""
        p = self.parameters[0]
        self._given = self.there
        if self._held is None:
            self.fired_count = 1
            self.absorb(leftover)
        if self._held is None:
            self._held = torch.zeros_like(p, memory_format=torch.contiguous_format)
        else:
            self.bad = beyond(self._held.view(-1), wire.limit(p.dtype))
        self.sealed = True

    def launch(self, leftover: Any, wire: Wire) -> None:
        """Start the reduction."""
        if not self.sealed:
            self.seal(leftover, wire)
        assert self._held is not None
        self.launched = True
        self._finish = wire.send(self._held.view(-1), self.name)

    @torch.no_grad()
    def finish(self, denominator: float) -> None:
        """Wait for the sum, divide, and hand the gradient to the parameter."""
        self.drain()
        assert self._held is not None
        if denominator != 1.0:
            self._held.div_(denominator)
        self.handed = self._held.view(-1)
        self.parameters[0].grad = self._held if self.used else None


class SparseSlot:
    """One parameter whose gradients are sparse in their first axis (an embedding's)."""

    def __init__(self, parameter: torch.nn.Parameter, name: str) -> None:
        self.parameter = parameter
        self.name = name
        self.begin_step()

    def begin_step(self) -> None:
        """Forget what the last step held."""
        self._held: torch.Tensor | None = None
        self._handles: tuple[Any, Any] | None = None
        self.launched = self.sealed = False
        self.bad: Any = False

    def begin_pass(self) -> None:
        """Nothing to do: a sparse slot is not launched during a backward pass."""

    def put(self, key: int, gradient: torch.Tensor) -> None:
        """Hold an already scaled gradient."""
        self._held = gradient if gradient.layout is not torch.strided else gradient.to_sparse(1)

    @torch.no_grad()
    def absorb(self, scale: Any) -> None:
        """Add ``scale * grad``, and set ``.grad`` None."""
        p = self.parameter
        if p.grad is None:
            return
        grad = p.grad.detach()
        p.grad = None
        if grad.layout is torch.strided:
            grad = grad.to_sparse(1)
        grad = weighed_sparse(grad, scale)
        self._held = grad if self._held is None else self._held + grad

    @torch.no_grad()
    def seal(self, leftover: Any, wire: Wire) -> None:
        """Complete what this rank gives, and look at it."""
        self.absorb(leftover)
        if self._held is not None:
            self._held = self._held.coalesce()
            self.bad = beyond(self._held.values().reshape(-1), wire.limit(self._held.dtype))
        self.sealed = True

    @torch.no_grad()
    def launch(self, leftover: Any, wire: Wire) -> None:
        """Start gathering all ranks' rows and values."""
        if not self.sealed:
            self.seal(leftover, wire)
        p = self.parameter
        if self._held is None:
            rows = torch.zeros(0, dtype=torch.int64, device=p.device)
            values = torch.zeros((0, *p.shape[1:]), dtype=p.dtype, device=p.device)
        else:
            held = self._held.coalesce()
            rows, values = held.indices()[0].contiguous(), held.values().contiguous()
        self._handles = (
            wire.gather(rows, f"{self.name}.rows"),
            wire.gather(values, f"{self.name}.values"),
        )
        self.launched = True

    @torch.no_grad()
    def finish(self, denominator: float) -> None:
        """Wait, divide, and hand the summed sparse gradient to the parameter."""
        rows, values = self.drain()
        p = self.parameter
        self.handed = values.view(-1)
        if not len(rows):
            p.grad = None
            return
        p.grad = torch.sparse_coo_tensor(
            rows.unsqueeze(0), values / denominator, p.shape, check_invariants=False
        ).coalesce()

    def drain(self) -> list[torch.Tensor]:
        """Wait for the gathers, if they are under way, and return all ranks' rows and values."""
        handles, self._handles = self._handles or (), None
        return [ready() for ready in handles]


class Wire:
    """Sums and gathers over a group, with compression; at size 1, or without a group, nothing is sent."""

    def __init__(self, group: EngineGroup | None, compression: Any) -> None:
        self._group = group
        self._compression = compression
        self._limits: dict[tuple[torch.dtype, int], float] = {}

    @property
    def size(self) -> int:
        """How many ranks take part; without a group only this one."""
        return 1 if self._group is None else self._group.size

    def _travels_as(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which values of `dtype` are summed."""
        probe, _ = self._compression.compress(torch.zeros(1, dtype=dtype))
        return probe.dtype

    def bytes_of(self, flat: torch.Tensor) -> int:
        """Return how many bytes `flat` has as it travels."""
        dtype = self._travels_as(flat.dtype)
        return flat.numel() * (dtype.itemsize if dtype not in _WIDER else _WIDER[dtype].itemsize)

    def is_exact(self, dtype: torch.dtype) -> bool:
        """Return whether whole numbers of 16 bits arrive as they were, beside gradients of `dtype`."""
        exact = self._travels_as(dtype) in (torch.float32, torch.float64)
        return exact and self._compression is not BF16Compressor

    def is_half(self, dtype: torch.dtype) -> bool:
        """Return whether values of `dtype` travel as float16, whose range is small."""
        return dtype is torch.float16 or self._travels_as(dtype) is torch.float16

    def limit(self, dtype: torch.dtype) -> float:
        """Return the largest size of values of `dtype` whose sum over ranks is surely finite."""
        key = (dtype, self.size)
        if key not in self._limits:
            largest = min(torch.finfo(one).max for one in (dtype, self._travels_as(dtype)))
            self._limits[key] = largest / self.size
        return self._limits[key]

    def send(self, flat: torch.Tensor, name: str) -> Callable[[], None]:
        """Start summing `flat` over ranks in place; the result calls for the wait."""
        if flat.is_complex():
            return self.send(torch.view_as_real(flat), name)
        if self._group is None or self.size == 1:
            return lambda: None
        if self._compression is BF16Compressor and flat.dtype is not torch.bfloat16:
            return self._send_exchanged(self._group, flat, name)
        wire, ctx = self._compression.compress(flat)
        decompress = self._compression.decompress
        if wire.dtype in _WIDER:
            wire = wire.to(_WIDER[wire.dtype])
        work = self._group.all_reduce(wire, name, in_place=True)

        def finish() -> None:
            summed = work.wait()
            if summed.data_ptr() != flat.data_ptr():
                flat.copy_(decompress(summed, ctx))

        return finish

    def _send_exchanged(self, group: EngineGroup, flat: torch.Tensor, name: str) -> Callable[[], None]:
        """Sum in bfloat16 pieces: all-to-all, add in float32, all-gather. Twice the latency."""
        size, n = self.size, flat.numel()
        piece = -(-n // size)
        padded = torch.zeros(size * piece, dtype=torch.bfloat16, device=flat.device)
        padded[:n].copy_(flat)
        work = group.all_to_all(padded.view(torch.uint8), f"{name}.pieces")

        def finish() -> None:
            mine = work.wait()
            mine = mine[0] if isinstance(mine, tuple) else mine
            summed = mine.view(torch.bfloat16).view(size, piece).float().sum(0).to(torch.bfloat16)
            whole = group.all_gather(summed.view(torch.uint8), f"{name}.sums").wait()
            flat.copy_(whole.view(torch.bfloat16)[:n])

        return finish

    def gather(self, tensor: torch.Tensor, name: str) -> Callable[[], torch.Tensor]:
        """Start gathering along the first axis, lengths may differ; the result calls for the wait."""
        if self._group is None or self.size == 1:
            return lambda: tensor
        return self._group.all_gather(tensor, name).wait
