"""Models cut into stages, over replicas and split layers; against the whole model in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch_sharded import refused
from torch_split import parts
from torch_support import DEVICE, difference, flat, here, raises_everywhere, reduced, same_on_all_ranks

import hvdloss.torch as hvd
from hvdloss.errors import AgreementError, ConfigError, HvdlossError, UsageError
from tests.ranks import needs

NEEDS = needs("gloo-2", more="dist-2")

EXACT = 1e-11
WORDS, WIDTH, HEADS, FEATURES = 11, 6, 3, 8
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def token_losses(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Per-token losses, (N, T)."""
    return F.cross_entropy(logits.transpose(1, 2), target, reduction="none")


def layers(groups: hvd.Grid | None) -> list[Callable[[], torch.nn.Module]]:
    """Return makers of a transformer's layers: ordinary ones, or split over ``groups.model``."""
    place = {"dtype": torch.float64}
    if groups is None or groups.model.size() == 1:
        embedding = lambda: torch.nn.Embedding(WORDS, WIDTH, **place)  # noqa: E731
        block = lambda: torch.nn.TransformerEncoderLayer(  # noqa: E731
            WIDTH, HEADS, FEATURES, dropout=0.0, batch_first=True, **place
        )
    else:
        among = {"process_set": groups.model, **place}
        embedding = lambda: hvd.VocabParallelEmbedding(WORDS, WIDTH, **among)  # noqa: E731
        block = lambda: hvd.ParallelTransformerLayer(WIDTH, HEADS, FEATURES, **among)  # noqa: E731
    return [embedding, block, block, lambda: torch.nn.Linear(WIDTH, WORDS, **place)]


def grids() -> list[tuple[int, int]]:
    """Return grids of (ranks that share layers, stages) for these ranks."""
    return {1: [(1, 1)], 2: [(1, 2), (1, 1)], 3: [(1, 3)], 4: [(1, 2), (2, 2), (1, 4)]}[hvd.size()]


def random_step(rng: np.random.Generator, replicas: int, most: int) -> list[list[Batch]]:
    """Return micro-batches of every replica: of any size and number, some without weight."""
    step = []
    for replica in range(replicas):
        row = []
        for _ in range(int(rng.integers(0 if replica else 1, most + 1))):
            n, length = int(rng.integers(1, 4)), int(rng.integers(1, 5))
            x, y = (here(rng.integers(0, WORDS, (n, length))) for _ in range(2))
            weight = here(rng.uniform(0, 2, (n, length)) * (rng.uniform(size=(n, length)) < 0.8))
            row.append((x, y, weight * float(rng.uniform() < 0.8)))
        step.append(row)
    step[0][0][2][0, 0] = 1.0
    return step


def loss_of_one(model: torch.nn.Module, step: list[list[Batch]], reduction: str) -> torch.Tensor:
    """Return the loss of one process with every micro-batch."""
    together = [batch for row in step for batch in row]
    losses, weights = zip(*((token_losses(model(x), y), w) for x, y, w in together), strict=True)
    if reduction == "sequence_mean":
        length = max(one.shape[1] for one in losses)
        padded = [[F.pad(t, (0, length - t.shape[1])) for t in some] for some in (losses, weights)]
        return reduced(torch.cat(padded[0]), torch.cat(padded[1]), reduction)
    return reduced(*(torch.cat([t.flatten() for t in some]) for some in (losses, weights)), reduction)


def stage_apart(stage: torch.nn.Module, one: torch.nn.Module) -> float:
    """Return how far this rank's parameters are from its part of the whole model's."""
    whole = one.state_dict()
    right = [parts(stage, key, whole[key]) for key in stage.state_dict()]
    return difference(flat(stage.state_dict().values()), flat(right))


