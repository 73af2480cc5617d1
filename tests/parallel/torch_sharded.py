"""A head split over ranks by class: loss, layer, checkpoints, two by two ranks; against one process."""

from __future__ import annotations

import copy
import math
import unittest
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch_support import DEVICE, difference, flat, gathered, here, raises_everywhere, same_on_all_ranks

import hvdloss.torch as hvd
from hvdloss.errors import AgreementError, ConfigError, ShapeError
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3 dist-2")

EXACT = 1e-11
PIECES = ("losses", "logits", "input", "weight", "bias")


def random_sizes(rng: np.random.Generator, classes: int, ranks: int) -> list[int]:
    """Return random sizes of at least 1."""
    cuts = np.sort(rng.choice(np.arange(1, classes), ranks - 1, replace=False))
    return np.diff([0, *cuts, classes]).tolist()


def margin_by_hand(cosine: torch.Tensor, target: torch.Tensor, margin: Any) -> torch.Tensor:
    """Return cosines with the target's made harder, written from the papers."""
    hit = F.one_hot(target.clamp(min=0), cosine.shape[-1]).bool()
    if isinstance(margin, hvd.CosFace):
        harder = cosine - margin.margin
    else:
        theta = torch.acos(cosine)
        m = margin.margin
        harder = torch.where(theta + m < math.pi, torch.cos(theta + m), cosine - m * math.sin(m))
    return torch.where(hit, harder, cosine)


def one_process(logits, target, margin, scale, smoothing):
    """Return per-element losses of the whole logits."""
    if margin is not None:
        logits = margin_by_hand(logits, target, margin)
    flat_logits = (logits * scale).flatten(0, -2)
    losses = F.cross_entropy(flat_logits, target.flatten(), reduction="none", label_smoothing=smoothing)
    return losses.view(target.shape)


def own(shards: hvd.ClassShards) -> slice:
    mine = shards.range(hvd.rank())
    return slice(mine.start, mine.stop)


def random_case(rng: np.random.Generator) -> dict[str, Any]:
    """Draw a head, a batch and a loss; the same on all ranks."""
    classes, width = int(rng.integers(hvd.size(), 14)), int(rng.integers(2, 6))
    lead = [(int(rng.integers(0, 6)),), (2, int(rng.integers(1, 4)))][int(rng.integers(4) == 0)]
    normalize = bool(rng.integers(2))
    margins = [None, hvd.CosFace(float(rng.uniform(0, 0.5))), hvd.ArcFace(float(rng.uniform(0, 0.8)))]
    target = rng.integers(0, classes, lead)
    target[rng.uniform(size=lead) < 0.2] = -100
    return {
        "sizes": random_sizes(rng, classes, hvd.size()) if rng.integers(2) else None,
        "classes": classes,
        "width": width,
        "normalize": normalize,
        "bias": bool(rng.integers(2)) and not normalize,
        "margin": margins[int(rng.integers(3))] if normalize else None,
        "scale": float(rng.choice([1.0, 8.0])),
        "smoothing": float(rng.choice([0.0, 0.1])),
        "x": here(rng.normal(size=(*lead, width))),
        "target": here(target),
        "upstream": here(rng.normal(size=lead)),
        "seed": int(rng.integers(10**6)),
    }


def whole_head(case: dict[str, Any]) -> torch.nn.Linear:
    torch.manual_seed(case["seed"])
    head = torch.nn.Linear(case["width"], case["classes"], bias=case["bias"], dtype=torch.float64)
    return head.to(DEVICE)


def sharded_head(case: dict[str, Any]) -> hvd.ShardedLinear:
    torch.manual_seed(case["seed"])
    return hvd.ShardedLinear(
        case["width"],
        case["classes"],
        bias=case["bias"],
        sizes=case["sizes"],
        normalize=case["normalize"],
        device=DEVICE,
        dtype=torch.float64,
    )


