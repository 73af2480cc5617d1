"""What losses of PyTorch say of themselves: their own mean, by element; what has none is refused."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hvdloss.errors import ConfigError, HvdlossError, ShapeError
from hvdloss.torch import Objective

D = torch.float64
CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=D)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(kind: str, seed: int = 0):
    """Return a prediction that wants a gradient, and a target."""
    g = generator(seed)
    shape = {"classes": (6, 4), "tokens": (6, 4, 3)}.get(kind, (6, 4))
    y = torch.randn(shape, generator=g, dtype=D)
    if kind in ("classes", "tokens"):
        t = torch.randint(0, 4, (6, 3) if kind == "tokens" else (6,), generator=g)
        t[1] = t[4] = -100
    elif kind == "no ignored":
        t = torch.randint(0, 4, (6,), generator=g)
    elif kind == "probabilities":
        t = torch.rand(shape, generator=g, dtype=D).softmax(1)
    elif kind == "signs":
        t = torch.sign(torch.randn(shape, generator=g, dtype=D))
    elif kind == "rates":
        t = torch.rand(shape, generator=g, dtype=D)
    else:
        t = torch.randn(shape, generator=g, dtype=D)
    return y.requires_grad_(), t


def classes_of(t):
    return t.masked_fill(t == 2, 255)


LOSSES = {  # a name -> the loss of one process, what an objective gets, and the kind of targets
    "cross entropy": (nn.CrossEntropyLoss(), "classes"),
    "cross entropy of tokens": (nn.CrossEntropyLoss(), "tokens"),
    "class weights": (nn.CrossEntropyLoss(weight=CLASS_WEIGHT), "tokens"),
    "ignored class": (nn.CrossEntropyLoss(ignore_index=2), "no ignored"),
    "smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), "tokens"),
    "all of them": (nn.CrossEntropyLoss(CLASS_WEIGHT, ignore_index=2, label_smoothing=0.2), "no ignored"),
    "probabilities": (nn.CrossEntropyLoss(CLASS_WEIGHT, label_smoothing=0.2), "probabilities"),
    "nll": (nn.NLLLoss(CLASS_WEIGHT, ignore_index=1), "no ignored"),
    "nll of tokens": (nn.NLLLoss(CLASS_WEIGHT), "tokens"),
    "bce with logits": (nn.BCEWithLogitsLoss(CLASS_WEIGHT, pos_weight=CLASS_WEIGHT + 1), "rates"),
    "mse": (nn.MSELoss(), "numbers"),
    "l1": (nn.L1Loss(), "numbers"),
    "smooth l1": (nn.SmoothL1Loss(beta=0.3), "numbers"),
    "huber": (nn.HuberLoss(delta=0.3), "numbers"),
    "poisson": (nn.PoissonNLLLoss(full=True), "rates"),
    "hinge embedding": (nn.HingeEmbeddingLoss(), "signs"),
    "soft margin": (nn.SoftMarginLoss(), "signs"),
    "multi margin": (nn.MultiMarginLoss(weight=CLASS_WEIGHT), "no ignored"),
    "multilabel soft margin": (nn.MultiLabelSoftMarginLoss(CLASS_WEIGHT), "rates"),
    "kl, all entries": (nn.KLDivLoss(), "probabilities"),
    "kl, batch": (nn.KLDivLoss(reduction="batchmean"), "probabilities"),
    "a function": (F.mse_loss, "numbers"),
    "a function of classes": (F.cross_entropy, "classes"),
    "partial": (functools.partial(F.cross_entropy, weight=CLASS_WEIGHT, ignore_index=2), "no ignored"),
    "partial, smooth": (functools.partial(F.cross_entropy, label_smoothing=0.1, reduction="mean"), "tokens"),
    "a function that takes the mean": (lambda y, t: F.mse_loss(y, t), "numbers"),
    "a function of mine": (lambda y, t: F.cross_entropy(y, t, CLASS_WEIGHT, ignore_index=2), "no ignored"),
    "an entry's weight": (lambda y, t: F.mse_loss(y, t, weight=t.abs()), "numbers"),
    "an entry's weight, huber": (lambda y, t: F.huber_loss(y, t, weight=t.abs()), "numbers"),
    "a subclass": (type("Mine", (nn.CrossEntropyLoss,), {})(CLASS_WEIGHT), "tokens"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_is_the_losss_own(name):
    loss, kind = LOSSES[name]
    y, t = inputs(kind)
    expected = loss(y, t)
    found = Objective(loss)(y, t)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    both = [torch.autograd.grad(x, y)[0] for x in (found, expected)]
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_a_batch_come_to_the_whole(name):
    """Numerators and denominators of any split add up: what ranks do."""
    loss, kind = LOSSES[name]
    y, t = inputs(kind)
    objective = Objective(loss)
    parts = [
        objective.per_element(y[rows], t[rows])
        for rows in (slice(0, 1), slice(1, 2), slice(2, 6), slice(6, 6))
    ]
    total = sum((losses * w).sum() for losses, w in parts) / sum(w.sum() for _, w in parts)
    torch.testing.assert_close(total, loss(y, t).detach(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", [n for n, (loss, _) in LOSSES.items() if isinstance(loss, nn.Module)])
def test_advice_to_construct_it_without_reduction_leads_to_the_same(name):
    loss, kind = LOSSES[name]
    if loss.reduction == "batchmean":
        pytest.skip("none of KLDivLoss is of entries, as its mean is")
    y, t = inputs(kind)
    expected = loss(y, t)
    plain = type(loss).__new__(type(loss))
    plain.__dict__.update(loss.__dict__, reduction="none")
    torch.testing.assert_close(Objective(plain)(y, t), expected, rtol=1e-13, atol=0)
    summed = type(loss).__new__(type(loss))
    summed.__dict__.update(loss.__dict__, reduction="sum")
    objective = Objective(summed)
    assert objective.reduction == "sum"
    torch.testing.assert_close(objective(y, t), summed(y, t), rtol=1e-13, atol=0)


OPTIONS = {
    "class_weight": {"class_weight": CLASS_WEIGHT},
    "ignore_index": {"ignore_index": 2},
    "label_smoothing": {"label_smoothing": 0.3},
    "all": {"class_weight": CLASS_WEIGHT.tolist(), "ignore_index": 2, "label_smoothing": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["no ignored", "tokens", "probabilities"])
def test_options_of_the_named_loss_are_torchs(options, kind):
    given = dict(OPTIONS[options])
    y, t = inputs(kind)
    if kind == "probabilities":
        given.pop("ignore_index", None)
    if kind == "tokens":
        t = t.masked_fill(t == -100, given.get("ignore_index", -100))
    theirs = {
        ("weight" if k == "class_weight" else k): torch.as_tensor(v) if k == "class_weight" else v
        for k, v in given.items()
    }
    if "weight" in theirs:
        theirs["weight"] = theirs["weight"].to(D)
    expected = F.cross_entropy(y, t, **theirs)
    found = Objective("cross_entropy", **given)(y, t)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    both = [torch.autograd.grad(x, y)[0] for x in (found, expected)]
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-15)


def test_weights_of_the_call_multiply_the_losss_own():
    y, t = inputs("tokens")
    w = torch.rand(6, 3, generator=generator(3), dtype=D)
    own = torch.where(t == -100, 0, CLASS_WEIGHT[t.clamp(min=0)]) * w
    losses = F.cross_entropy(y, t, reduction="none")
    for loss in (nn.CrossEntropyLoss(CLASS_WEIGHT), "cross_entropy"):
        more = {"class_weight": CLASS_WEIGHT} if loss == "cross_entropy" else {}
        torch.testing.assert_close(Objective(loss, **more)(y, t, w), (losses * own).sum() / own.sum())


@pytest.mark.parametrize(
    "loss", ["cross_entropy", nn.CrossEntropyLoss(), lambda y, t: F.cross_entropy(y, t, reduction="none")]
)
def test_a_target_of_weight_zero_may_be_no_class(loss):
    y, t = inputs("no ignored")
    right = Objective("cross_entropy")(y[1:], t[1:])
    t[0] = -1
    torch.testing.assert_close(Objective(loss)(y, t, torch.tensor([0.0, 1, 1, 1, 1, 1])), right)


def test_ignored_targets_inside_a_function_are_absent():
    y, t = inputs("classes")
    expected = F.cross_entropy(y, t)
    for loss in (
        lambda y, t: F.cross_entropy(y, t, reduction="none"),
        lambda y, t: F.cross_entropy(y, t, reduction="none").view(2, 3).view(-1),
        torch.compile(lambda y, t: F.cross_entropy(y, t, reduction="none"), backend="eager"),
    ):
        torch.testing.assert_close(Objective(loss)(y, t), expected)

    def focal(y, t):
        ce = F.cross_entropy(y, t, reduction="none")
        return (1 - (-ce).exp()) ** 2 * ce

    torch.testing.assert_close(Objective(focal)(y, t), focal(y, t).sum() / 4)
    y, t = inputs("tokens")
    flat = Objective(
        lambda y, t: F.cross_entropy(y.transpose(1, 2).reshape(-1, 4), t.reshape(-1), reduction="none")
    )
    torch.testing.assert_close(flat(y, t), F.cross_entropy(y, t))
    # A mean for each sample, ignored ones and all, is the loss's own formula.
    rows = Objective(lambda y, t: F.cross_entropy(y, t, reduction="none").mean(1))
    torch.testing.assert_close(rows(y, t), F.cross_entropy(y, t, reduction="none").mean())


REFUSED = {
    "a mean of mine": (lambda y, t: ((y - t) ** 2).mean(), "numbers", "one number"),
    "two means": (lambda y, t: F.mse_loss(y, t) + F.l1_loss(y, t), "numbers", "one number"),
    "a sum": (lambda y, t: F.mse_loss(y, t, reduction="sum"), "numbers", "reduction='sum'"),
    "a mean over samples": (lambda y, t: ((y - t) ** 2).mean(0), "numbers", "not one per element"),
    "a mean that keeps axes": (
        lambda y, t: ((y - t) ** 2).mean(keepdim=True, dim=(0, 1)),
        "numbers",
        "(1, 1)",
    ),
    "pairs": (lambda y, t: (y[:, :1] - t[:, 0]) ** 2, "numbers", "not one per element"),
    "selected": (lambda y, t: ((y - t) ** 2)[t > 0], "numbers", "not one per element"),
    "weights in between": (
        lambda y, t: 2 * F.cross_entropy(y, t, CLASS_WEIGHT, reduction="none"),
        "no ignored",
        "cross_entropy",
    ),
    "another order": (
        lambda y, t: F.cross_entropy(y, t, reduction="none").t(),
        "tokens",
        "cross_entropy",
    ),
    "no tensor": (lambda y, t: [1.0], "numbers", "list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_known_is_refused(name):
    loss, kind, word = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        Objective(loss)(*inputs(kind))
    assert word in str(caught.value)


def test_a_mean_of_one_element_is_refused_as_that_of_several_is():
    """Or only the rank with several would refuse it."""
    for n in (0, 1, 3):
        with pytest.raises(ShapeError, match="one number"):
            Objective(lambda y, t: ((y - t) ** 2).mean())(torch.zeros(n), torch.zeros(n))
    assert Objective(lambda y, t: (y - t) ** 2)(torch.tensor(3.0), torch.tensor(1.0)) == 4


class Focal(nn.Module):
    """A loss as users write them."""

    def __init__(self, reduction="none", **more):
        super().__init__()
        self.reduction = reduction
        for name, value in more.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, y, t):
        return (y - t).abs() ** 3


def test_other_objects_are_believed_where_they_say_nothing_else():
    y, t = inputs("numbers")
    torch.testing.assert_close(Objective(Focal(weight=0.5))(y, t), ((y - t).abs() ** 3).mean())
    for option, value in (("reduction", "mean"), ("ignore_index", 255), ("weight", CLASS_WEIGHT)):
        with pytest.raises(ConfigError, match=option):
            Objective(Focal(**{option: value}))
    with pytest.raises(ConfigError, match="ignore_index"):
        Objective(functools.partial(lambda y, t, ignore_index=None: y, ignore_index=3))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Objective(nn.CrossEntropyLoss(reduction="sum"), reduction="mean"), "leave one"),
        (lambda: Objective(nn.MSELoss(), reduction="sequence_mean"), "leave one"),
        (lambda: Objective(nn.TripletMarginLoss()), "anchor, positive, negative"),
        (lambda: Objective(nn.GaussianNLLLoss()), "lambda"),
        (lambda: Objective(F.ctc_loss), "lambda"),
        (lambda: Objective("mse", ignore_index=3), "ignore_index"),
        (lambda: Objective("nll", label_smoothing=0.1), "label_smoothing"),
        (lambda: Objective("cross_entropy", label_smoothing=2), "0..1"),
        (lambda: Objective("cross_entropy", class_weight={0: 1.0}), "one number for each class"),
        (lambda: Objective("cross_entropy", class_weight=[1.0, -1.0]), "at least 0"),
        (lambda: Objective("cross_entropy", class_weight=[0.0, 1.0], label_smoothing=0.1), "weight 0"),
        (lambda: Objective("soft_dice", class_weight=[0.0, 1.0]), "class_weight"),
    ],
)
def test_arguments_that_cannot_be_used(make, word):
    with pytest.raises(HvdlossError) as caught:
        make()
    assert word in str(caught.value)


def test_a_weight_for_each_class():
    y, t = inputs("no ignored")
    with pytest.raises(ShapeError, match=r"3 entries.* 4 classes"):
        Objective("cross_entropy", class_weight=[1.0, 2.0, 3.0])(y, t)
    smooth = nn.CrossEntropyLoss(torch.tensor([0.0, 1, 1, 1], dtype=D), label_smoothing=0.1)
    with pytest.raises(ConfigError, match="weight 0"):
        Objective(smooth)(y, t)


def test_ctc_in_a_function_divides_as_torch_does():
    g = generator()
    y = torch.randn(7, 3, 5, generator=g, dtype=D).log_softmax(2)
    t = torch.randint(1, 5, (3, 3), generator=g)
    lengths = torch.tensor([3, 1, 2])

    def loss(y, t, reduction="mean"):
        return F.ctc_loss(y, t, torch.tensor([7, 7, 7]), lengths, reduction=reduction)

    torch.testing.assert_close(Objective(loss)(y, t), loss(y, t))
