"""Horovod's names over torch.distributed: what they return, what they refuse; the order of exchanges."""

from __future__ import annotations

import gc
import os
import signal
import time

import pytest
import torch
from torch_support import before_case, generator

import hvdloss.torch as hvd
from hvdloss.errors import UsageError
from tests.ranks import needs

__all__ = ["before_case"]

NEEDS = needs("dist-2", more="dist-3")


def _parts(*shape, seed=3, dtype=torch.float64):
    """Return what each rank has, known to all."""
    g = generator(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(hvd.size())]


def case_reductions():
    parts = _parts(3, 2)
    mine, stacked, n = parts[hvd.rank()], torch.stack(parts), hvd.size()
    expected = {
        hvd.Sum: stacked.sum(0),
        hvd.Average: stacked.mean(0),
        hvd.Min: stacked.amin(0),
        hvd.Max: stacked.amax(0),
        hvd.Product: stacked.prod(0),
    }
    for op, value in expected.items():
        torch.testing.assert_close(hvd.allreduce(mine, op=op), value, rtol=1e-14, atol=1e-14)
    scaled = hvd.allreduce(mine, op=hvd.Sum, prescale_factor=0.5, postscale_factor=3.0)
    torch.testing.assert_close(scaled, 1.5 * expected[hvd.Sum], rtol=1e-14, atol=1e-14)
    before = mine.clone()
    turned = mine.clone().t()  # not contiguous
    assert hvd.allreduce_(turned, op=hvd.Sum) is turned
    torch.testing.assert_close(turned, expected[hvd.Sum].t(), rtol=1e-14, atol=1e-14)
    assert torch.equal(mine, before)
    whole = hvd.allreduce(torch.tensor([5, -5], dtype=torch.int16) * (hvd.rank() + 1), op=hvd.Sum)
    assert whole.dtype is torch.int16
    assert whole.tolist() == [5 * n * (n + 1) // 2, -5 * n * (n + 1) // 2]
    assert hvd.allreduce(torch.tensor(7)).item() == 7
    small = hvd.allreduce(mine.float(), op=hvd.Sum, compression=hvd.Compression.fp16)
    torch.testing.assert_close(small, expected[hvd.Sum].float(), rtol=1e-2, atol=1e-2)
    several = hvd.grouped_allreduce([mine, 2 * mine], op=hvd.Sum, name="g")
    torch.testing.assert_close(several[1], 2 * expected[hvd.Sum], rtol=1e-14, atol=1e-14)
    handle = hvd.grouped_allreduce_async([mine, mine], op=hvd.Sum)
    both = hvd.synchronize(handle)
    assert hvd.poll(handle)
    assert torch.equal(both[0], both[1])


def case_parts_of_any_size():
    rank, n = hvd.rank(), hvd.size()
    for dtype in (torch.float64, torch.bfloat16, torch.bool, torch.complex64, torch.int8):
        rows = torch.full((rank, 2), rank).to(dtype)  # rank 0 has none
        expected = torch.cat([torch.full((k, 2), k) for k in range(n)]).to(dtype)
        assert torch.equal(hvd.allgather(rows), expected), dtype
    assert hvd.allgather(torch.zeros(0, 3)).shape == (0, 3)
    assert hvd.allgather(torch.zeros(2, 0)).shape == (2 * n, 0)
    sent = [rank + k for k in range(n)]
    rows, received = hvd.alltoall(torch.arange(sum(sent)) + 100 * rank, splits=torch.tensor(sent))
    assert received.tolist() == [rank + k for k in range(n)]
    starts = [sum(k + j for j in range(rank)) for k in range(n)]
    pieces = [torch.arange(s, s + rank + k) + 100 * k for k, s in enumerate(starts)]
    assert torch.equal(rows, torch.cat(pieces))
    assert hvd.alltoall(torch.arange(n) + 10 * rank).tolist() == [10 * k + rank for k in range(n)]
    parts = _parts(2 * n + 1, 3)
    sizes = [3] + [2] * (n - 1)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    out = hvd.reducescatter(parts[rank], op=hvd.Sum)
    torch.testing.assert_close(out, torch.stack(parts).sum(0)[mine], rtol=1e-14, atol=1e-14)
    out = hvd.reducescatter(parts[rank], op=hvd.Max)
    assert torch.equal(out, torch.stack(parts).amax(0)[mine])


def case_from_one_rank_to_all():
    rank, n = hvd.rank(), hvd.size()
    assert hvd.broadcast(torch.full((2, 2), rank), root_rank=n - 1).tolist() == [[n - 1] * 2] * 2
    held = torch.full((2, 3), float(rank)).t()
    assert hvd.broadcast_(held, root_rank=0) is held
    assert not held.any()
    assert hvd.broadcast_object({"rank": rank, "of": "all"}, root_rank=1) == {"rank": 1, "of": "all"}
    assert hvd.allgather_object("x" * rank) == ["x" * k for k in range(n)]
    sparse = torch.sparse_coo_tensor([[0, rank]], [[1.0, 2.0], [3.0, 4.0]], (4, 2))
    ready = hvd.sparse_allreduce_async(sparse, name="s", op=hvd.Sum)
    total = ready().to_dense()
    expected = sum(
        torch.sparse_coo_tensor([[0, k]], [[1.0, 2.0], [3.0, 4.0]], (4, 2)).to_dense() for k in range(n)
    )
    assert torch.equal(total, expected)
    hvd.barrier()


def case_gradients_are_those_of_the_sum_of_losses():
    """Rank k's loss is (k + 1) times the sum of what it received; the gradient is that of all losses' sum."""
    rank, n = hvd.rank(), hvd.size()
    factor, every = rank + 1.0, n * (n + 1) / 2

    def gradient(function, rows):
        x = torch.ones(rows, 2, dtype=torch.float64, requires_grad=True)
        (factor * function(x)).sum().backward()
        return x.grad

    assert (gradient(lambda x: hvd.allreduce(x, op=hvd.Sum), 2) == every).all()
    torch.testing.assert_close(gradient(hvd.allreduce, 2), torch.full((2, 2), every / n).double())
    assert (gradient(hvd.allgather, rank + 1) == every).all()
    root = gradient(lambda x: hvd.broadcast(x, root_rank=1), 2)
    assert (root == (every if rank == 1 else 0.0)).all()
    assert (gradient(lambda x: hvd.reducescatter(x, op=hvd.Sum), n)[rank] == rank + 1).all()
    sent = gradient(lambda x: hvd.alltoall(x, splits=[1] * n)[0], n)
    assert sent[:, 0].tolist() == [k + 1.0 for k in range(n)]


def case_process_sets_are_groups():
    last = hvd.size() - 1
    pair = hvd.add_process_set([0, last]) if last > 1 else hvd.add_process_set([1])
    inside = hvd.rank() in pair.ranks
    assert pair.included() == inside
    if inside:
        assert pair.size() == len(pair.ranks)
        total = hvd.allreduce(torch.tensor([1.0 + hvd.rank()]), op=hvd.Sum, process_set=pair)
        assert total.item() == sum(1.0 + k for k in pair.ranks)
    else:
        with pytest.raises(UsageError, match="not in the process set"):
            hvd.allreduce(torch.ones(1), process_set=pair)
    assert hvd.remove_process_set(pair)
    assert not hvd.remove_process_set(pair)


def case_what_is_not_here_is_refused_by_name():
    for call, word in (
        (hvd.join, "hvd.uneven"),
        (lambda: hvd.start_timeline("x"), "torch.profiler"),
        (lambda: hvd.elastic.TorchState(), "--max-restarts"),
        (lambda: hvd.allreduce(torch.ones(1), op=hvd.Adasum), "op=Average"),
        (lambda: hvd.allgather(torch.tensor(1.0)), "give it an axis"),
    ):
        with pytest.raises(UsageError, match=word):
            call()


def case_different_exchanges_are_refused_on_every_rank():
    for tensor, name in ((torch.ones(2 + hvd.rank()), "a"), (torch.ones(2), f"b{hvd.rank()}")):
        with pytest.raises(UsageError, match=r"different exchanges: rank 1 has 'allreduce\."):
            hvd.allreduce(tensor, name=name)
    assert hvd.allreduce(torch.ones(2), op=hvd.Sum).tolist() == [hvd.size()] * 2


def case_two_optimizers_in_one_backward_pass():
    """One loss through two models; a rank without samples sends in the order in which it steps."""
    g = generator(5)
    models = [torch.nn.Linear(3, 1).double() for _ in range(2)]
    for p in (p for model in models for p in model.parameters()):
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
    begin = [[p.detach().clone() for p in model.parameters()] for model in models]
    objectives = [hvd.Objective("mse") for _ in models]
    optimizers = [
        hvd.DistributedOptimizer(
            torch.optim.SGD(m.parameters(), lr=0.1), m.named_parameters(), o, overlap=True
        )
        for m, o in zip(models, objectives, strict=True)
    ]
    x = [torch.randn(4, 3, generator=g, dtype=torch.float64) for _ in range(3 * hvd.size())]
    y = [one.sum(1, keepdim=True) for one in x]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        if step == 0 or hvd.rank() != hvd.size() - 1:
            here = x[3 * hvd.rank() + step], y[3 * hvd.rank() + step]
            losses = [o(m(here[0]), here[1]) for m, o in zip(models, objectives, strict=True)]
            sum(losses).backward()
        for optimizer in optimizers:
            optimizer.step()
    for model, parameters in zip(models, begin, strict=True):
        alone = torch.nn.Linear(3, 1).double()
        for p, value in zip(alone.parameters(), parameters, strict=True):
            p.data = value
        sgd = torch.optim.SGD(alone.parameters(), lr=0.1)
        for step in range(3):
            ranks = range(hvd.size() if step == 0 else hvd.size() - 1)
            sgd.zero_grad()
            a, b = (torch.cat([v[3 * k + step] for k in ranks]) for v in (x, y))
            torch.nn.functional.mse_loss(alone(a), b).backward()
            sgd.step()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def case_gradients_that_come_in_another_order_on_each_rank():
    """Buckets of one size, ready in another order on each rank, meet their own: they wait for their turn."""
    g = generator(11)
    layers = torch.nn.ModuleList(torch.nn.Linear(3, 3).double() for _ in range(4))
    for p in layers.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
    objective = hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(layers.parameters(), lr=0.0),
        layers.named_parameters(),
        objective,
        groups=[list(layer.parameters()) for layer in layers],
        overlap=True,
    )

    def output(rank, x):
        for place in range(3):
            x = torch.tanh(layers[(place + rank) % 3](x))
        return layers[3](x)

    for _ in range(3):
        x = [torch.randn(2 + k, 3, generator=g, dtype=torch.float64) for k in range(hvd.size())]
        optimizer.zero_grad()
        objective(output(hvd.rank(), x[hvd.rank()]), x[hvd.rank()]).backward()
        optimizer.step()
        squares = [((output(k, one) - one) ** 2).sum() for k, one in enumerate(x)]
        loss = sum(squares) / sum(one.numel() for one in x)
        expected = torch.autograd.grad(loss, list(layers.parameters()))
        for p, gradient in zip(layers.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-12, atol=1e-12)