def whole_logits(case: dict[str, Any], head: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    if case["normalize"]:
        return F.linear(F.normalize(x, dim=-1), F.normalize(head.weight, dim=-1))
    return head(x)


def refused(kind: type[Exception], call: Callable[[], Any], *words: str) -> None:
    """Assert that `call` raises on this rank, with these words."""
    try:
        call()
    except kind as error:
        text = str(error)
    else:
        text = "nothing was raised"
    assert all(word in text for word in words), text


def near(mine: torch.Tensor, right: torch.Tensor, what: str) -> float:
    """Assert that tensors are equal up to rounding."""
    assert mine.shape == right.shape, (what, mine.shape, right.shape)
    scale = right.abs().max().item() if right.numel() else 1.0
    error = (mine - right).abs().max().item() / max(scale, 1e-3) if right.numel() else 0.0
    assert error <= EXACT, f"{what}: {error:.3g}"
    return error


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_random_shards_equal_one_process():
    rng = np.random.default_rng(3)
    worst = dict.fromkeys(PIECES, 0.0)
    for number in range(60):
        case = random_case(rng)
        one, head = whole_head(case), sharded_head(case)
        shards = head.shards
        assert torch.equal(one.weight[own(shards)], head.weight)
        x = case["x"].clone().requires_grad_()
        logits = head(x)
        logits.retain_grad()
        losses = hvd.sharded_cross_entropy(
            logits,
            case["target"],
            shards,
            label_smoothing=case["smoothing"],
            margin=case["margin"],
            scale=case["scale"],
        )
        (losses * case["upstream"]).sum().backward()

        right_x = case["x"].clone().requires_grad_()
        whole = whole_logits(case, one, right_x)
        whole.retain_grad()
        right = one_process(whole, case["target"], case["margin"], case["scale"], case["smoothing"])
        (right * case["upstream"]).sum().backward()
        pairs = {
            "losses": (losses, right),
            "logits": (logits.grad, whole.grad[..., own(shards)]),
            "input": (x.grad, right_x.grad),
            "weight": (head.weight.grad, one.weight.grad[own(shards)]),
        }
        if case["bias"]:
            pairs["bias"] = (head.bias.grad, one.bias.grad[own(shards)])
        for what, (mine, theirs) in pairs.items():
            worst[what] = max(worst[what], near(mine.detach(), theirs.detach(), f"case {number}, {what}"))
        same_on_all_ranks(losses.tolist())
        same_on_all_ranks(x.grad.tolist())
    return {f"error of {what}": value for what, value in worst.items()}


def case_extreme_logits():
    inf = math.inf
    rows = torch.tensor(
        [
            [1e300, 0.0, -1e300, 5.0, 2.0],
            [-inf, 0.0, 1.0, -inf, 2.0],
            [800.0, 801.0, -inf, 799.0, 800.5],
            [-inf, -inf, -inf, 3.0, -inf],
            [-1e5, -1e5 - 1, -1e5 - 2, -1e5, -1e5],
            [0.0, -inf, 1.0, 2.0, 3.0],
        ],
        dtype=torch.float64,
        device=DEVICE,
    )
    target = torch.tensor([0, 2, 1, 3, 4, 1], device=DEVICE)
    shards = hvd.ClassShards(5, hvd.size())
    whole = rows.clone().requires_grad_()
    right = F.cross_entropy(whole, target, reduction="none")
    right.sum().backward()
    mine = rows[:, own(shards)].clone().requires_grad_()
    losses = hvd.sharded_cross_entropy(mine, target, shards)
    losses.sum().backward()
    assert torch.equal(right.isinf(), losses.isinf()), losses
    finite = right.isfinite()
    error = near(losses[finite].detach(), right[finite].detach(), "losses")
    return {"error": max(error, near(mine.grad, whole.grad[:, own(shards)], "gradient"))}


@needs("gloo-2", more="gloo-3 mpi-2 dist-2")
def case_half_precision_is_computed_in_float32():
    g = torch.Generator().manual_seed(1)
    shards = hvd.ClassShards(11, hvd.size())
    whole = here(torch.randn(7, 11, generator=g)) * 20
    target = here(torch.randint(11, (7,), generator=g))
    errors = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        logits = whole.to(dtype)
        mine = logits[:, own(shards)].clone().requires_grad_()
        losses = hvd.sharded_cross_entropy(mine, target, shards)
        assert losses.dtype == torch.float32
        losses.sum().backward()
        assert mine.grad.dtype == dtype
        exact = logits.double().requires_grad_()
        right = F.cross_entropy(exact, target, reduction="none")
        right.sum().backward()
        errors.append(difference(losses.double(), right))
        assert errors[-1] < 1e-6, errors
        ulp = torch.finfo(dtype).eps
        assert (mine.grad.double() - exact.grad[:, own(shards)]).abs().max() <= max(ulp, 1e-6)
    return {"error, float32": max(errors)}


def case_absent_elements_leave_no_trace():
    shards = hvd.ClassShards(6, hvd.size())
    g = torch.Generator().manual_seed(2)
    whole = here(torch.randn(5, 6, generator=g, dtype=torch.float64))
    whole[1] = math.nan
    whole[3, 2] = math.inf
    target = here([4, -100, 0, -100, 5])
    mine = whole[:, own(shards)].clone().requires_grad_()
    losses = hvd.sharded_cross_entropy(mine, target, shards)
    losses.sum().backward()
    assert losses[[1, 3]].eq(0).all()
    assert mine.grad[[1, 3]].eq(0).all()
    assert mine.grad.isfinite().all()
    nobody = hvd.sharded_cross_entropy(mine[:0], target[:0], shards)
    assert nobody.shape == (0,)


def case_weights_and_absent_elements_through_an_objective():
    shards = hvd.ClassShards(7, hvd.size(), random_sizes(np.random.default_rng(1), 7, hvd.size()))
    g = torch.Generator().manual_seed(5)
    whole = here(torch.randn(6, 7, generator=g, dtype=torch.float64))
    target = here([4, -100, 0, 6, 5, 1])
    weight = here([1.0, 2.0, 0.0, 0.5, 3.0, 1.0]).double()
    loss = hvd.ShardedCrossEntropy(shards, label_smoothing=0.1)
    # The ranks share a model, so this rank alone is its data group: the objective needs no others.
    worst = 0.0
    for given in (None, weight):
        mine = whole[:, own(shards)].clone().requires_grad_()
        value = hvd.Objective(loss)(mine, target, given)
        value.backward()
        exact = whole.clone().requires_grad_()
        counted = target != -100
        w = (torch.ones(6, dtype=torch.float64, device=DEVICE) if given is None else given) * counted
        losses = F.cross_entropy(exact, target, reduction="none", label_smoothing=0.1)
        right = (w * losses).sum() / w.sum()
        right.backward()
        worst = max(
            worst,
            near(value.detach(), right.detach(), "value"),
            near(mine.grad, exact.grad[:, own(shards)], "gradient"),
        )
    return {"error": worst}


def case_a_second_backward_pass():
    shards = hvd.ClassShards(4, hvd.size())
    logits = here(torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    mine = logits[:, own(shards)].clone().requires_grad_()
    losses = hvd.sharded_cross_entropy(mine, here([0, 3, 1]), shards)
    losses.sum().backward(retain_graph=True)
    first = mine.grad.clone()
    mine.grad = None
    losses.sum().backward()
    assert torch.equal(first, mine.grad)
    mine.grad = None
    losses = hvd.sharded_cross_entropy(mine, here([0, 3, 1]), shards)
    refused(ConfigError, lambda: torch.autograd.grad(losses.sum(), mine, create_graph=True), "create_graph")


def case_sampled_columns():
    rng = np.random.default_rng(11)
    worst = 0.0
    for number in range(30):
        case = random_case(rng) | {"normalize": bool(number % 2)}
        case["bias"] = case["bias"] and not case["normalize"]
        case["margin"] = case["margin"] if case["normalize"] else None
        one, head = whole_head(case), sharded_head(case)
        target = case["target"]
        columns = head.sample(target, float(rng.uniform(0.01, 1)), seed=number)
        everyone = [here(eval(text)) for text in gathered(repr(columns.tolist()))]
        union = torch.cat([c + head.shards.offset(r) for r, c in enumerate(everyone)])
        present = target[target >= 0]
        assert torch.isin(present, union).all()
        assert all(len(c) >= 1 and bool((c.diff() > 0).all()) for c in everyone)

        x = case["x"].clone().requires_grad_()
        options = {"margin": case["margin"], "scale": case["scale"], "label_smoothing": case["smoothing"]}
        losses = hvd.sharded_cross_entropy(
            head(x, columns=columns), target, head.shards, columns=columns, **options
        )
        (losses * case["upstream"]).sum().backward()
        right_x = case["x"].clone().requires_grad_()
        among = torch.full((case["classes"],), -100, device=DEVICE)
        among[union] = torch.arange(len(union), device=DEVICE)
        renamed = torch.where(target >= 0, among[target.clamp(min=0)], -100)
        whole = whole_logits(case, one, right_x)[..., union]
        right = one_process(whole, renamed, case["margin"], case["scale"], case["smoothing"])
        (right * case["upstream"]).sum().backward()
        worst = max(
            worst,
            near(losses.detach(), right.detach(), "losses"),
            near(x.grad, right_x.grad, "input"),
            near(head.weight.grad, one.weight.grad[own(head.shards)], "weight"),
        )
    return {"error": worst}


def case_sampling_takes_its_share():
    torch.manual_seed(0)
    head = hvd.ShardedLinear(3, 400, bias=False)
    target = torch.arange(0, 400, 40)
    again = [head.sample(target, 0.25, seed=3) for _ in range(2)]
    assert torch.equal(*again)
    assert len(again[0]) == math.ceil(0.25 * head.weight.shape[0])
    others = [head.sample(target, 0.25) for _ in range(2)]
    assert not torch.equal(*others)
    assert len(head.sample(torch.arange(400), 0.1)) == head.weight.shape[0]
    by_generator = [head.sample(target, 0.25, torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*by_generator)
    raises_everywhere(ConfigError, lambda: head.sample(target, 0.0), "rate=0.0")


def case_mistakes_are_told_on_all_ranks():
    rank, size = hvd.rank(), hvd.size()
    if size == 1:
        raise unittest.SkipTest("nobody to disagree with")
    shards = hvd.ClassShards(6, size)
    logits = torch.zeros(4, shards.size(rank))
    target = torch.tensor([0, 5, 2, 1])
    last = size - 1

    def loss(y: Any = target, z: Any = logits, **options: Any) -> Any:
        return lambda: hvd.sharded_cross_entropy(z, y, shards, **options)

    out = raises_everywhere(ConfigError, loss(torch.tensor([0, 6, 2, -3])), "2 target(s) on rank 0", "is 6")
    assert "0 to 5" in out
    mine = target.clone()
    mine[2] += rank == last
    raises_everywhere(AgreementError, loss(mine), "different targets")
    mine[2] = 77 if rank == last else 2
    raises_everywhere(ConfigError, loss(mine), f"1 target(s) on rank {last}", "is 77")
    n = 4 + (rank == last)
    raises_everywhere(
        ShapeError, loss(torch.zeros(n).long(), torch.zeros(n, shards.size(rank))), f"rank {last}: 5"
    )
    smoothing = 0.1 * (rank == last)
    raises_everywhere(AgreementError, loss(label_smoothing=smoothing), "different arguments")
    columns = torch.tensor([0])
    raises_everywhere(ShapeError, loss(z=logits[:, :1], columns=columns), "lack the class")
    # What needs no others is raised before any message.
    for wrong, word in (
        (loss(target.double()), "float64"),
        (loss(target[:3]), "does not fit"),
        (loss(z=torch.zeros(4, 9)), "last axis"),
        (loss(label_smoothing=1.5), "from 0 to 1"),
        (loss(scale=0.0), "above 0"),
        (loss(columns=torch.tensor([], dtype=torch.int64)), "empty"),
    ):
        refused(ConfigError, wrong, word)
    refused(ShapeError, lambda: hvd.sharded_cross_entropy(logits, target, hvd.ClassShards(6, 1)), "set has")
    assert loss()().shape == (4,)  # and the next call works


def case_initial_weights_for_any_shards():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for classes, width, bias in ((40, 7, True), (5, 3, False), (1030, 1100, True)):
            torch.manual_seed(9)
            one = torch.nn.Linear(width, classes, bias=bias, dtype=dtype)
            after = torch.rand(3)
            sizes = random_sizes(np.random.default_rng(classes), classes, hvd.size())
            for given in (None, sizes):
                torch.manual_seed(9)
                head = hvd.ShardedLinear(width, classes, bias=bias, sizes=given, dtype=dtype)
                assert torch.equal(torch.rand(3), after)
                assert torch.equal(head.weight, one.weight[own(head.shards)])
                assert bias == (head.bias is not None)
                if bias:
                    assert torch.equal(head.bias, one.bias[own(head.shards)])


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_checkpoints_for_any_shards():
    rng = np.random.default_rng(4)
    torch.manual_seed(1)
    ordinary = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 11))

    def split(sizes: Any) -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Linear(5, 4), torch.nn.ReLU(), hvd.ShardedLinear(4, 11, sizes=sizes)
        )

    saved = ordinary.state_dict()
    for sizes in (None, random_sizes(rng, 11, hvd.size())):
        model = split(sizes)
        model.load_state_dict(saved)
        assert torch.equal(model[2].weight, ordinary[2].weight[own(model[2].shards)])
        back = hvd.full_state_dict(model, everywhere=True)
        assert list(back) == list(saved)
        assert all(torch.equal(back[key], saved[key]) for key in saved)
        first = hvd.full_state_dict(model)
        assert ("2.weight" in first) == (hvd.rank() == 0)
        if hvd.rank() == 0:
            torch.nn.Sequential(*copy.deepcopy(list(ordinary))).load_state_dict(first)
        other = split(random_sizes(rng, 11, hvd.size()))  # another split of the same
        other.load_state_dict(back, assign=True)
        assert torch.equal(other[2].bias, ordinary[2].bias[own(other[2].shards)])
        assert other[2].weight.untyped_storage().nbytes() == other[2].weight.numel() * 4
        model.load_state_dict(copy.deepcopy(model).state_dict())  # its own shard
    if hvd.size() > 1:
        wrong = {**saved, "2.weight": torch.zeros(12, 4)}
        refused(ShapeError, lambda: model.load_state_dict(wrong), "(12, 4)", "(11, 4)")