@needs("gloo-2", more="gloo-3 gloo-4 dist-2 dist-4")
def case_stages_train_like_one_process():
    """Uneven micro-batches, replicas without any, weights of zero; grids with split layers on 4 ranks."""
    worst, most, limit = 0.0, 4, 0.5  # of the gradients' norm, which most steps exceed
    for model, stages in grids():
        for schedule, reduction in (("1f1b", "mean"), ("gpipe", "sequence_mean"), ("1f1b", "sum")):
            groups = hvd.grid(model, stages)
            replicas, rng = hvd.size() // (model * stages), np.random.default_rng(stages)
            torch.manual_seed(5)
            one = torch.nn.Sequential(*(make() for make in layers(None))).to(DEVICE)
            torch.manual_seed(5)
            stage = hvd.pipeline_stage(layers(groups), groups).to(DEVICE)
            assert stage_apart(stage, one) == 0.0
            objective = hvd.Objective(token_losses, reduction=reduction)
            pipeline = hvd.Pipeline(stage, objective, groups, schedule=schedule)
            optimizer = hvd.DistributedOptimizer(
                torch.optim.SGD(stage.parameters(), lr=0.05, momentum=0.9),
                stage.named_parameters(),
                objective,
                process_set=groups.data,
                backward_passes_per_step=most,
            )
            plain = torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9)
            for number in range(4):
                step = random_step(rng, replicas, most)
                mine = step[groups.data.rank()]
                optimizer.zero_grad()
                told = pipeline.run(mine)
                optimizer.synchronize()
                norm = hvd.clip_split_grad_norm_(stage, limit, groups)
                with optimizer.skip_synchronize():
                    optimizer.step()
                plain.zero_grad()
                right = loss_of_one(one, step, reduction)
                right.backward()
                whole_norm = torch.nn.utils.clip_grad_norm_(one.parameters(), limit)
                worst = max(worst, abs(norm.item() / whole_norm.item() - 1))
                plain.step()
                report = optimizer.last_step
                weights = [w for row in step for _, _, w in row]
                assert report.elements == sum(int((w != 0).sum()) for w in weights)
                assert abs(report.weight - sum(float(w.sum()) for w in weights)) <= 1e-9
                worst = max(worst, abs(report.loss / right.item() - 1), stage_apart(stage, one))
                assert worst <= EXACT, (model, stages, schedule, reduction, number, worst)
                if replicas == 1 and reduction == "mean":
                    assert abs(told / right - 1) <= EXACT
                assert pipeline.last_run.micro_batches == len(mine)
            hvd.check_synchronized(stage, process_set=groups.data)
            whole = hvd.full_state_dict(stage, everywhere=True, pipe=groups.pipe)
            assert list(whole) == list(one.state_dict())
            assert difference(flat(whole.values()), flat(one.state_dict().values())) <= EXACT
            if stages > 1:
                first = hvd.full_state_dict(stage, pipe=groups.pipe)
                assert (list(first) == list(whole)) == (pipeline.stage == 0 and groups.model.rank() == 0)
            stage.load_state_dict({key: whole[key] for key in stage.state_dict()})
            outputs = pipeline.predict([x for x, _, _ in mine])
            assert len(outputs) == (len(mine) if pipeline.stage == stages - 1 else 0)
            for out, (x, _, _) in zip(outputs, mine, strict=False):
                assert difference(flat([out]), flat([one(x)])) <= EXACT
    return {"error": worst}


class Tail(torch.nn.Module):
    """Takes features, and which of them count; two tensors, one without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.where(mask, x, 0.0)) * factor


class Head(torch.nn.Module):
    """Gives what :class:`Tail` takes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4, dtype=torch.float64)
        self.factor = torch.nn.Parameter(torch.ones(1, dtype=torch.float64) * 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.linear(x)
        return y.tanh(), y > 0.1, self.factor


def case_several_tensors_between_stages_and_a_loss_that_is_no_mean():
    if hvd.size() != 2:
        return
    groups = hvd.grid(stages=2)
    torch.manual_seed(0)
    whole = [Head(), Tail()]
    mine = copy.deepcopy(whole[groups.pipe.rank()])
    objective = hvd.Objective("soft_dice", process_set=groups.data)
    pipeline = hvd.Pipeline(mine, objective, groups, schedule="gpipe")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(mine.parameters(), lr=0.1), mine.named_parameters(), objective
    )
    g = torch.Generator().manual_seed(1)
    x = torch.randn(7, 4, generator=g, dtype=torch.float64)
    y = torch.randint(2, (7, 3), generator=g).double()
    optimizer.zero_grad()
    pipeline.run([(x, y)])
    optimizer.step()
    plain = [torch.optim.SGD(one.parameters(), lr=0.1) for one in whole]
    loss = hvd.Objective("soft_dice", process_set=groups.data)(whole[1](*whole[0](x)), y)
    loss.backward()
    for one in plain:
        one.step()
    assert abs(optimizer.last_step.loss - loss.item()) <= 1e-12
    assert difference(flat(mine.parameters()), flat(whole[groups.pipe.rank()].parameters())) <= 1e-12