def case_a_forked_process_may_collect_connections():
    """As a DataLoader's worker does, where a group that nobody uses is part of a cycle."""
    process_set = hvd.add_process_set(list(range(hvd.size())))
    hvd.allreduce(torch.ones(1), process_set=process_set)
    lanes = [process_set.lane() for _ in range(4)]
    for count, lane in enumerate(lanes):
        for _ in range(count + 1):
            hvd.allreduce(torch.ones(1), process_set=lane)
    gc.collect()
    gc.disable()
    try:
        lanes.append(lanes)
        del lanes, lane
        child = os.fork()
        if child == 0:
            gc.collect()
            os._exit(0)
    finally:
        gc.enable()
    for _ in range(600):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    hvd.remove_process_set(process_set)
    assert ended, "the forked process stood still"
    assert status == 0


def case_without_an_objective_gradients_are_averaged():
    """As with Horovod: the average of ranks' gradients, whatever each saw; one that a rank lacks is zero."""
    model = torch.nn.Linear(2, 1, bias=False).double()
    model.weight.data.fill_(1.0)
    other = torch.nn.Parameter(torch.zeros(3))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([*model.parameters(), other], lr=1.0), [("w", model.weight), ("o", other)]
    )
    x = torch.full((1, 2), float(hvd.rank() + 1), dtype=torch.float64)
    loss = model(x).sum() + (other.sum() if hvd.rank() == 0 else 0.0)
    loss.backward()
    optimizer.step()
    n = hvd.size()
    assert torch.allclose(model.weight, torch.full((1, 2), 1.0 - (n + 1) / 2, dtype=torch.float64))
    assert torch.allclose(other, torch.full((3,), -1.0 / n))
