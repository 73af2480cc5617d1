"""Many ranks, PyTorch: only sums of ledgers travel, as with more than 64 ranks, and nothing else changes."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from torch_record import folder, parts, train
from torch_support import before_case, gathered, raises_everywhere, same_on_all_ranks

import hvdloss
import hvdloss.torch as hvd
from hvdloss.errors import AgreementError, NoWeightError, RankError, UsageError, WeightError
from hvdloss.report import read
from hvdloss.terms.policies import BatchShares, SyncPeriod
from tests.ranks import needs

NEEDS = needs("gloo-2 gloo-3", more="mpi-2")

__all__ = ["before_case"]


@contextmanager
def summing(ranks="1"):
    """Have optimizers made inside send no more than sums from so many ranks on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HVDLOSS_TABLE_RANKS", ranks)
        yield


def values(report):
    """What a report says of all ranks together."""
    of_ranks = ("ranks", "averaged_loss", "averaging_error")
    return {k: v for k, v in report.as_dict().items() if k not in (*of_ranks, "choices", "terms")}


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def case_the_steps_are_those_of_a_table():
    """Also where ledgers need a message of their own, and with float64."""
    for dtype, options in (
        (torch.float32, {}),
        (torch.float64, {}),
        (torch.float32, {"compression": hvd.Compression.fp16}),
    ):
        found = []
        torch.set_default_dtype(dtype)
        try:
            for ranks in ("64", "1"):
                with summing(ranks):
                    whole = parts(**options)
                    reports = train(*whole, 4)
                    found.append((whole[0], [values(one) for one in reports], reports[-1]))
        finally:
            torch.set_default_dtype(torch.float32)
        (model, expected, table), (other, told, sums) = found
        assert table.ranks.gathered
        assert not sums.ranks.gathered
        same_on_all_ranks(repr(sums))
        limit = 1e-12 if dtype is torch.float64 else 1e-5
        assert (weights(model) - weights(other)).abs().max() < limit
        for one, another in zip(told, expected, strict=True):
            assert one.pop("loss") == pytest.approx(another.pop("loss"), rel=limit)
            assert one.pop("objective_value") == pytest.approx(another.pop("objective_value"), rel=limit)
            assert one == another  # weights and elements to the last bit
        messages = [report.choices["comm_plan"]["messages"] for report in (table, sums)]
        assert messages[0] == messages[1]


def case_who_reads_is_gathered_for_on_all_ranks():
    with summing():
        model, objective, optimizer = parts()
        (first,) = train(model, objective, optimizer, 1)
        if hvd.rank() == hvd.size() - 1:  # one rank looks
            with pytest.raises(UsageError, match="was not gathered"):
                first.ranks[0]
        (second,) = train(model, objective, optimizer, 1)
        assert [one.elements for one in second.ranks] == [3 + 2 * rank for rank in range(hvd.size())]
        same_on_all_ranks(repr(second.ranks))
        assert not first.ranks.gathered


def case_a_record_is_that_of_all_ranks():
    path = folder() / "run.jsonl"
    with summing():
        model, objective, optimizer = parts()
        with hvd.Recorder(path) as recorder:
            recorder.follow(optimizer)  # on rank 0; the others learn it in the step
            reports = train(model, objective, optimizer, 3)
        (after,) = train(model, objective, optimizer, 1)
    assert all(report.ranks.gathered for report in reports)
    assert not after.ranks.gathered
    if hvd.rank() == 0:
        for line, report in zip(read(path).steps, reports, strict=True):
            assert line["ranks"]["elements"] == [one.elements for one in report.ranks]


def case_faults_are_named_alike():
    def step(optimizer, objective, model, weight=1.0, value=0.0):
        x = torch.ones(3, 4)
        x[0] += value
        optimizer.zero_grad()
        objective(model(x), torch.tensor([0, 1, 2]), torch.full((3,), weight)).backward()
        optimizer.step()

    last = hvd.rank() == hvd.size() - 1
    name = f"rank {hvd.size() - 1}"
    with summing():
        model, objective, optimizer = parts(nonfinite="raise")
        for _ in range(2):  # in the step that makes the plan, and in another one
            before = weights(model)
            weight = -1.0 if last else 1.0
            raises_everywhere(
                WeightError, lambda w=weight: step(optimizer, objective, model, w), "3 weight(s) below", name
            )
            bad = float("nan") if last else 0.0
            raises_everywhere(
                hvdloss.errors.NonFiniteLossError,
                lambda v=bad: step(optimizer, objective, model, value=v),
                name,
            )
            raises_everywhere(NoWeightError, lambda: step(optimizer, objective, model, 0.0), "any of")
            assert torch.equal(before, weights(model))
            step(optimizer, objective, model)
        assert not optimizer.last_step.ranks.gathered


