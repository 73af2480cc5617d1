"""What losses of TensorFlow and Keras say of their elements; what has none is refused."""

from __future__ import annotations

import functools

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

import keras  # noqa: E402

import hvdloss.keras as khvd  # noqa: E402
from hvdloss.errors import ConfigError, HvdlossError  # noqa: E402
from hvdloss.tensorflow import Objective  # noqa: E402

rng = np.random.default_rng(0)
Y = rng.normal(size=(6, 4))
INDEX = np.array([0, 3, 1, 2, 2, 1])
SHARE = np.exp(Y[::-1]) / np.exp(Y[::-1]).sum(1, keepdims=True)
WEIGHT = [0.5, 2.0, 1.0, 3.0]


def _log_softmax(y):
    return y - np.log(np.exp(y).sum(-1, keepdims=True))


def test_functions_of_tf_nn_get_their_arguments_in_their_order():
    y, t = tf.constant(Y), tf.constant(SHARE)
    expected = -(SHARE * _log_softmax(Y)).sum(1).mean()
    assert float(Objective(tf.nn.softmax_cross_entropy_with_logits)(y, t)) == pytest.approx(
        expected, rel=1e-12
    )
    expected = -_log_softmax(Y)[np.arange(6), INDEX].mean()
    loss = Objective(tf.nn.sparse_softmax_cross_entropy_with_logits)
    assert float(loss(y, tf.constant(INDEX))) == pytest.approx(expected, rel=1e-12)
    weighted = Objective(functools.partial(tf.nn.weighted_cross_entropy_with_logits, pos_weight=3.0))
    expected = tf.nn.weighted_cross_entropy_with_logits(labels=t, logits=y, pos_weight=3.0).numpy().mean()
    assert float(weighted(y, t)) == pytest.approx(expected, rel=1e-12)


def test_losses_of_keras_get_their_arguments_in_their_order():
    y, t = tf.sigmoid(tf.constant(Y)), tf.constant((SHARE > 0.3).astype(float))
    expected = keras.losses.BinaryCrossentropy(reduction=None, dtype="float64")(t, y).numpy().mean()
    for loss in (
        keras.losses.BinaryCrossentropy(reduction=None),
        keras.losses.BinaryCrossentropy(reduction="mean_with_sample_weight"),
        keras.losses.binary_crossentropy,
    ):
        assert float(Objective(loss)(y, t)) == pytest.approx(expected, rel=1e-6)
        assert float(khvd.Objective(loss)(t, y)) == pytest.approx(expected, rel=1e-6)

    # A function of its own order is called in that, by either objective.
    def odd(y_pred, y_true):
        return y_pred - 2 * y_true

    assert float(khvd.Objective(odd)(t, y)) == pytest.approx(float(tf.reduce_mean(y - 2 * t)))
    assert float(Objective(odd)(y, t)) == pytest.approx(float(tf.reduce_mean(y - 2 * t)))


def test_what_keras_masks_is_absent():
    losses = -_log_softmax(Y)[np.arange(6), INDEX]
    kept = INDEX != 2
    expected = losses[kept].mean()
    y, t = tf.constant(Y), tf.constant(INDEX)
    plain = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=2, reduction=None)
    function = functools.partial(
        keras.losses.sparse_categorical_crossentropy, from_logits=True, ignore_class=2
    )
    assert float(Objective(plain)(y, t)) == pytest.approx(expected, rel=1e-6)
    assert float(khvd.Objective(plain)(t, y)) == pytest.approx(expected, rel=1e-6)
    mine = lambda t, y: function(t, y)  # noqa: E731
    assert float(khvd.Objective(mine)(t, y)) == pytest.approx(expected, rel=1e-6)
    w = np.arange(1.0, 7.0)
    expected = (losses * w)[kept].sum() / w[kept].sum()
    assert float(khvd.Objective(plain)(t, y, w)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["index", "tokens", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_options_of_the_named_loss_are_torchs(kind, smoothing, weight):
    torch = pytest.importorskip("torch")
    import hvdloss.torch as hvt

    y = rng.normal(size=(6, 3, 4))
    t = rng.integers(0, 4, size=(6, 3))
    options = {"ignore_index": 2, "label_smoothing": smoothing, "class_weight": weight}
    theirs = torch.tensor(np.moveaxis(y, -1, 1), requires_grad=True)
    target = t
    if kind == "probabilities":
        options.pop("ignore_index")
        target = np.moveaxis(np.exp(y) / np.exp(y).sum(-1, keepdims=True), -1, 1)
        t = np.moveaxis(target, 1, -1)
    elif kind == "index":
        y, theirs = y[:, 0], torch.tensor(y[:, 0], requires_grad=True)
        t = target = t[:, 0]
    w = rng.uniform(size=t.shape[: y.ndim - 1])
    expected = hvt.Objective("cross_entropy", **options)(theirs, torch.tensor(target), torch.tensor(w))
    expected.backward()
    ours = tf.Variable(y)
    with tf.GradientTape() as tape:
        loss = Objective("cross_entropy", **options)(ours, t, w)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-12)
    gradient = theirs.grad.numpy()
    gradient = gradient if kind == "index" else np.moveaxis(gradient, 1, -1)
    np.testing.assert_allclose(tape.gradient(loss, ours), gradient, rtol=1e-11, atol=1e-15)


def test_a_target_of_weight_zero_may_be_no_class():
    w = np.array([0.0, 1, 1, 1, 1, 1])
    t = INDEX.copy()
    t[0] = -1
    expected = -_log_softmax(Y)[np.arange(6), INDEX][1:].mean()
    assert float(Objective("cross_entropy")(tf.constant(Y), t, w)) == pytest.approx(expected, rel=1e-12)
    assert float(khvd.Objective("cross_entropy")(t, tf.constant(Y), w)) == pytest.approx(expected, rel=1e-6)


REFUSED = {
    "a mean": lambda y, t: tf.reduce_mean((y - t) ** 2),
    "a mean over samples": lambda y, t: tf.reduce_mean((y - t) ** 2, 0),
    "pairs": lambda y, t: (y[:, :1] - t[:, 0]) ** 2,
    "dice": keras.losses.Dice(reduction=None),
    "tversky": keras.losses.Tversky(reduction=None),
    "circle": keras.losses.Circle(reduction=None),
    "a loss of tf.compat.v1": tf.compat.v1.losses.mean_squared_error,
    "keras's mean": keras.losses.MeanSquaredError(),
    "an option": functools.partial(lambda y, t, ignore_class=0: y - t, ignore_class=3),
}


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_known_is_refused(name, graph):
    def call():
        Objective(REFUSED[name])(tf.constant(Y), tf.constant(SHARE))

    with pytest.raises(ConfigError):
        (tf.function(call) if graph else call)()


@pytest.mark.parametrize(
    "loss",
    [
        keras.losses.Dice(),
        keras.losses.Tversky(),
        keras.losses.Circle(),
        keras.losses.dice,
        lambda t, y: keras.ops.mean(keras.ops.square(t - y)),
        lambda t, y: keras.ops.mean(keras.ops.square(t - y), 0),
    ],
)
def test_what_fit_cannot_know_is_refused(loss):
    i = keras.Input((4,))
    model = keras.Model(i, keras.layers.Dense(4)(i))

    def fit():
        model.compile(khvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), loss=loss)
        model.fit(Y, SHARE, batch_size=6, verbose=0)

    with pytest.raises(HvdlossError, match=r"one number|not one per element|Circle"):
        fit()
