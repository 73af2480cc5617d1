"""Packed sequences in PyTorch beyond the laws: contexts, policies, several losses, others' averages."""

from __future__ import annotations

import pytest
import torch
from torch_support import (
    before_case,
    difference,
    flat,
    generator,
    gradients,
    here,
    network,
    raises_everywhere,
)

import hvdloss.torch as hvd
from hvdloss.errors import WeightError
from hvdloss.torch.ops import HOST_DEVICES
from tests.ranks import needs

__all__ = ["before_case"]

NEEDS = needs("gloo-2", more="gloo-3 dist-2")
EXACT = 1e-11
EVERYWHERE = hvd.global_process_set


def tokens(g, count):
    """Return inputs, targets, weights and ids of sequences of 1 to 6 tokens, which lie one after another."""
    ids = torch.repeat_interleave(torch.arange(count), torch.randint(1, 7, (count,), generator=g))
    x = torch.randn(len(ids), 5, generator=g).double() + ids[:, None] / count
    y = torch.randn(len(ids), 1, generator=g).double() * (1 + ids[:, None])
    return x, y, torch.rand(len(ids), 1, generator=g).double(), ids[:, None]


def sequence_mean(model, x, y, w, ids):
    """Return the loss of the unpacked sequences in one process."""
    losses = (w * (model(here(x)) - here(y)) ** 2)[:, 0]
    each = [losses[ids[:, 0] == name].sum() / w[ids == name].sum() for name in ids.unique()]
    return torch.stack(each).mean()


def compared(model, one, loss):
    """Return how far a model's gradients are from those of one process."""
    loss.backward()
    return difference(gradients(model), gradients(one))


def dealt(g, *tensors):
    """Return this rank's part of rows that are dealt at random."""
    place = torch.randint(0, hvd.size(), (len(tensors[0]),), generator=g)
    return [t[place == hvd.rank()] for t in tensors]


@needs("gloo-2", more="gloo-3 gloo-4")
def case_the_ranks_of_a_context_exchange_among_themselves():
    """Contexts of two ranks: ids are those of a context; other contexts have other sequences of that name."""
    g = generator(1)
    contexts = [range(k, min(k + 2, hvd.size())) for k in range(0, hvd.size(), 2)]
    groups = [hvd.add_process_set(list(c)) for c in contexts if len(c) > 1 and len(contexts) > 1]
    groups = [*groups, *[None] * len(contexts)] if groups else [EVERYWHERE]
    try:
        model, one = network(g), None
        one = network(generator(1))
        objective = hvd.Objective("mse", reduction="sequence_mean")
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), objective=objective)
        parts = [tokens(g, 5) for _ in contexts]
        cut = [int(torch.randint(0, len(x) + 1, (), generator=g)) for x, *_ in parts]
        mine = hvd.rank() // 2
        at, rows = cut[mine], len(parts[mine][0])
        bounds = (0, at, rows) if len(contexts[mine]) > 1 else (0, rows)
        place = contexts[mine].index(hvd.rank())
        x, y, w, ids = (t[bounds[place] : bounds[place + 1]] for t in parts[mine])
        (segments,) = hvd.link_segments([ids], [w], over=groups[mine], cut="ends")
        objective(model(here(x)), here(y), here(w), segments=segments).backward()
        optimizer.synchronize()
        whole = [torch.cat(some) for some in zip(*parts, strict=True)]
        whole[3] = torch.cat([ids + 100 * k for k, (*_, ids) in enumerate(parts)])
        error = compared(model, one, sequence_mean(one, *whole))
    finally:
        for group in groups:
            if group not in (None, EVERYWHERE):
                hvd.remove_process_set(group)
    assert error < EXACT, error
    return {"error": error}


def clipped(prediction, target):
    """Return the loss of PPO and GRPO for one token: log probabilities, old ones and advantages."""
    old, advantage = target.unbind(-1)
    ratio = (prediction - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def answers(g):
    """Return inputs, old log probabilities and advantages, masks, and prompts of padded answers."""
    prompts = torch.randint(0, 3, (9,), generator=g)
    lengths = torch.randint(1, 7, (9,), generator=g)
    mask = (torch.arange(6) < lengths[:, None]).double()
    x = torch.randn(9, 6, 5, generator=g).double() + prompts[:, None, None]
    old = torch.randn(9, 6, generator=g).double() * 0.1
    advantage = torch.randn(9, 1, generator=g).double().expand(9, 6)
    return x, torch.stack([old, advantage], -1), mask, prompts


def policy_loss(model, kind, x, target, mask, prompts):
    """Return the loss of all answers in one process, written anew."""
    losses = clipped(model(here(x))[..., 0], here(target)) * here(mask)
    means = losses.sum(1) / here(mask).sum(1)
    if kind == "tokens":
        return losses.sum() / mask.sum()
    if kind == "answers":
        return means.mean()
    each = [prompts == prompt for prompt in prompts.unique()]
    if kind == "prompts":
        return torch.stack([means[which].mean() for which in each]).mean()
    return torch.stack([losses[which].sum() / mask[which].sum() for which in each]).mean()


def case_policy_optimisation_normalises_over_tokens_answers_or_prompts():
    """A prompt's answers lie on any ranks."""
    errors = {}
    for number, kind in enumerate(("tokens", "answers", "prompts", "tokens of a prompt")):
        g = generator(10 + number)
        model, one = network(g), network(generator(10 + number))
        objective = hvd.Objective(clipped, reduction="mean" if kind == "tokens" else "sequence_mean")
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), objective=objective)
        whole = answers(g)
        x, target, mask, prompts = dealt(g, *whole)
        segments = None
        if kind == "prompts":
            (segments,) = hvd.link_segments([hvd.Segments(groups=prompts)], [mask], over=EVERYWHERE)
        elif kind == "tokens of a prompt":
            (segments,) = hvd.link_segments([prompts[:, None].expand(-1, 6)], [mask], over=EVERYWHERE)
        objective(model(here(x))[..., 0], here(target), here(mask), segments=segments).backward()
        optimizer.synchronize()
        errors[kind] = compared(model, one, policy_loss(one, kind, *whole))
    assert max(errors.values()) < EXACT, errors
    return errors


