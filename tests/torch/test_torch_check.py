"""What `hvdloss check` reads off a script's graphs, in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hvdloss.torch as hvd
from hvdloss.check.evidence import Evidence, read
from hvdloss.check.verdict import Finding, Verdict, judge
from hvdloss.torch.check.recorder import Enough, Recorder

WEIGHT = torch.tensor([1.0, 0.0, 2.0, 3.0, 1.0, 0.5], dtype=torch.float64)
BY_CLASS = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, -100, 1, 2])


class Sentences(nn.Module):
    """Tokens with a place each, and a loss of its own if it gets labels."""

    def __init__(self, centred: bool = False) -> None:
        super().__init__()
        self.token, self.place, self.out = nn.Embedding(9, 4), nn.Embedding(5, 4), nn.Linear(4, 9)
        self.centred = centred

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.token(tokens) + self.place(torch.arange(tokens.shape[1]))
        hidden = hidden - hidden.mean(0) if self.centred else hidden
        logits = self.out(hidden.tanh().cumsum(1))
        return {"loss": F.cross_entropy(logits.movedim(-1, 1), labels), "logits": logits}


def watched(
    folder: Path, model: nn.Module, loss: Callable[[nn.Module], torch.Tensor], passes: int = 1
) -> tuple[Finding, Evidence]:
    """Train for a step; return what was found of it, and what was seen."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = torch.autograd.backward, nn.Module.__call__, nn.Module.zero_grad, F.cross_entropy

    def train() -> None:
        while True:
            optimizer.zero_grad()
            for _ in range(passes):
                loss(model).backward()
            optimizer.step()

    with Recorder(folder, 0, 1).watching(), pytest.raises(Enough):
        train()
    assert plain == (torch.autograd.backward, nn.Module.__call__, nn.Module.zero_grad, F.cross_entropy)
    (seen,) = read(folder, 1)
    return judge(seen), seen


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


X = torch.linspace(-1, 1, 24).double().view(6, 4)


@pytest.mark.parametrize(
    ("loss", "factor", "numerator", "denominators"),
    [
        (lambda each: each.mean(), 1 / 6, None, {"weights": 5.0, "elements": 6.0}),
        (lambda each: (each * WEIGHT).sum() / WEIGHT.sum(), 1 / 7.5, WEIGHT, {"elements that count": 4.0}),
        (lambda each: 0.5 * (WEIGHT * each).mean(), 0.5 / 6, WEIGHT, {"weights": 4.5, "rows": 6.0}),
        (lambda each: each[WEIGHT > 0].mean(), 1 / 5, (WEIGHT > 0).double(), {"weights": 4.0}),
    ],
)  # fmt: skip
def test_losses_of_elements_are_read_as_sums(tmp_path, loss, factor, numerator, denominators):
    model = linear()
    losses = F.cross_entropy(model(X), LABELS, reduction="none").detach()
    found, seen = watched(tmp_path, model, lambda m: loss(F.cross_entropy(m(X), LABELS, reduction="none")))
    (((call,),),) = seen.passes
    assert call.factor == pytest.approx(factor)
    assert call.numerator == pytest.approx(float((losses * (1 if numerator is None else numerator)).sum()))
    assert call.denominators.items() >= denominators.items()
    assert found.verdict is Verdict.EXACT, found


@pytest.mark.parametrize(
    ("loss", "reduction", "denominator", "exact"),
    [
        (lambda m: F.cross_entropy(m(X), LABELS, weight=BY_CLASS), "mean", 13.0, True),
        (lambda m: nn.MSELoss()(m(X), X[:, :3]), "mean", 18.0, True),
        (lambda m: F.kl_div(m(X), X[:, :3].exp(), reduction="batchmean") / 3, "batchmean", 6.0, True),
        (lambda m: F.mse_loss(m(X), X[:, :3]) + F.l1_loss(m(X), X[:, :3]), "mean", 18.0, True),
        (lambda m: F.mse_loss(m(X), X[:, :3]) + 0.1 * m.weight.square().sum(), "mean", 18.0, True),
        (lambda m: F.mse_loss(m(X), X[:, :3]) + 0.1 * m(X).square().mean(), "mean", 18.0, False),
        (lambda m: ((m(X) - X[:, :3]) ** 2).mean(), "", 0.0, False),
    ],
)  # fmt: skip
def test_what_is_no_loss_function_is_not_known(tmp_path, loss, reduction, denominator, exact):
    found, seen = watched(tmp_path, linear(), loss)
    assert found.verdict is (Verdict.EXACT if exact else Verdict.UNKNOWN), found
    if exact:
        first = seen.passes[0][0][0]
        assert (first.reduction, first.denominators["weights"]) == (reduction, denominator)


