"""Collectives with gradients against one process that holds all ranks' inputs; and Horovod's own."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import unittest
from pathlib import Path

import pytest
import torch
from torch_support import before_case, generator

import hvdloss.torch as hvd
from hvdloss.comm.collectives import even_sizes
from hvdloss.errors import ConfigError, ShapeError, UsageError
from hvdloss.torch import collectives as c
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")

__all__ = ["before_case"]

EXACT = 1e-12
DRAWS = 6


def _rows(rng, size, least=0):
    """Return numbers of rows for each rank: uneven, some 0, now and then all even."""
    if rng.random() < 0.3:
        return [rng.randint(least, 4)] * size
    return [rng.choice([least, rng.randint(least, 6)]) for _ in range(size)]


def _normal(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _close(a, b, what):
    scale = max(float(b.abs().max()) if b.numel() else 0.0, 1e-3)
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} is not {tuple(b.shape)}"
    error = float((a - b).detach().abs().max()) / scale if b.numel() else 0.0
    assert error <= EXACT, f"{what}: relative error {error:.3g}"
    return error


def _against_one_process(g, wire, alone, sizes, *, once=False, input_once=False):
    """Compare value, gradient and gradient of a gradient penalty with one process.

    The loss is sum_k f_k(out_k); with `once` it is f(out), the same on all ranks. `input_once`: all ranks
    have the same input, whose gradient counts once.
    """
    rank, size = hvd.rank(), hvd.size()
    xs = [_normal(g, n, 3) for n in sizes]
    if input_once:
        xs = [xs[0]] * size
    xs = [x.clone().requires_grad_() for x in (xs[:1] if input_once else xs)]
    outs = alone(xs * size if input_once else xs)
    first = [_normal(g, *out.shape) for out in outs]
    if once:
        first = [first[0]] * size
    loss = sum((a * out.sin()).sum() for a, out in zip(first[:1] if once else first, outs, strict=False))
    grads = torch.autograd.grad(loss, xs, create_graph=True)
    second = [_normal(g, *x.shape) for x in xs]
    penalty = sum((b * d**2).sum() for b, d in zip(second, grads, strict=True))
    twice = torch.autograd.grad(penalty, xs)

    at = 0 if input_once else rank
    x = xs[at].detach().clone().requires_grad_()
    out = wire(x)
    error = _close(out, outs[rank].detach(), "value")
    (grad,) = torch.autograd.grad((first[rank] * out.sin()).sum(), x, create_graph=True)
    error = max(error, _close(grad.detach(), grads[at].detach(), "gradient"))
    (again,) = torch.autograd.grad((second[at] * grad**2).sum(), x)
    return max(error, _close(again, twice[at], "second derivative"))


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
def case_horovods_own_gradients():
    """What Horovod's functions give for the loss sum_k k * sum(out_k), over the exact gradient.

    This is what docs/reference/collectives.md says; should Horovod mend it, this case tells. It comes
    first: gradients of Horovod's have no names of their own, and wait for ever once ranks were in
    process sets.
    """
    size, rank = hvd.size(), hvd.rank()
    total = float(sum(range(1, size + 1)))

    def ratio(call, exact, rows=None):
        x = torch.ones(rows or size, 1, dtype=torch.float64, requires_grad=True)
        out = call(x)
        # out.sum() would not do: its gradient has no storage of its own, which Horovod refuses.
        (out * torch.full_like(out, 1.0 + rank)).sum().backward()
        return (x.grad[0] / exact).item()

    with pytest.raises(ValueError, match="required to be contiguous"):
        hvd.allreduce(torch.ones(size, 1, requires_grad=True), name="a").sum().backward()
    found = {
        "allreduce, Sum": ratio(lambda x: hvd.allreduce(x, op=hvd.Sum, name="a"), total),
        "allreduce, Average": ratio(lambda x: hvd.allreduce(x, name="b"), total / size),
        "allgather": ratio(lambda x: hvd.allgather(x, name="c"), total, rows=2 + rank),
        "alltoall": ratio(lambda x: hvd.alltoall(x, name="d"), 1.0),
        "reducescatter, Sum": ratio(lambda x: hvd.reducescatter(x, op=hvd.Sum, name="e"), 1.0),  # row 0
        "reducescatter, Average": ratio(lambda x: hvd.reducescatter(x, name="f"), 1.0 / size),
    }
    of_root = ratio(lambda x: hvd.broadcast(x, 0, name="g"), total)
    if rank == 0:
        found["broadcast, at the root"] = of_root
    grad = torch.ones(1, 1, dtype=torch.float64)
    x = torch.ones(size, 1, dtype=torch.float64, requires_grad=True)
    hvd.reducescatter(x, op=hvd.Sum, name="h").backward(grad)
    found["reducescatter, Sum: the gradient handed in, 1 before"] = grad.item()
    expected = {
        "allreduce, Sum": 1.0,
        "allreduce, Average": 1.0,
        "allgather": 1.0 / size,
        "alltoall": 1.0,
        "reducescatter, Sum": float(size),
        "reducescatter, Average": float(size),
        "broadcast, at the root": 1.0 / size,
        "reducescatter, Sum: the gradient handed in, 1 before": float(size),
    }
    for key, value in found.items():
        assert abs(value - expected[key]) < 1e-12, (key, value, expected[key])
    return found


def _send_buffers() -> dict[str, int]:
    """Return the size of each TCP connection's send buffer, in bytes, by the connection's number."""
    found = {}
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry.name))) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername():
                found[os.readlink(entry.path)] = connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    return found


@needs("gloo-2")
def case_a_small_reduce_scatter_leaves_the_connections_as_they_are():
    """As released, Gloo cuts a connection's send buffer to twice what it sends, for good: 1.5 MB/s then."""
    hvd.reducescatter(torch.ones(hvd.size(), 1), op=hvd.Sum, name="small")
    found = _send_buffers()
    first = int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[1])  # the system only lets it grow
    assert found
    assert min(found.values()) >= first, (found, first)