def case_several_losses_say_ahead_what_cut_sequences_weigh():
    g = generator(3)
    model, one = network(g), network(generator(3))
    tasks = {"mse": hvd.Objective("mse", reduction="sequence_mean"), "mae": hvd.Objective("mae")}
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), objective=tasks, backward_passes_per_step=2
    )
    whole = tokens(g, 6)
    batches = list(zip(*(t.split((len(t) + 1) // 2) for t in dealt(g, *whole)), strict=True))
    linked = hvd.link_segments([b[3] for b in batches], [b[2] for b in batches], over=EVERYWHERE)
    said = {"mse": sum(s.sequences() for s in linked), "mae": sum(float(b[2].sum()) for b in batches)}
    optimizer.expect(said, passes=len(batches))
    for (x, y, w, _), segments in zip(batches, linked, strict=True):
        found = model(here(x))
        loss = tasks["mse"](found, here(y), here(w), segments=segments)
        (loss + 2 * tasks["mae"](found, here(y), here(w))).backward()
    optimizer.synchronize()
    x, y, w, _ = whole
    other = (here(w) * (one(here(x)) - here(y)).abs()).sum() / w.sum()
    error = compared(model, one, sequence_mean(one, *whole) + 2 * other)
    assert error < EXACT, error
    assert abs(optimizer.last_step.losses["mse"].value / sequence_mean(one, *whole).item() - 1) < EXACT
    return {"error": error}


def case_gradients_that_somebody_else_averages():
    """As DDP does. Two micro-batches, whose sequences all ranks know the number of."""
    g = generator(4)
    model, one = network(g), network(generator(4))
    objective = hvd.Objective("mse", reduction="sequence_mean", ahead=True)
    whole = tokens(g, 6)
    batches = list(zip(*(t.split((len(t) + 1) // 2) for t in dealt(g, *whole)), strict=True))
    linked = hvd.link_segments([b[3] for b in batches], [b[2] for b in batches], over=EVERYWHERE)
    total = objective.total(torch.tensor(sum(s.sequences() for s in linked)))
    assert abs(total.item() - 6) < EXACT
    for (x, y, w, _), segments in zip(batches, linked, strict=True):
        objective(model(here(x)), here(y), here(w), segments=segments, total=here(total)).backward()
    mine = gradients(model)
    mean = hvd.allreduce(mine, op=hvd.Average, name="mean")
    sequence_mean(one, *whole).backward()
    error = difference(mean, flat(p.grad for p in one.parameters()))
    assert error < EXACT, error
    return {"error": error}


def case_weights_that_were_not_linked_fail_on_all_ranks():
    """On a device, for which nobody waits: one rank's mask lacks a target that the loss ignores."""
    g = generator(5)
    model = network(g, outputs=4)
    objective = hvd.Objective("cross_entropy", reduction="sequence_mean")
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), objective=objective)
    x, _, w, ids = tokens(g, 4)
    labels = torch.zeros(len(x), dtype=torch.long)
    if hvd.rank() == hvd.size() - 1:
        labels[1] = -100
    (segments,) = hvd.link_segments([ids[:, 0]], [w[:, 0]], over=EVERYWHERE)

    def step():
        optimizer.zero_grad()
        objective(model(here(x)), here(labels), here(w[:, 0]), segments=segments).backward()
        optimizer.step()

    if HOST_DEVICES and here(0.0).device.type == "cpu" and hvd.rank() == hvd.size() - 1:
        with pytest.raises(WeightError, match=r"weights of 1 elements are not .*rank " + str(hvd.rank())):
            objective(model(here(x)), here(labels), here(w[:, 0]), segments=segments)
    kept = set(HOST_DEVICES)
    HOST_DEVICES.clear()
    try:
        raises_everywhere(WeightError, step, f"NaN or infinite on rank {hvd.size() - 1}")
    finally:
        HOST_DEVICES.update(kept)