def test_samples_that_depend_on_each_other_are_noticed(tmp_path):
    tokens, labels = torch.arange(15).view(3, 5) % 9, torch.arange(15).view(3, 5) % 4
    cases = {
        "sentences": (Sentences(), lambda m: m(tokens, labels)["loss"], False),
        "centred": (Sentences(centred=True), lambda m: m(tokens, labels)["loss"], True),
        "contrast": (linear(), lambda m: F.cross_entropy(m(X) @ m(X).T, torch.arange(6)), True),
        "ranking": (nn.Linear(4, 1), lambda m: F.mse_loss(m(X.float()).softmax(0), X[:, :1].float()), True),
        "plain": (nn.Linear(4, 1), lambda m: F.mse_loss(m(X.float()), X[:, :1].float()), False),
    }
    for name, (model, loss, mixed) in cases.items():
        (tmp_path / name).mkdir()
        found, _ = watched(tmp_path / name, model, loss)
        assert found.verdict is (Verdict.UNKNOWN if mixed else Verdict.EXACT), (name, found)
        assert any("depends on several samples" in text for text in found.problems) is mixed


def test_micro_batches_are_added_up_and_zeroed_gradients_forgotten(tmp_path):
    def loss(model: nn.Module) -> torch.Tensor:
        return F.cross_entropy(model(X), LABELS)

    found, seen = watched(tmp_path, linear(), loss, passes=3)
    assert len(seen.passes[0]) == 3
    assert [cause.kind for cause in found.causes] == ["passes_added_up"]

    def twice(model: nn.Module) -> torch.Tensor:
        loss(model).backward()
        model.zero_grad()
        return loss(model)

    (tmp_path / "again").mkdir()
    found, seen = watched(tmp_path / "again", linear(), twice)
    assert len(seen.passes[0]) == 1
    assert found.verdict is Verdict.EXACT


def test_what_a_script_gets_is_left_as_it_is(tmp_path):
    """Gradients, random numbers and the tensors that a model may change in place."""

    class Shifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop = nn.Linear(4, 3), nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.drop(x.add_(1)))

    def gradient() -> torch.Tensor:
        torch.manual_seed(1)
        model = Shifts().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        F.cross_entropy(model(X.clone()), LABELS).backward()
        optimizer.step()
        return model.layer.weight.grad

    expected = gradient()
    with Recorder(tmp_path, 0, 3).watching():
        found = gradient()
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore::UserWarning")  # nobody reduces their gradients here
def test_objectives_are_seen_with_their_weights_and_reduction(tmp_path):
    labels, weight = LABELS.clamp(min=0), WEIGHT.clone()
    for reduction, denominators in (
        ("mean", {"weights": 7.5}),
        ("batch_mean", {"elements": 5.0}),
        ("sum", None),
    ):
        objective = hvd.Objective("cross_entropy", reduction=reduction)
        (tmp_path / reduction).mkdir()
        found, seen = watched(tmp_path / reduction, linear(), lambda m, o=objective: o(m(X), labels, weight))
        (((call,),),) = seen.passes
        assert call.ours
        assert denominators is None or call.denominators == denominators
        assert found.verdict is Verdict.EXACT
    dice = hvd.Objective("soft_dice")
    (tmp_path / "dice").mkdir()
    target = (X[:, :1] > 0).double()
    found, _ = watched(tmp_path / "dice", linear(), lambda m: dice(m(X)[:, :1].sigmoid(), target))
    assert found.verdict is Verdict.UNKNOWN
    assert "loss of all elements together" in found.problems[0]
