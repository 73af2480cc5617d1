"""What every Horovod script calls first: ranks are made equal, whatever they hold; nothing else changes."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch_support import DEVICE, before_case, generator, here, raises_everywhere, same_on_all_ranks

import hvdloss.torch as hvd
from hvdloss.errors import AgreementError, ConfigError, RankError, UsageError
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3 mpi-2 dist-2")

__all__ = ["before_case"]


def last() -> int:
    return hvd.size() - 1


def mine(right: torch.Tensor, root: int) -> torch.Tensor:
    """Return the values on the root; elsewhere zeros of the same dtype and layout."""
    if hvd.rank() == root:
        return right
    other = copy.deepcopy(right)
    memory = other.untyped_storage()
    memory.copy_(torch.UntypedStorage(memory.nbytes(), device="cpu").fill_(0))
    return other


def bits(t: torch.Tensor) -> Any:
    return t.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).tolist()


def dtypes() -> list[torch.dtype]:
    """Return every dtype that a dense tensor can be made of here."""
    out = []
    for dtype in {d for d in vars(torch).values() if isinstance(d, torch.dtype)}:
        try:
            torch.zeros(2, dtype=torch.uint8).repeat(16).view(dtype)
            torch.zeros(2, dtype=dtype).clone()
        except (RuntimeError, TypeError, NotImplementedError):
            continue  # quantized, and those of less than a byte
        if "q" not in str(dtype):
            out.append(dtype)
    return sorted(out, key=str)


def case_parameters_of_every_dtype():
    found = dtypes()
    assert {torch.bool, torch.bfloat16, torch.complex64, torch.float8_e4m3fn, torch.uint16} <= set(found)
    for root in (0, last()):
        g = generator(5)
        whole = {
            str(dtype): torch.randint(0, 2 if dtype is torch.bool else 100, (96,), generator=g)
            .to(torch.uint8)
            .view(dtype)
            .to(DEVICE)
            for dtype in found
        }
        params = {name: mine(value.clone(), root) for name, value in whole.items()}
        hvd.broadcast_parameters(params, root_rank=root)
        for name, value in params.items():
            assert bits(value) == bits(whole[name]), name
    return {"dtypes": len(found)}


def layouts() -> dict[str, torch.Tensor]:
    base = torch.arange(120.0, device=DEVICE).reshape(2, 3, 4, 5)
    volume = torch.arange(240.0, device=DEVICE).reshape(2, 3, 4, 5, 2)
    return {
        "channels_last": base.to(memory_format=torch.channels_last),
        "channels_last_3d": volume.to(memory_format=torch.channels_last_3d),
        "transposed": torch.arange(6.0, device=DEVICE).reshape(2, 3).t(),
        "every second": torch.arange(10.0, device=DEVICE)[::2],
        "expanded": torch.arange(3.0, device=DEVICE).reshape(3, 1).expand(3, 4),
        "of no dimension": here(torch.tensor(7.0)),
        "expanded from one number": here(torch.tensor(7.0)).expand(2, 2),
        "empty": torch.empty(0, 3, device=DEVICE),
        "conjugate": torch.view_as_complex(torch.arange(8.0, device=DEVICE).reshape(4, 2)).conj(),
        "large": torch.arange(20e6, device=DEVICE),  # more than one message holds
    }


def case_parameters_of_every_layout():
    for root in (0, last()):
        whole = layouts()
        params = {name: mine(value, root) for name, value in layouts().items()}
        strides = {name: value.stride() for name, value in params.items()}
        hvd.broadcast_parameters(params, root_rank=root)
        for name, value in params.items():
            assert torch.equal(value, whole[name]), name
            assert value.stride() == strides[name], name


def case_parameters_that_share_memory_and_all_ways_to_name_them():
    for root in (0, last()):
        torch.manual_seed(hvd.rank())
        model = torch.nn.Sequential(
            torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False), torch.nn.BatchNorm1d(5)
        ).to(DEVICE)
        if hvd.size() > 1:  # tied on one rank only: two models
            if hvd.rank() == 0:
                model[1].weight = model[0].weight
            own = model.state_dict()
            raises_everywhere(AgreementError, lambda own=own: hvd.broadcast_parameters(own, 0), "1.weight")
        model[1].weight = model[0].weight
        hvd.broadcast_parameters(model.state_dict(), root)
        for value in model.state_dict().values():
            same_on_all_ranks(value.tolist())
        for way in (
            list(model.parameters()),
            model.parameters(),
            model.named_buffers(),
            list(model.named_buffers()),
        ):
            hvd.broadcast_parameters(way, root)
        requires = [p.requires_grad for p in model.parameters()]
        assert all(requires), requires


def case_parameters_that_differ_are_named():
    def broadcast(tensors: dict[str, Any]) -> Any:
        return lambda: hvd.broadcast_parameters(tensors, 0)

    on = hvd.rank() == last()
    same = {"0.weight": here(torch.full((3,), float(hvd.rank())))}
    for other, words in (
        ({"1.bias": torch.zeros(2 + on)}, ("1.bias", "[3]", "[2]")),
        ({"1.bias": torch.zeros(2, dtype=torch.float64 if on else torch.float32)}, ("1.bias", "float64")),
        ({"1.other" if on else "1.bias": torch.zeros(2)}, ("1.other", "1.bias")),
        ({} if on else {"1.bias": torch.zeros(2)}, ("1.bias", "nothing")),
        ({"1.bias": torch.zeros(()).expand(2) if on else torch.zeros(2)}, ("1.bias",)),
    ):
        raises_everywhere(AgreementError, broadcast({**same, **other}), f"rank {last()}", *words)
    sparse = {**same, "1.sparse": torch.eye(2).to_sparse()}
    raises_everywhere(ConfigError, broadcast(sparse), "1.sparse", "sparse_coo")
    raises_everywhere(RankError, broadcast(sparse if on else same), "1.sparse", f"rank {last()}")
    raises_everywhere(ConfigError, broadcast({"1.extra": {"a": 1}}), "1.extra", "dict")
    raises_everywhere(
        ConfigError, broadcast(torch.nn.LazyLinear(2).state_dict(keep_vars=True)), "bias", "batch"
    )
    raises_everywhere(
        ConfigError, lambda: hvd.broadcast_parameters(same, hvd.size()), f"root_rank={hvd.size()}"
    )
    raises_everywhere(AgreementError, lambda: hvd.broadcast_parameters(same, int(on)), "root_rank")
    assert same["0.weight"].tolist() == [hvd.rank()] * 3  # nothing has changed


def case_a_fresh_optimizer_takes_no_step():
    v = torch.nn.Parameter(torch.ones(1, dtype=torch.float64, device=DEVICE))
    objective = hvd.Objective("mse")
    plain = torch.optim.AdamW([v], lr=0.1 * (1 + hvd.rank()), weight_decay=0.3)
    optimizer = hvd.DistributedOptimizer(plain, [("v", v)], objective)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert v.tolist() == [1.0]
    assert v.grad is None
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"] == 0.1
    optimizer.zero_grad()
    objective(
        v * torch.ones(1, dtype=torch.float64, device=DEVICE), here(torch.full((1,), 4.0 * hvd.rank()))
    ).backward()
    optimizer.step()
    # Adam's first step is lr times the sign of the gradient.
    gradient = 2 * (1 - 4 * (hvd.size() - 1) / 2)
    right = 1 - 0.1 * 0.3 - 0.1 * math.copysign(1, gradient)
    assert abs(v.item() - right) < 1e-6, (v.item(), right)
    return {"error of AdamW's first step": abs(v.item() - right)}


def listed(tree: Any) -> Any:
    """Return a state with lists for its tensors."""
    if isinstance(tree, torch.Tensor):
        return [str(tree.dtype), tree.tolist()]
    if isinstance(tree, dict):
        return {key: listed(value) for key, value in tree.items()}
    return type(tree)(map(listed, tree)) if isinstance(tree, list | tuple) else tree


OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=torch.tensor(0.1), betas=(0.8, 0.9), amsgrad=True),
    "AdamW, fused": lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.1, centered=True),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1),
    "Adadelta": torch.optim.Adadelta,
    "Rprop": torch.optim.Rprop,
    "NAdam": torch.optim.NAdam,
    "LBFGS": lambda ps: torch.optim.LBFGS(ps, lr=0.1, max_iter=3),
    "Adafactor": torch.optim.Adafactor,
}


def case_the_state_of_every_optimizer_becomes_the_roots():
    for name, make in OPTIMIZERS.items():
        for root in (0, last()):
            torch.manual_seed(3)
            model = torch.nn.Linear(3, 2).to(DEVICE)
            optimizer = make(model.parameters())
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            groups = optimizer.param_groups[0]
            x = torch.ones(4, 3, device=DEVICE) + hvd.rank()

            def closure(model=model, optimizer=optimizer, x=x):
                optimizer.zero_grad()
                loss = model(x).square().sum()
                loss.backward()
                return loss

            for _ in range(2 + hvd.rank()):  # other states, and other numbers of steps
                optimizer.step(closure)
                scheduler.step()
            if name == "SGD" and hvd.rank() != root:
                optimizer.state.clear()  # a checkpoint on the root alone
            before = [p.detach().clone() for p in model.parameters()]
            own = listed(optimizer.state_dict()) if hvd.rank() == root else None
            hvd.broadcast_optimizer_state(optimizer, root_rank=root)
            told = listed(optimizer.state_dict())
            same_on_all_ranks(told)
            assert own is None or own == told, name
            assert optimizer.param_groups[0] is groups
            for p, value in zip(model.parameters(), before, strict=True):
                assert torch.equal(p, value), name
            optimizer.step(closure)  # goes on


def case_a_state_of_another_dtype_than_its_parameter_stays():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16, device=DEVICE))
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.state[p] = {
        "master": torch.full((3,), 1.0 + 2.0**-20 * hvd.rank(), device=DEVICE),
        "step": torch.tensor(float(hvd.rank())),
        "more": [{"a": (1, None, "x", float("inf"))}, hvd.rank()],
    }
    hvd.broadcast_optimizer_state(optimizer, root_rank=last())
    state = optimizer.state[p]
    assert state["master"].dtype is torch.float32
    assert state["master"].tolist() == [1.0 + 2.0**-20 * last()] * 3
    assert state["more"] == [{"a": (1, None, "x", float("inf"))}, last()]
    assert state["step"].device.type == "cpu"
    optimizer.state[p]["odd"] = object()
    raises_everywhere(
        RankError, lambda: hvd.broadcast_optimizer_state(optimizer, 0), "odd", "object", "rank 0"
    )


def case_optimizers_that_differ_are_named():
    ps = [torch.nn.Parameter(torch.zeros(2 + (i == 1 and hvd.rank() == last()))) for i in range(2)]
    optimizer = torch.optim.SGD(ps, lr=0.1 + hvd.rank())
    raises_everywhere(
        AgreementError,
        lambda: hvd.broadcast_optimizer_state(optimizer, 0),
        "param_groups[0]['params'][1]",
        f"rank {last()}",
    )
    assert optimizer.param_groups[0]["lr"] == 0.1 + hvd.rank()


def case_objects_of_other_types_on_ranks():
    own: Any = {"a": [1, 2], "f": 1.5} if hvd.rank() == 0 else None
    for root, right in ((0, {"a": [1, 2], "f": 1.5}), (last(), None)):
        for _ in range(2):
            assert hvd.broadcast_object(own, root_rank=root) == right
    everyone = [1, "two", [3.0], None][: hvd.size()]
    for _ in range(2):
        assert hvd.allgather_object(everyone[hvd.rank()]) == everyone
    assert hvd.broadcast_object(str(hvd.rank()), 0, name="mine") == "0"


def case_within_a_process_set():
    odd = hvd.add_process_set([last()])
    both = hvd.add_process_set([0, last()]) if hvd.size() > 2 else hvd.global_process_set
    try:
        if odd.included():
            model = {"w": torch.ones(2)}
            hvd.broadcast_parameters(model, last(), process_set=odd)
            assert hvd.broadcast_object(model, last(), process_set=odd) is model
        if both.included():
            p = torch.nn.Parameter(torch.zeros(2))
            optimizer = torch.optim.SGD([p], lr=float(hvd.rank()))
            hvd.broadcast_optimizer_state(optimizer, last(), process_set=both)
            assert optimizer.param_groups[0]["lr"] == last()
            model = {"w": torch.full((2,), float(hvd.rank()), dtype=torch.bfloat16)}
            hvd.broadcast_parameters(model, last(), process_set=both)
            assert model["w"].tolist() == [last()] * 2
            got = hvd.broadcast_object(None if hvd.rank() == last() else 1, last(), process_set=both)
            assert got is None
    finally:
        hvd.remove_process_set(odd)
        if hvd.size() > 2:
            hvd.remove_process_set(both)


def _mine(cut: int, rows: int) -> slice:
    """Return which rows are this rank's: up to `cut` the first one's, the others the second one's."""
    cut = rows if hvd.size() == 1 else cut
    return [slice(0, cut), slice(cut, rows), *[slice(0, 0)] * hvd.size()][hvd.rank()]