@needs(more="gloo-3")
def case_horovods_broadcast_in_a_process_set():
    """Horovod's root is a rank among all, in the forward pass and in the backward one."""
    if hvd.size() < 3:
        raise unittest.SkipTest("needs three ranks")
    group = hvd.add_process_set([1, 2])
    found = {}
    if group.included():
        x = torch.full((1,), 1.0 + hvd.rank(), dtype=torch.float64, requires_grad=True)
        out = hvd.broadcast(x, 2, name="p", process_set=group)
        assert out.item() == 3.0
        (out * torch.ones_like(out)).sum().backward()
        found[f"gradient at rank {hvd.rank()} for root_rank=2, exact {2 * (hvd.rank() == 2)}"] = x.grad.item()
    hvd.barrier()
    hvd.remove_process_set(group)
    return found


def case_all_reduce():
    g, rng = generator(1), random.Random(1)
    error = 0.0
    for _ in range(DRAWS):
        sizes = [rng.randint(0, 4)] * hvd.size()
        for once in (False, True):
            error = max(
                error,
                _against_one_process(
                    g,
                    lambda x, once=once: c.all_reduce(x, replicated=once),
                    lambda xs: [sum(xs)] * len(xs),
                    sizes,
                    once=once,
                ),
            )
    return {"error": error}


def case_all_gather():
    g, rng = generator(2), random.Random(2)
    error = 0.0
    for draw in range(DRAWS):
        sizes = _rows(rng, hvd.size())
        for once in (False, True):
            known = sizes if draw % 2 else None
            error = max(
                error,
                _against_one_process(
                    g,
                    lambda x, once=once, known=known: c.all_gather(x, replicated=once, sizes=known),
                    lambda xs: [torch.cat(xs)] * len(xs),
                    sizes,
                    once=once,
                ),
            )
    return {"error": error}


def case_all_gather_of_nothing():
    g = generator(3)
    for once in (False, True):
        _against_one_process(
            g,
            lambda x, once=once: c.all_gather(x, replicated=once),
            lambda xs: [torch.cat(xs)] * len(xs),
            [0] * hvd.size(),
            once=once,
        )


def case_reduce_scatter():
    g, rng = generator(4), random.Random(4)
    error = 0.0
    for draw in range(2 * DRAWS):
        parts = _rows(rng, hvd.size())
        rows = sum(parts) if draw % 2 else rng.randint(0, 9)
        parts = parts if draw % 2 else None
        cut = parts or even_sizes(rows, hvd.size())
        error = max(
            error,
            _against_one_process(
                g,
                lambda x, parts=parts: c.reduce_scatter(x, sizes=parts),
                lambda xs, cut=cut: list(sum(xs).split(cut)),
                [rows] * hvd.size(),
            ),
        )
    return {"error": error}


