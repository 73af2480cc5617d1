"""The objective by itself, in one process: values, gradients, shapes, messages."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import hvdloss.torch as hvd
from hvdloss.errors import ConfigError, ShapeError
from hvdloss.step.objective import LOSSES
from hvdloss.torch import Objective

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # torch, of its kl_div
D = torch.float64


def _inputs(name, n=6, dtype=D):
    """Return predictions that need gradients, and targets, as the named loss takes them."""
    g = torch.Generator().manual_seed(3)
    y = torch.randn(n, 4, generator=g, dtype=D)
    t = torch.randn(n, 4, generator=g, dtype=D)
    if name in ("cross_entropy", "nll"):
        t = torch.randint(0, 4, (n,), generator=g)
    if name == "nll":
        y = y.log_softmax(1)
    if name == "kl_div":
        y, t = y.log_softmax(1), t.softmax(1)
    if name == "binary_cross_entropy":
        y, t = y.sigmoid(), t.sigmoid()
    if name == "binary_cross_entropy_with_logits":
        t = t.sigmoid()
    if name == "poisson_nll":
        t = t.exp().round()
    if name == "hinge":
        t = t.sign()
    t = t if not t.is_floating_point() else t.to(dtype)
    return y.to(dtype).detach().requires_grad_(), t


OWN = {
    "mse": F.mse_loss,
    "mae": F.l1_loss,
    "huber": F.huber_loss,
    "log_cosh": lambda y, t, reduction: getattr(torch.log(torch.cosh(y - t)), reduction)(),
    "cross_entropy": F.cross_entropy,
    "nll": F.nll_loss,
    "binary_cross_entropy": F.binary_cross_entropy,
    "binary_cross_entropy_with_logits": F.binary_cross_entropy_with_logits,
    "poisson_nll": F.poisson_nll_loss,
    "hinge": lambda y, t, reduction: getattr((1 - y * t).relu(), reduction)(),
    "kl_div": F.kl_div,
}


def test_every_named_loss_is_compared():
    assert set(OWN) == set(LOSSES)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", sorted(OWN))
def test_named_losses_are_torchs_own(name, reduction):
    y, t = _inputs(name)
    mine = Objective(name, reduction=reduction)(y, t)
    (gradient,) = torch.autograd.grad(mine, y)
    # Per element: torch's "mean" of kl_div is over elements, too.
    own = OWN[name](y, t, reduction=reduction)
    (expected,) = torch.autograd.grad(own, y)
    torch.testing.assert_close(mine, own, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", sorted(OWN))
def test_weights_select_and_scale(name):
    """Weights 0 and 2: the mean over the elements that are left, each twice."""
    y, t = _inputs(name)
    keep = torch.tensor([1, 0, 1, 1, 0, 1], dtype=D)
    weight = 2 * keep if name in ("cross_entropy", "nll") else 2 * keep[:, None]
    mine = Objective(name)(y, t, weight=weight)
    own = OWN[name](y[keep > 0], t[keep > 0], reduction="mean")
    torch.testing.assert_close(mine, own, rtol=1e-13, atol=1e-13)
    (gradient,) = torch.autograd.grad(mine, y)
    (expected,) = torch.autograd.grad(own, y)
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-13)


def test_cross_entropy_with_probabilities_and_with_further_axes():
    g = torch.Generator().manual_seed(4)
    y = torch.randn(3, 4, 5, generator=g, dtype=D)
    t = torch.randint(0, 4, (3, 5), generator=g)
    w = torch.rand(3, 5, generator=g, dtype=D)
    own = (F.cross_entropy(y, t, reduction="none") * w).sum() / w.sum()
    torch.testing.assert_close(Objective("cross_entropy")(y, t, weight=w), own)
    p = torch.rand(3, 4, 5, generator=g, dtype=D)
    own = (F.cross_entropy(y, p, reduction="none") * w).sum() / w.sum()
    torch.testing.assert_close(Objective("cross_entropy")(y, p, weight=w), own)


@pytest.mark.parametrize("shape", ["logits (N, C)", "logits (N, C, T)", "log-probabilities"])
def test_ignored_targets_are_absent(shape):
    g = torch.Generator().manual_seed(5)
    y = torch.randn(*((6, 4, 3) if "T" in shape else (6, 4)), generator=g, dtype=D).requires_grad_()
    t = torch.randint(0, 4, (6, 3) if "T" in shape else (6,), generator=g)
    t[1] = t[4] = -100
    name, own = (
        ("nll", F.nll_loss)
        if "log" in shape.split("(")[0] and "prob" in shape
        else (
            "cross_entropy",
            F.cross_entropy,
        )
    )
    loss = Objective(name)(y, t)
    torch.testing.assert_close(loss, own(y, t))  # torch divides by those that are left as well
    torch.testing.assert_close(torch.autograd.grad(loss, y)[0], torch.autograd.grad(own(y, t), y)[0])


def test_all_targets_ignored_is_zero_without_gradient():
    y = torch.randn(3, 4, dtype=D, requires_grad=True)
    loss = Objective("cross_entropy")(y, torch.full((3,), -100))
    assert loss.item() == 0
    assert torch.equal(torch.autograd.grad(loss, y)[0], torch.zeros(3, 4, dtype=D))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["target", "prediction"])
@pytest.mark.parametrize("name", ["mse", "mae", "huber", "log_cosh", "hinge", "callable"])
def test_nan_in_an_absent_element_does_no_harm(name, where, bad):
    loss = (lambda y, t: (y - t).pow(2).log1p()) if name == "callable" else name
    y, t = (x.detach().clone() for x in _inputs("mse"))
    w = torch.ones(6, 4, dtype=D)
    w[2, 1] = 0
    clean = y.clone().requires_grad_()
    expected = Objective(loss)(clean, t, weight=w)
    (expected_gradient,) = torch.autograd.grad(expected, clean)
    (t if where == "target" else y)[2, 1] = bad
    y.requires_grad_()
    found = Objective(loss)(y, t, weight=w)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, y)[0], expected_gradient)


def test_nan_logits_of_an_absent_sample_do_no_harm():
    y, t = _inputs("cross_entropy")
    with torch.no_grad():
        y[3] = math.nan
    w = torch.tensor([1, 1, 1, 0, 1, 1], dtype=D)
    loss = Objective("cross_entropy")(y, t, weight=w)
    (gradient,) = torch.autograd.grad(loss, y)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert not gradient[3].any()


@pytest.mark.parametrize("form", [2.0, 2, True, torch.tensor(2.0), torch.tensor([[2]]), [[2.0]] * 6])
def test_a_constant_weight_changes_nothing_in_a_mean(form):
    y, t = _inputs("mse")
    torch.testing.assert_close(Objective("mse")(y, t, weight=form), F.mse_loss(y, t))


def test_reductions_by_their_definition():
    y, t = _inputs("mse")
    w = torch.tensor([[0.0, 1.0, 2.0, 0.5]], dtype=D).expand(6, 4).clone()
    w[5] = 0
    losses = (y - t).pow(2)
    total = (w * losses).sum()
    expected = {
        "mean": total / w.sum(),
        "sum": total,
        "batch_mean": total / (w != 0).sum(),
        "sequence_mean": ((w * losses).sum(1)[:5] / w.sum(1)[:5]).mean(),
    }
    for reduction, value in expected.items():
        torch.testing.assert_close(Objective("mse", reduction=reduction)(y, t, weight=w), value)


def test_weights_are_data():
    y, t = _inputs("mse")
    w = torch.rand(6, 1, dtype=D, requires_grad=True)
    with pytest.raises(ConfigError, match="detach"):
        Objective("mse")(y, t, weight=w)
    Objective("mse")(y, t, weight=w.detach()).backward()
    assert w.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_losses_of_low_precision_are_summed_in_float32(dtype):
    y, t = _inputs("mse", dtype=dtype)
    big = Objective("mse")(y.expand(1000, 6, 4), t.expand(1000, 6, 4))
    assert big.dtype == torch.float32
    expected = F.mse_loss(y.double(), t.double()).item()
    assert big.item() == pytest.approx(expected, rel=2e-2 if dtype != torch.float32 else 1e-5)
    big.backward()
    assert y.grad.dtype == dtype


def test_float64_stays():
    y, t = _inputs("mse")
    assert Objective("mse")(y, t).dtype == D


def test_autocast_gives_a_float32_loss():
    layer = torch.nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(6, 4))
        assert y.dtype == torch.bfloat16
        loss = Objective("cross_entropy")(y, torch.zeros(6, dtype=torch.long), weight=torch.rand(6))
    assert loss.dtype == torch.float32
    loss.backward()
    assert torch.isfinite(layer.weight.grad).all()


def test_an_empty_batch_is_zero_and_backward_works():
    layer = torch.nn.Linear(4, 2)
    loss = Objective("mse")(layer(torch.randn(0, 4)), torch.randn(0, 2))
    assert loss.item() == 0
    loss.backward()
    assert not layer.weight.grad.any()


def test_no_gradient_wanted_is_fine():
    y, t = _inputs("mse")
    with torch.no_grad():
        loss = Objective("mse")(y, t, weight=torch.ones(6, 1))
    assert not loss.requires_grad


def test_callables_of_every_kind():
    y, t = _inputs("mse")
    for loss in (torch.nn.MSELoss(reduction="none"), lambda a, b: (a - b) ** 2):
        torch.testing.assert_close(Objective(loss)(y, t), F.mse_loss(y, t))
    # Predictions of any structure, which only the callable understands.
    pair = Objective(lambda p, t: (p["a"] - t) ** 2 + (p["b"] - t) ** 2)
    expected = 2 * F.mse_loss(y, t)
    torch.testing.assert_close(pair({"a": y, "b": y}, t, weight=torch.ones(6, 1)), expected)


def test_callables_with_losses_per_sample():
    y, t = _inputs("mse")
    w = torch.rand(6, dtype=D)
    loss = Objective(lambda a, b: (a - b).pow(2).sum(1))(y, t, weight=w)
    torch.testing.assert_close(loss, ((y - t).pow(2).sum(1) * w).sum() / w.sum())


def test_repr_names_loss_and_reduction():
    assert repr(Objective("mse", reduction="sum")) == "Objective('mse', reduction='sum')"
    assert Objective("l1").name == "mae"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Objective("mes"), ["'mes'", "mse"]),
        (lambda: Objective("mse", reduction="average"), ["'average'", "'mean'"]),
        (lambda: Objective(3), ["3"]),
        (lambda: Objective(torch.nn.MSELoss(), reduction="sum"), ["MSELoss", "leave one"]),
        (lambda: Objective("mse", terms=(1,)), ["terms"]),
    ],
)
def test_wrong_arguments_say_what_would_be_right(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_weight_of_the_wrong_shape_says_both_shapes_and_what_may_be_meant():
    y, t = _inputs("mse")
    with pytest.raises(ShapeError) as caught:
        Objective("mse")(y, t, weight=torch.ones(6))
    for word in ("(6,)", "(6, 4)", "weight[:, None]"):
        assert word in str(caught.value)


def test_weight_never_enlarges_the_losses():
    y, t = _inputs("cross_entropy")
    with pytest.raises(ShapeError):
        Objective("cross_entropy")(y, t, weight=torch.ones(6, 1))


def test_sequence_mean_wants_a_token_axis():
    y, t = _inputs("cross_entropy")
    with pytest.raises(ShapeError, match="sequences, tokens"):
        Objective("cross_entropy", reduction="sequence_mean")(y, t)


def test_double_backward_through_the_objective():
    y, t = _inputs("log_cosh")
    w = torch.ones(6, 4, dtype=D)
    w[0] = 0

    def loss(y):
        return Objective("log_cosh")(y, t, weight=w)

    assert torch.autograd.gradgradcheck(loss, (y,))


def test_compiled_function_may_call_the_objective():
    torch._dynamo.reset()
    objective = Objective("mse")

    @torch.compile(backend="eager")
    def loss_of(y, t):
        return objective(torch.tanh(y), t) + 0.1 * y.pow(2).sum()

    y, t = _inputs("mse")
    loss = loss_of(y, t)
    own = F.mse_loss(torch.tanh(y), t) + 0.1 * y.pow(2).sum()
    torch.testing.assert_close(loss, own)
    torch.testing.assert_close(torch.autograd.grad(loss, y)[0], torch.autograd.grad(own, y)[0])


def test_module_shows_the_objective():
    assert hvd.Objective is Objective