def case_synchronized_batch_normalization_is_one_processs():
    g = generator(41)
    worst = 0.0
    for shape, momentum, tracked in (
        ((9, 3), 0.1, True),
        ((9, 3, 4), None, True),
        ((9, 3, 2, 2), 0.1, False),
    ):
        options = {"momentum": momentum, "track_running_stats": tracked}
        kinds = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}
        alone = kinds[len(shape)](3, **options).double().to(DEVICE)
        layer = hvd.SyncBatchNorm(3, **options).double().to(DEVICE)
        layer.load_state_dict(alone.state_dict())
        for cut in (4, 0):  # the last ranks have no samples
            x = here(
                torch.randn(shape, generator=g, dtype=torch.float64)
                + torch.arange(9.0).view(-1, *[1] * (len(shape) - 1))
            )
            price = here(torch.randn(shape, generator=g, dtype=torch.float64))
            mine = _mine(cut, 9)
            part, whole = x[mine].clone().requires_grad_(), x.clone().requires_grad_()
            out, right = layer(part), alone(whole)
            (price[mine] * out.tanh()).sum().backward()
            (price * right.tanh()).sum().backward()
            pairs = [(out, right[mine]), (part.grad, whole.grad[mine])]
            for ours, theirs in zip(layer.parameters(), alone.parameters(), strict=True):
                pairs.append((hvd.allreduce(ours.grad, op=hvd.Sum, name=f"sum.{len(pairs)}"), theirs.grad))
                ours.grad = theirs.grad = None
            pairs += zip(layer.buffers(), alone.buffers(), strict=True)
            worst = max(worst, *(float((a - b).abs().max()) for a, b in pairs if a.numel()))
            assert worst < 1e-12, (shape, cut, worst)
        layer.eval(), alone.eval()
        if tracked:
            assert torch.allclose(layer(x), alone(x), rtol=1e-12)
    if hvd.size() > 1 and str(DEVICE) == "cpu":
        theirs = torch.nn.SyncBatchNorm.convert_sync_batchnorm(torch.nn.BatchNorm1d(3))
        raises_everywhere(ConfigError, lambda: theirs(torch.ones(2, 3)), "hvd.SyncBatchNorm")
        assert theirs.eval()(torch.ones(2, 3)).shape == (2, 3)
    half = hvd.SyncBatchNorm(3).to(DEVICE, torch.bfloat16)
    assert half(x.to(torch.bfloat16)).dtype == torch.bfloat16
    one = torch.zeros(int(hvd.rank() == 0), 3, device=DEVICE)
    raises_everywhere(
        ValueError, lambda: hvd.SyncBatchNorm(3)(one), *(["no variance"] if hvd.size() > 1 else [])
    )
    # With an objective, whose gradient is that of all ranks' samples, however much each weighs.
    torch.manual_seed(5)
    layers = torch.nn.Linear(3, 4), hvd.SyncBatchNorm(4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    model = torch.nn.Sequential(*layers).double().to(DEVICE)
    alone = copy.deepcopy(model)
    alone[1] = torch.nn.BatchNorm1d(4).double().to(DEVICE)
    x = here(torch.randn(7, 3, generator=g, dtype=torch.float64) * torch.arange(1.0, 8.0).view(-1, 1))
    y, w = (here(torch.rand(7, 1, generator=g, dtype=torch.float64)) for _ in range(2))
    objective = hvd.Objective("mse")
    plain = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = hvd.DistributedOptimizer(plain, model.named_parameters(), objective)
    for cut in (5, 2, 0):
        mine = _mine(cut, 7)
        optimizer.zero_grad()
        alone.zero_grad()
        (objective(model(x[mine]), y[mine], w[mine]) + 0.1 * (model[0].weight ** 2).sum()).backward()
        optimizer.step()
        ((w * (alone(x) - y) ** 2).sum() / w.sum() + 0.1 * (alone[0].weight ** 2).sum()).backward()
        for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            worst = max(worst, float((ours.grad - theirs.grad).abs().max()))
        assert worst < 1e-12, (cut, worst)
    if hvd.size() > 1:
        w[_mine(5, 7)] *= hvd.rank() != 0
        optimizer.zero_grad()
        loss = objective(model(x[_mine(5, 7)]), y[_mine(5, 7)], w[_mine(5, 7)])
        raises_everywhere(UsageError, loss.backward, "SyncBatchNorm", "weight")
    return {"error": worst}