def case_broadcast():
    g = generator(5)
    error = 0.0
    for root in range(hvd.size()):
        for once in (False, True):
            error = max(
                error,
                _against_one_process(
                    g,
                    lambda x, root=root, once=once: c.broadcast(x, root, replicated=once),
                    # The others' inputs count for nothing, but have a gradient: zero.
                    lambda xs, root=root: [xs[root] + sum(0 * x for x in xs)] * len(xs),
                    [3] * hvd.size(),
                    once=once,
                ),
            )
    return {"error": error}


def case_shift():
    g, rng = generator(6), random.Random(6)
    error = 0.0
    for by in (1, -1, 2, hvd.size(), 0, -5):
        error = max(
            error,
            _against_one_process(
                g,
                lambda x, by=by: c.shift(x, by),
                lambda xs, by=by: [xs[(k - by) % len(xs)] * 1 for k in range(len(xs))],
                _rows(rng, hvd.size()),
            ),
        )
    return {"error": error}


def case_copy_to_ranks():
    g = generator(7)
    error = _against_one_process(
        g, c.copy_to_ranks, lambda xs: [x * 1 for x in xs], [4] * hvd.size(), input_once=True
    )
    return {"error": error}


@needs(more="gloo-3")
def case_scale_gradient():
    x = torch.ones(3, requires_grad=True)
    c.scale_gradient(x, 2.5).sum().backward()
    assert x.grad.tolist() == [2.5] * 3


def case_a_split_layer():
    """Megatron's pair: f before, g after a layer whose hidden units are split over ranks."""
    g = generator(8)
    size, rank = hvd.size(), hvd.rank()
    x, w, v = _normal(g, 4, 3), _normal(g, 3, 2 * size), _normal(g, 2 * size, 5)
    for t in (x, w, v):
        t.requires_grad_()
    exact = torch.autograd.grad(((x @ w).tanh() @ v).square().sum(), (x, w, v))
    part = slice(2 * rank, 2 * rank + 2)
    mine = [t.detach().clone().requires_grad_() for t in (x, w[:, part], v[part])]
    out = c.all_reduce((c.copy_to_ranks(mine[0]) @ mine[1]).tanh() @ mine[2], replicated=True)
    dx, dw, dv = torch.autograd.grad(out.square().sum(), mine)
    errors = [
        _close(dx, exact[0], "x"),
        _close(dw, exact[1][:, part], "w"),
        _close(dv, exact[2][part], "v"),
    ]
    return {"error": max(errors)}


@needs(more="gloo-3")
def case_only_one_rank_has_a_gradient():
    """A frozen or made-up input on the others does not keep them from taking part."""
    for who in range(hvd.size()):
        x = torch.ones(2 + hvd.rank(), 2, dtype=torch.float64, requires_grad=hvd.rank() == who)
        loss = (c.all_gather(x) * (1 + hvd.rank())).sum()
        loss.backward()
        if hvd.rank() == who:
            assert (x.grad == sum(range(1, hvd.size() + 1))).all(), x.grad
        else:
            assert x.grad is None


@needs(more="gloo-3")
def case_without_gradients():
    x = torch.full((hvd.rank(), 2), float(hvd.rank()))
    with torch.no_grad():
        out = c.all_gather(x.requires_grad_())
    assert not out.requires_grad
    assert len(out) == sum(range(hvd.size()))
    assert not c.all_gather(x.detach()).requires_grad
    assert c.all_reduce(torch.tensor(hvd.rank())).item() == sum(range(hvd.size()))