@needs("gloo-2", more="gloo-3 mpi-2 dist-2")
def case_large_weights_travel_in_pieces():
    import hvdloss.split.parts as module

    was, module._CHUNK = module._CHUNK, 64
    try:
        torch.manual_seed(2)
        one = torch.nn.Linear(9, 101)
        torch.manual_seed(2)
        head = hvd.ShardedLinear(9, 101, sizes=random_sizes(np.random.default_rng(8), 101, hvd.size()))
        assert torch.equal(head.weight, one.weight[own(head.shards)])
        back = hvd.full_state_dict(head, everywhere=True)
        assert torch.equal(back["weight"], one.weight)
        assert torch.equal(back["bias"], one.bias)
    finally:
        module._CHUNK = was


@needs("gloo-2", more="gloo-3 gloo-4 dist-2")
def case_a_grid_trains_like_one_process():
    """Two model groups where there are four ranks; else all share one model, or none do."""
    size = hvd.size()
    for model in {2: (1, 2), 3: (1, 3), 4: (1, 2, 4)}.get(size, (1,)):
        groups = hvd.grid(model)
        again = hvd.grid(model)
        assert groups.model is again.model
        assert groups.data is again.data
        ranks = size // model
        rng = np.random.default_rng(17)
        classes, steps = 9, 4
        sizes = random_sizes(rng, classes, model) if model > 1 else None

        def network(head: torch.nn.Module) -> torch.nn.Module:
            return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), head).double().to(DEVICE)

        torch.manual_seed(23)
        one = network(torch.nn.Linear(5, classes))
        torch.manual_seed(23)
        split = network(hvd.ShardedLinear(5, classes, process_set=groups.model, sizes=sizes))
        head = split[2]
        mine = head.shards.range(head.rank)
        rows = slice(mine.start, mine.stop)

        objective = hvd.Objective(hvd.ShardedCrossEntropy(head.shards, process_set=groups.model))
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(split.parameters(), lr=0.3, momentum=0.9),
            split.named_parameters(),
            objective,
            process_set=groups.data,
            backward_passes_per_step=2,
            check_every=2,
        )
        plain = torch.optim.SGD(one.parameters(), lr=0.3, momentum=0.9)
        worst = 0.0
        for _ in range(steps):
            counts = rng.integers(1, 6, (ranks, 2))  # of each data-parallel replica's two passes
            x = here(rng.normal(size=(int(counts.sum()), 6)))
            y = here(rng.integers(0, classes, len(x)))
            y[here(rng.uniform(size=len(x)) < 0.1)] = -100
            w = here(rng.uniform(0, 2, len(x)))
            y[0], w[0] = 3, 1.0
            cuts = np.cumsum([0, *counts.reshape(-1)]).tolist()
            optimizer.zero_grad()
            for part in range(2):
                at = 2 * groups.data.rank() + part
                i = slice(cuts[at], cuts[at + 1])
                objective(split(x[i]), y[i], w[i]).backward()
            optimizer.step()
            plain.zero_grad()
            counted = w * (y >= 0)
            right = (counted * F.cross_entropy(one(x), y, reduction="none")).sum() / counted.sum()
            right.backward()
            plain.step()
            worst = max(worst, abs(optimizer.last_step.loss / right.item() - 1))
            of_one = [*one[0].parameters(), one[2].weight[rows], one[2].bias[rows]]
            worst = max(worst, difference(flat(split.parameters()), flat(of_one)))
            assert worst <= 1e-12, worst
        hvd.check_synchronized(split, process_set=groups.data)
        hvd.check_synchronized(split[0], process_set=groups.model)  # the features: on all ranks alike
        whole = hvd.full_state_dict(split, everywhere=True)
        assert difference(flat(whole.values()), flat(one.state_dict().values())) <= 1e-12
    return {"error after training": worst}