def case_skipping_and_dropping_know_whose_it_was():
    last = hvd.size() - 1
    with summing():
        for policy in ("skip", "drop"):
            reports = train(*parts(nonfinite=policy), 4, bad=(2, 3))
            assert [report.ranks.gathered for report in reports] == [False, True, True, False]
            for report in reports[1:3]:
                assert [one.nonfinite for one in report.ranks] == [""] * last + ["loss"]
            if policy == "drop":
                assert [one.dropped for one in reports[2].ranks] == [0] * last + [2]
                assert reports[3].ranks.dropped == 2
            else:
                assert reports[3].skipped == 2
            same_on_all_ranks([repr(report) for report in reports])


def case_terms_see_every_rank_in_every_step():
    found = []
    for ranks in ("64", "1"):
        terms = (
            hvdloss.CommunicationCost(price=0.1, policies=(BatchShares(8 * hvd.size()),)),
            hvdloss.DataSkew(price=0.1, classes=3),
        )
        with summing(ranks):
            reports = train(*parts(terms), 4)
        found.append([[term.values for name, term in one.terms.items() if name == "skew"] for one in reports])
        assert all(report.ranks.gathered for report in reports)
        same_on_all_ranks(repr([report.terms for report in reports]))
    assert found[0] == found[1]


def case_local_steps():
    terms = (hvdloss.CommunicationCost(policies=(SyncPeriod(2),)),)
    found = []
    for ranks in ("64", "1"):
        with summing(ranks):
            model, objective, optimizer = parts(terms, nonfinite="raise")
            train(model, objective, optimizer, 5)
            optimizer.exchange()
        same_on_all_ranks(weights(model).tolist())
        found.append(weights(model))
    assert torch.allclose(*found, rtol=1e-5)


def case_ranks_with_more_and_less_data():
    def batches(fails=False):
        for n in range(1 + 2 * hvd.rank()):
            if fails and n and hvd.rank() == hvd.size() - 1:
                raise OSError("the disk is gone")
            yield torch.full((2, 4), float(n)), torch.tensor([0, 1])

    with summing():
        model, objective, optimizer = parts()
        steps = 0
        for x, y in hvd.uneven(batches(), optimizer):
            optimizer.zero_grad()
            objective(model(x), y).backward()
            optimizer.step()
            steps += 1
        assert steps == 1 + 2 * (hvd.size() - 1)
        assert not optimizer.last_step.ranks.gathered

        def loop():
            for x, y in hvd.uneven(batches(fails=True), optimizer):
                optimizer.zero_grad()
                objective(model(x), y).backward()
                optimizer.step()

        raises_everywhere(RankError, loop, f"rank {hvd.size() - 1}: OSError: the disk is gone")


def case_who_is_to_leave_is_known_by_name():
    with summing():
        model, objective, optimizer = parts()
        status = optimizer._hvdloss.state.status
        train(model, objective, optimizer, 1)
        assert status.preempted_ranks == ()
        status.preemption_requested = lambda: hvd.rank() == 1
        train(model, objective, optimizer, 1)
        assert status.preempted_ranks == (1,)


def case_a_closure_is_that_of_all_ranks():
    found = []
    for ranks in ("64", "1"):
        with summing(ranks):
            model, objective, _ = parts()
            optimizer = hvd.DistributedOptimizer(
                torch.optim.LBFGS(model.parameters(), max_iter=3), model.named_parameters(), objective
            )
            x = torch.arange(12.0 + 4 * hvd.rank()).view(-1, 4) / 10
            y = torch.arange(len(x)) % 3

            def closure(x=x, y=y, optimizer=optimizer, objective=objective, model=model):
                optimizer.zero_grad()
                loss = objective(model(x), y)
                loss.backward()
                return loss

            found.append(float(optimizer.step(closure)))
        same_on_all_ranks(found[-1])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def case_another_limit_on_one_rank_is_found():
    with summing("1" if hvd.rank() else "64"):
        model, objective, optimizer = parts()
        raises_everywhere(
            AgreementError, lambda: train(model, objective, optimizer, 1), "table_ranks differs between ranks"
        )


def case_the_sum_of_weights_is_rounded_once():
    """Here weights of which an ordinary sum of three ranks loses some."""
    with summing():
        model, objective, optimizer = parts()
        own = (1e16, 1.0, 0.5)[hvd.rank() % 3]
        x = torch.ones(1, 4, dtype=torch.float32)
        optimizer.zero_grad()
        objective(model(x).double(), torch.tensor([0]), torch.tensor([own], dtype=torch.float64)).backward()
        optimizer.step()
        assert optimizer.last_step.weight == math.fsum(map(float, gathered(repr(own))))