def case_dtypes():
    size, rank = hvd.size(), hvd.rank()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.full((rank + 1, 2), rank + 1.0, dtype=dtype, requires_grad=True)
        out = c.all_gather(x)
        assert out.dtype == dtype
        assert out[-1, 0].item() == size
        (c.all_reduce(torch.ones(2, dtype=dtype), name="ones") * out.sum()).sum().backward()
        assert x.grad.dtype == dtype
        assert (x.grad == 2 * size * size).all(), x.grad
        y = torch.full((2 * size,), 1.0 + rank, dtype=dtype, requires_grad=True)
        part = c.reduce_scatter(y)
        assert part.tolist() == [sum(range(1, size + 1))] * 2
        assert c.shift(y)[0].item() == 1.0 + (rank - 1) % size
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool):
        x = torch.ones(rank, 2).to(dtype)
        assert c.all_gather(x).dtype == dtype
        assert c.shift(x).shape == ((rank - 1) % size, 2)
        assert c.broadcast(torch.tensor([rank == 0]).to(dtype), 0).tolist() == [1]


@needs(more="gloo-3")
def case_strides_and_axes():
    """What is not contiguous, and more than two axes."""
    x = torch.arange(24.0, dtype=torch.float64).view(2, 3, 4).transpose(0, 2).requires_grad_()
    out = c.all_gather(x)
    assert out.shape == (4 * hvd.size(), 3, 2)
    out.transpose(0, 1).sum().backward()
    assert (x.grad == hvd.size()).all()


@needs(more="gloo-3")
def case_backward_twice():
    x = torch.ones(2 + hvd.rank(), 2, requires_grad=True)
    loss = (c.all_gather(x, name="one") ** 2).sum() + (c.all_gather(x, name="two") ** 2).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert (x.grad == 8 * hvd.size()).all(), x.grad


@needs(more="gloo-3")
def case_compiled():
    """A compiled function calls them between its graphs."""

    def f(x):
        y = c.all_gather(x * 2)
        return c.all_reduce((y**2).sum(), replicated=True) + c.scale_gradient(x, 2.0).sum()

    exact = torch.ones(2 + hvd.rank(), 2, requires_grad=True)
    f(exact).backward()
    x = exact.detach().clone().requires_grad_()
    torch.compile(f, backend="eager")(x).backward()
    _close(x.grad, exact.grad, "compiled")


def case_process_sets():
    """Ranks of a set count from 0; a rank may be in several sets, and in some of which others are not."""
    if hvd.size() < 3:
        sets = [hvd.add_process_set([hvd.size() - 1])]
    else:
        sets = [hvd.add_process_set([1, 2]), hvd.add_process_set([0, 2])]
    for group in sets:
        if not group.included():
            with pytest.raises(UsageError, match=f"rank {hvd.rank()} is not in the process set"):
                c.all_reduce(torch.ones(1), process_set=group)
            continue
        me, size = group.rank(), group.size()
        x = torch.full((me + 1, 2), 1.0 + me, dtype=torch.float64, requires_grad=True)
        (c.all_gather(x, process_set=group) * (1 + me)).sum().backward()
        assert (x.grad == sum(range(1, size + 1))).all()
        for root in range(size):
            y = torch.full((2,), 1.0 + me, dtype=torch.float64, requires_grad=True)
            out = c.broadcast(y, root, process_set=group)
            assert out.tolist() == [1.0 + root] * 2
            (out * (1 + me)).sum().backward()
            assert (y.grad == (sum(range(1, size + 1)) if me == root else 0)).all(), y.grad
        assert c.all_reduce(torch.ones(1), process_set=group).item() == size
        assert c.shift(y, process_set=group)[0].item() == 1.0 + (me - 1) % size
        assert c.group_of(group).size == size
    hvd.barrier()  # nobody removes what others still use
    for group in sets:
        hvd.remove_process_set(group)


@needs(more="gloo-3")
def case_errors():
    size = hvd.size()
    for call, kind, text in (
        (lambda: c.all_gather(torch.ones(())), ShapeError, "all_gather: x has no axis 0"),
        (lambda: c.shift(torch.ones(())), ShapeError, "shift: x has no axis 0"),
        (lambda: c.broadcast(torch.ones(1), size), ConfigError, f"root={size} is not a rank"),
        (lambda: c.reduce_scatter(torch.ones(size), sizes=[1] * (size + 1)), ShapeError, "sizes="),
        (lambda: c.reduce_scatter(torch.ones(size), sizes=[2] * size), ShapeError, f"together {size}"),
        (lambda: c.all_gather(torch.ones(2), sizes=[1] * size), ShapeError, "this rank's part"),
    ):
        with pytest.raises(kind, match=f"{text}.*rank {hvd.rank()}"):
            call()