def case_what_travels_between_stages():
    """The messages and bytes that docs/howto/split-models.md states."""
    if hvd.size() != 2:
        return
    groups = hvd.grid(stages=2)
    stage = hvd.pipeline_stage([lambda: torch.nn.Linear(5, 7), lambda: torch.nn.Linear(7, 2)], groups)
    pipeline = hvd.Pipeline(stage, hvd.Objective("mse"), groups)
    batches = [(torch.ones(n, 5), torch.ones(n, 2)) for n in (3, 1, 6)]
    pipeline.run(batches)
    a, b, c = (4 * 7 * len(x) for x, _ in batches)  # bytes of activations
    run = pipeline.last_run
    # Forward with room for as much as the one before, and backward as they are.
    assert (run.messages, run.bytes) == (5 + 3, 3 * 512 + a + a + c + 3 * 64 + a + b + c), run
    pipeline.predict([x for x, _ in batches] if pipeline.stage == 0 else 3)
    run = pipeline.last_run
    assert (run.messages, run.bytes) == (4, 3 * 512 + c + a + c), run
    assert run.expected_bubble == 1 / 4


def case_mistakes_with_stages_are_told_on_all_of_them():
    if hvd.size() != 2:
        return
    groups = hvd.grid(stages=2)

    def make(**options: Any) -> hvd.Pipeline:
        stage = hvd.pipeline_stage([lambda: torch.nn.Linear(2, 2)] * 2, groups)
        return hvd.Pipeline(stage, hvd.Objective("mse", **options.pop("objective", {})), groups, **options)

    pipeline = make()
    batches = [(torch.ones(2, 2), torch.ones(2, 2))] * 3
    mine = batches[: 3 - hvd.rank()]
    raises_everywhere(UsageError, lambda: pipeline.run(mine), "3 on stage 0, 2 on stage 1")
    pipeline.run(batches)  # and the next one works
    stage = pipeline.module
    stage.zero_grad()
    raises_everywhere(UsageError, lambda: hvd.clip_split_grad_norm_(stage, 1.0, groups), "synchronize()")
    raises_everywhere(ConfigError, lambda: hvd.clip_split_grad_norm_(stage, 0.0, groups), "max_norm=0.0")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(stage.parameters(), lr=0.1),
        objective=pipeline.objective,
        process_set=groups.data,
        backward_passes_per_step=2,
    )
    raises_everywhere(UsageError, lambda: pipeline.run(batches), "3 micro-batches", "per_step=2")
    pipeline.predict([x for x, _ in batches])
    pipeline.run(batches[:2])
    optimizer.step()
    schedule = ("1f1b", "gpipe")[hvd.rank()]
    raises_everywhere(AgreementError, lambda: make(schedule=schedule), "schedule is 'gpipe' on stage 1")
    raises_everywhere(ConfigError, lambda: make(schedule="zero"), "'gpipe', '1f1b'")
    raises_everywhere(ConfigError, lambda: make(objective={"nonfinite": "skip"}), 'use "raise"')
    raises_everywhere(ConfigError, lambda: make(objective={"terms": (hvd_terms(),)}), "terms=")
    raises_everywhere(
        ConfigError, lambda: hvd.pipeline_stage([torch.nn.ReLU], groups), "layers=1 are fewer than the 2"
    )
    if hvd.rank() == 0:
        refused(ConfigError, lambda: hvd.Pipeline(None, "mse", groups), "must be an hvdloss.torch.Objective")
        refused(ConfigError, lambda: pipeline.run(3), "needs the micro-batches themselves")
        refused(ConfigError, lambda: pipeline.run([torch.ones(2)]), "micro-batch 0", "Tensor")
    same_on_all_ranks("here")


def hvd_terms() -> Any:
    from hvdloss import CommunicationCost

    return CommunicationCost()


def case_a_weight_that_cannot_be_is_refused_by_every_stage():
    if hvd.size() != 2:
        return
    groups = hvd.grid(stages=2)
    stage = hvd.pipeline_stage([lambda: torch.nn.Linear(2, 2)] * 2, groups)
    objective = hvd.Objective("mse")
    pipeline = hvd.Pipeline(stage, objective, groups)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(stage.parameters(), lr=0.1), objective=objective, process_set=groups.data
    )
    before = flat(stage.parameters())
    for x, weight, word in ((1.0, -1.0, "below zero"), (float("nan"), 1.0, "NaN")):
        optimizer.zero_grad()
        pipeline.run([(torch.full((2, 2), x), torch.ones(2, 2), weight)])
        raises_everywhere(HvdlossError, optimizer.step, word)
        assert torch.equal(before, flat(stage.parameters()))
    optimizer.zero_grad()
    pipeline.run([(torch.ones(2, 2), torch.ones(2, 2))])
    optimizer.step()
    assert not torch.equal(before, flat(stage.parameters()))
