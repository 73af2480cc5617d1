"""The record of real ranks: what rank 0 writes is what all of them saw."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from torch_support import before_case

import hvdloss
import hvdloss.torch as hvd
from hvdloss.errors import ConfigError
from hvdloss.report import read
from hvdloss.terms.policies import SyncPeriod
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-1 gloo-3 dist-2")

__all__ = ["before_case"]


def folder():
    """A folder that all ranks know; rank 0 makes it."""
    made = tempfile.mkdtemp() if hvd.rank() == 0 else None
    return Path(hvd.broadcast_object(made, root_rank=0, name="folder"))


def parts(terms=(), nonfinite="skip", **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    objective = hvd.Objective("cross_entropy", terms=terms, nonfinite=nonfinite)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), objective, **options
    )
    return model, objective, optimizer


def train(model, objective, optimizer, steps, bad=()):
    """Take steps on uneven ranks; return every step's report."""
    torch.manual_seed(hvd.rank())
    reports = []
    for step in range(1, steps + 1):
        x = torch.randn(3 + 2 * hvd.rank(), 4)
        y = torch.randint(0, 3, (len(x),))
        if step in bad and hvd.rank() == hvd.size() - 1:
            x[0] = math.nan
        optimizer.zero_grad()
        objective(model(x), y).backward()
        optimizer.step()
        reports.append(optimizer.last_step)
    return reports


def case_plain_averaging_would_have_reported_what_the_step_says():
    """Held against Horovod's own average of the ranks' means, in float64, uneven, weighted, accumulated."""
    generator = torch.Generator().manual_seed(hvd.rank())
    path = folder() / "averaged.jsonl"
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    objective = hvd.Objective("cross_entropy")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model.named_parameters(),
        objective,
        backward_passes_per_step=2,
    )
    plain, reports = [], []
    with hvd.Recorder(path) as recorder:
        recorder.follow(optimizer)
        for step in range(3):
            total, count = torch.zeros(2, dtype=torch.float64)
            optimizer.zero_grad()
            for size in (3 + 4 * hvd.rank(), 2):
                x = torch.randn(size, 4, generator=generator).double()
                y = torch.randint(0, 3, (size,), generator=generator)
                w = torch.rand(size, generator=generator).double()
                own = torch.nn.functional.cross_entropy(model(x), y, reduction="none").detach()
                total, count = total + (w * own).sum(), count + w.sum()
                objective(model(x), y, w).backward()
            optimizer.step()
            plain.append(hvd.allreduce(total / count, op=hvd.Average, name=f"plain.{step}").item())
            reports.append(optimizer.last_step)
    assert [report.averaged_loss for report in reports] == pytest.approx(plain, rel=1e-12)
    errors = [value / report.loss - 1 for value, report in zip(plain, reports, strict=True)]
    assert [report.averaging_error for report in reports] == pytest.approx(errors, abs=1e-12)
    assert min(map(abs, errors)) > 1e-3 or hvd.size() == 1
    if hvd.rank() == 0:
        record = read(path)
        assert record.column("averaged_loss").tolist() == [report.averaged_loss for report in reports]