@needs("gloo-2", more="gloo-4 dist-2")
def case_ranks_of_a_grid_that_start_apart():
    if hvd.size() % 2:
        return
    groups = hvd.grid(2)
    torch.manual_seed(hvd.rank())
    split = torch.nn.Sequential(
        torch.nn.Linear(3, 2), hvd.ShardedLinear(2, 5, process_set=groups.model, sizes=[2, 3])
    )
    before = [p.detach().clone() for p in split.parameters()]
    root = groups.data.ranks[0]
    hvd.broadcast_parameters(split.state_dict(), root, process_set=groups.data)
    hvd.check_synchronized(split, process_set=groups.data)
    if hvd.rank() == root:
        assert all(torch.equal(a, b) for a, b in zip(before, split.parameters(), strict=True))
    if hvd.size() > 2:
        wrong = next(r for r in range(hvd.size()) if r not in groups.data.ranks)
        refused(
            ConfigError,
            lambda: hvd.broadcast_parameters(split.state_dict(), wrong, process_set=groups.data),
            f"root_rank={wrong}",
        )


def case_a_grid_that_does_not_fit():
    raises_everywhere(ConfigError, lambda: hvd.grid(hvd.size() + 1), f"model={hvd.size() + 1}", "divisor")
    raises_everywhere(ConfigError, lambda: hvd.ShardedLinear(3, hvd.size() - 1) if hvd.size() > 1
                      else hvd.ShardedLinear(3, 0), "classes=")  # fmt: skip
    raises_everywhere(ConfigError, lambda: hvd.ShardedLinear(3, 9, normalize=True), "bias=False")
