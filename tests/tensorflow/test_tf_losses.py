"""TensorFlow's operations and named losses, held against NumPy and PyTorch in one process."""

from __future__ import annotations

import traceback

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

import hvdloss.tensorflow as hvd  # noqa: E402
from hvdloss.errors import ConfigError, ShapeError  # noqa: E402
from hvdloss.losses.numpy_ops import NumpyOps  # noqa: E402
from hvdloss.losses.reduction import REDUCTIONS, reduce_losses  # noqa: E402
from hvdloss.step.objective import LOSSES  # noqa: E402
from hvdloss.tensorflow import Objective  # noqa: E402
from hvdloss.tensorflow.ops import NAMED_LOSSES, TensorFlowOps  # noqa: E402


def inputs(name: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    y = rng.normal(size=(7, 3))
    if name in ("cross_entropy", "nll"):
        return np.log(np.exp(y) / np.exp(y).sum(1, keepdims=True)), np.array([0, 1, 2, -100, 2, 1, 0])
    if name == "binary_cross_entropy":
        y = 1 / (1 + np.exp(-y))
    t = rng.uniform(0.1, 1.0, size=y.shape)
    return y, np.sign(t - 0.5) if name == "hinge" else t


def test_all_names_are_known():
    assert set(NAMED_LOSSES) == set(LOSSES)


@pytest.mark.parametrize("reduction", ["mean", "batch_mean"])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_named_losses_agree_with_torch_in_value_and_gradient(name: str, reduction: str):
    torch = pytest.importorskip("torch")
    import hvdloss.torch as hvt

    y, t = inputs(name)
    w = np.random.default_rng(2).uniform(size=t.shape) * (np.arange(t.size).reshape(t.shape) % 4 > 0)
    theirs = torch.tensor(y, requires_grad=True)
    expected = hvt.Objective(name, reduction=reduction)(theirs, torch.tensor(t), torch.tensor(w))
    expected.backward()
    ours = tf.Variable(y)
    with tf.GradientTape() as tape:
        loss = Objective(name, reduction=reduction)(ours, t, w)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-12)
    gradient = tf.convert_to_tensor(tape.gradient(loss, ours))
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("function", [False, True])
def test_contributions_agree_with_numpy(reduction: str, function: bool):
    rng = np.random.default_rng(3)
    losses, w = rng.normal(size=(5, 4)), rng.uniform(size=(5, 1)) * (np.arange(5) % 2)[:, None]

    def row(losses, w):
        return reduce_losses(TensorFlowOps(), losses, w, reduction).row(TensorFlowOps())

    if function:
        unknown = [tf.TensorSpec((None, None), tf.float64), tf.TensorSpec((None, 1), tf.float64)]
        row = tf.function(row, input_signature=unknown)
    expected = reduce_losses(NumpyOps(), losses, w, reduction).row(NumpyOps())
    np.testing.assert_allclose(row(tf.constant(losses), tf.constant(w)), expected, rtol=1e-14)


def test_a_number_as_weight_is_not_rounded():
    part = Objective("mse").contribute(tf.zeros(3, tf.float64), np.ones(3), 0.3).part
    assert float(part.weight) == pytest.approx(0.9, rel=1e-15)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="same shape"):
        Objective("mse")(tf.zeros((4, 1)), tf.zeros(4))
    with pytest.raises(ShapeError, match="does not broadcast"):
        Objective("mse")(tf.zeros((4, 2)), tf.zeros((4, 2)), tf.ones(4))
    with pytest.raises(ConfigError, match="not known"):
        Objective("squared")


@pytest.mark.parametrize("converts", [True, False])
def test_autograph_converts_a_users_loss_and_nothing_here(converts: bool):
    """Converting the library took 20 s in the first graph; what a user writes is converted as it ever was."""
    generated: set[str] = set()
    stack = tf.autograph.experimental.do_not_convert(traceback.extract_stack)

    def helper(y):
        if tf.reduce_sum(y) > 0:  # on a tensor: only AutoGraph can
            y = 2 * y
        return y

    def loss(y, t):
        generated.update(f.name for f in stack() if "autograph_generated" in f.filename)
        return helper(y) if converts else y

    objective = Objective(loss)

    @tf.function(autograph=converts)
    def step(y):
        with tf.GradientTape() as tape:
            tape.watch(y)
            value = objective(y, y)
        return hvd.DistributedGradientTape(tape, objective).gradient(value, y)

    hvd.init()
    factor = 2.0 if converts else 1.0
    np.testing.assert_allclose(step(tf.constant([1.0, 2.0])), [factor / 2] * 2)
    np.testing.assert_allclose(step(tf.constant([-1.0, -2.0])), [0.5] * 2)
    assert {name for name in generated if name.startswith("tf__")} == (
        {"tf__step", "tf__loss"} if converts else set()
    )