def case_a_record_is_what_all_ranks_reported():
    path = folder() / "run.jsonl"
    terms = (hvdloss.CommunicationCost(price=0.5), hvdloss.DataSkew(price=0.1, classes=3))
    model, objective, optimizer = parts(terms)
    with hvd.Recorder(path, name="two ranks", settings={"lr": 0.1}, classes=["a", "b", "c"]) as recorder:
        recorder.follow(optimizer)
        reports = train(model, objective, optimizer, 6, bad=(4,))
        recorder.epoch(accuracy=0.5)
    everywhere = hvd.allgather_object([path.exists(), recorder._begun])
    assert [begun for _, begun in everywhere] == [True] + [False] * (hvd.size() - 1)
    if hvd.rank() != 0:
        return {}
    found = read(path)
    assert (found.name, found.status, found.size) == ("two ranks", "finished", hvd.size())
    head = found.runs[0]
    assert (head["framework"], head["ranks"], head["objective"]["nonfinite"]) == ("torch", hvd.size(), "skip")
    assert (
        head["environment"]["torch"] == torch.__version__.partition("+")[0] or "torch" in head["environment"]
    )
    assert set(head["terms"]) == {"communication", "skew"}
    assert [line["step"] for line in found.steps] == [report.step for report in reports]
    seen = 0
    for line, report in zip(found.steps, reports, strict=True):
        seen += report.elements
        assert line["samples"] == seen
        assert line["loss"] == (report.loss if math.isfinite(report.loss) else None)
        for name in ("weight", "elements", "micro_batches", "communication", "computation", "skew"):
            assert line["ranks"][name] == [getattr(one, name) for one in report.ranks], name
        assert line["terms"]["communication"]["values"] == report.terms["communication"].values
    (fault,) = found.faults
    assert (fault["step"], fault["ranks"]) == (4, [hvd.size() - 1])
    assert found.steps[-1]["skipped"] == 1
    assert found.classes[-1]["counts"] == reports[-1].terms["skew"].details["counts"]
    assert found.epochs[0]["metrics"] == {"accuracy": 0.5}
    text = json.dumps([found.runs, found.comm_plans])
    assert str(Path.home()) not in text
    return {"bytes a step": path.stat().st_size / 6}


@needs("gloo-2", more="gloo-3 dist-2")
def case_local_steps_are_recorded_when_ranks_meet():
    path = folder() / "run.jsonl"
    terms = (hvdloss.CommunicationCost(policies=(SyncPeriod(3),)),)
    model, objective, optimizer = parts(terms, "raise")
    recorder = hvd.Recorder(path).follow(objective)
    train(model, objective, optimizer, 7)
    optimizer.zero_grad()
    optimizer.exchange()
    recorder.close()
    if hvd.rank() == 0:
        assert [line["step"] for line in read(path).steps] == [1, 4, 7]
        # Nothing of a stretch is lost: 3 samples of rank 0, 5 of rank 1, ... in each of 7 steps.
        each = sum(3 + 2 * rank for rank in range(hvd.size()))
        assert read(path).steps[-1]["samples"] == 7 * each


class Notes:
    def __init__(self):
        self.steps, self.closed = [], 0

    def step(self, report):
        self.steps.append(report)

    def close(self):
        self.closed += 1


@needs("gloo-2", more="gloo-3 dist-2")
def case_any_sink_follows_on_the_rank_that_is_asked_for():
    model, objective, optimizer = parts()
    last = hvd.size() - 1
    first, other = Notes(), Notes()
    with hvd.follow(optimizer, first), hvd.follow(optimizer, other, rank=last):
        reports = train(model, objective, optimizer, 2)
    train(model, objective, optimizer, 1)
    assert first.steps == (reports if hvd.rank() == 0 else [])
    assert other.steps == (reports if hvd.rank() == last else [])
    assert (first.closed, other.closed) == (hvd.rank() == 0, hvd.rank() == last)
    with pytest.raises(ConfigError, match="neither from hvdloss"):
        hvd.follow(torch.optim.SGD(model.parameters(), lr=1.0), first)
    alone = hvd.add_process_set([last])
    net, objective, only = parts(process_set=alone)
    none, there = Notes(), Notes()
    with hvd.follow(only, none), hvd.follow(only, there, rank=last):
        if hvd.rank() == last:
            train(net, objective, only, 2)
    assert len(none.steps) == (2 if last == 0 else 0)
    assert len(there.steps) == (2 if hvd.rank() == last else 0)
    hvd.remove_process_set(alone)


def case_a_step_that_a_scaler_skips_is_told_as_well():
    model, objective, optimizer = parts()
    notes = Notes()
    with hvd.follow(optimizer, notes):
        train(model, objective, optimizer, 1)
        optimizer.zero_grad()
        objective(model(torch.ones(2, 4)), torch.zeros(2, dtype=torch.int64)).backward()
        optimizer.synchronize()  # and no update, as a GradScaler does where a gradient is infinite
        optimizer.zero_grad()
        train(model, objective, optimizer, 1)
    if hvd.rank() == 0:
        assert [one.step for one in notes.steps] == [1, 2, 3]
