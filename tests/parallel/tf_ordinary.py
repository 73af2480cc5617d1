"""Code as users of TensorFlow and Keras write it: the number of one process, or an error on every rank."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import tensorflow as tf
from keras_support import before_case, network, sgd
from tf_support import Network, cuts, data, difference, part, reference, weighted_mse

import hvdloss.keras as khvd
import hvdloss.tensorflow as hvd
from hvdloss.tensorflow.books import translated
from hvdloss.tensorflow.ops import communicator_of
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3")

__all__ = ["before_case"]


def refused(action, *words: str) -> None:
    """Assert that `action` raises the same RankError on every rank."""
    try:
        translated(action)
        text = "nothing"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    # Keras adds the addresses of functions around it.
    text = text[: text.find(":")] + text[max(0, text.find("step ")) : text.find("as well)")]
    texts = communicator_of(hvd.global_process_set).all_gather_bytes(text.encode(), "texts")
    assert len(set(texts)) == 1, texts
    for word in ("RankError", *words):
        assert word in text, text


def case_two_objectives_in_one_tape_are_refused_by_name():
    rng = np.random.default_rng(1)
    net = Network(rng)
    x, y, w = data(rng, 20)
    xs, ys, ws = map(tf.constant, part((x, y, w), cuts(rng, 20, hvd.size(), empty=False)))
    ours, other = hvd.Objective("mse"), hvd.Objective("huber")

    def gradient(both: bool):
        with tf.GradientTape() as tape:
            loss = ours(net(xs), ys, ws)
            loss = loss + other(net(xs), ys, tf.ones_like(ws)) if both else loss
        return hvd.DistributedGradientTape(tape, ours).gradient(loss, net.parameters)

    for call in (gradient, tf.function(gradient)):
        refused(lambda call=call: call(True), "'huber'", "'mse'")
        expected = reference(lambda: weighted_mse(net(x), y, w), net.parameters)
        assert difference(call(False), expected) < 1e-12


def case_an_objective_that_no_optimizer_has_is_refused_by_name():
    rng = np.random.default_rng(2)
    x, y, w = data(rng, 20)
    xs, ys, ws = map(tf.constant, part((x, y, w), cuts(rng, 20, hvd.size(), empty=False)))
    for given in (None, hvd.Objective("mse")):
        net, other = Network(rng), hvd.Objective("huber")
        optimizer = hvd.DistributedOptimizer(tf.keras.optimizers.SGD(0.05), given)

        def step(net=net, other=other, given=given, optimizer=optimizer):
            with tf.GradientTape() as tape:
                loss = other(net(xs), ys, ws)
                if given is not None:
                    loss += given(net(xs), ys, ws)
            gradients = tape.gradient(loss, net.parameters)
            optimizer.apply_gradients(zip(gradients, net.parameters, strict=True))

        before = [p.numpy() for p in net.parameters]
        for call in (step, tf.function(step)):
            refused(call, "'huber'", "objective=" if given is None else "'mse'")
        assert difference(net.parameters, before) == 0


def case_a_loss_divided_by_the_number_of_passes():
    """Undone; and what is divided otherwise, or multiplied with a scale, is left as it is."""
    rng = np.random.default_rng(3)
    for passes, scaled in ((3, False), (2, True)):
        net, other = Network(rng), Network(np.random.default_rng(0))
        for mine, theirs in zip(other.parameters, net.parameters, strict=True):
            mine.assign(theirs)
        objective = hvd.Objective("mse")
        inner = tf.keras.optimizers.SGD(0.05, momentum=0.9)
        plain = keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**6) if scaled else inner
        optimizer = hvd.DistributedOptimizer(plain, objective, backward_passes_per_step=passes)
        alone = tf.keras.optimizers.SGD(0.05, momentum=0.9)

        def micro(x, y, w, divisor, net=net, objective=objective, optimizer=optimizer, scaled=scaled):
            with tf.GradientTape() as tape:
                loss = (objective(net(x), y, w) + 0.1 * tf.reduce_sum(net.w1**2)) / tf.cast(
                    divisor, tf.float64
                )
                loss = optimizer.scale_loss(loss) if scaled else loss
            optimizer.apply_gradients(zip(tape.gradient(loss, net.parameters), net.parameters, strict=True))

        for step in (micro, tf.function(micro, reduce_retracing=True)):
            for divisor in (passes, 1) if step is not micro else (passes,):
                x, y, w = data(rng, 40)
                where = cuts(rng, 40, hvd.size() * passes)
                for m in range(passes):
                    mine = part((x, y, w), where, passes * hvd.rank() + m)
                    step(*map(tf.constant, mine), tf.constant(divisor))

                def whole(x=x, y=y, w=w, other=other):
                    return weighted_mse(other(x), y, w) + 0.1 * tf.reduce_sum(other.w1**2)

                expected = reference(whole, other.parameters)
                alone.apply_gradients(zip(map(tf.constant, expected), other.parameters, strict=True))
                assert difference(net.parameters, other.parameters) < 1e-12, (passes, scaled, divisor)


def case_several_losses_divided_by_the_number_of_passes_are_refused():
    rng = np.random.default_rng(4)
    net, objective = Network(rng), hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(tf.keras.optimizers.SGD(0.05), objective, backward_passes_per_step=2)
    x, y, w = map(tf.constant, data(rng, 8))

    def step():
        for _ in range(2):
            with tf.GradientTape() as tape:
                loss = 0.5 * objective(net(x), y, w) + 0.5 * objective(net(2 * x), y, w)
            optimizer.apply_gradients(zip(tape.gradient(loss, net.parameters), net.parameters, strict=True))

    refused(step, "1/2")


def case_what_a_loss_masks_is_absent():
    rng = np.random.default_rng(5)
    x, t = rng.normal(size=(24, 5)), rng.integers(0, 3, size=24)
    t[:9] = 2
    where = cuts(rng, 24, hvd.size(), empty=False)
    a, b = where[hvd.rank()], where[hvd.rank() + 1]

    def loss(**options):
        return keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, ignore_class=2, dtype="float64", **options
        )

    for mine, alone in (
        (loss(), loss()),
        (khvd.Objective(loss(reduction=None)), loss()),
        (khvd.Objective("cross_entropy", ignore_index=2), loss()),
    ):
        model, one = network(out=3), network(out=3)
        model.compile(khvd.DistributedOptimizer(sgd()), loss=mine)
        one.compile(sgd(), loss=alone)
        model.fit(x[a:b], t[a:b], batch_size=24, epochs=2, verbose=0, shuffle=False)
        one.fit(x, t, batch_size=24, epochs=2, verbose=0, shuffle=False)
        assert difference(model.get_weights(), one.get_weights()) < 1e-10, alone


class OwnLoss(keras.Model):
    """A model that knows its loss itself, as in Keras's guide."""

    def __init__(self):
        super().__init__()
        self.layer = keras.layers.Dense(1)

    def call(self, x):
        return self.layer(x)

    def train_step(self, batch):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x) - y) ** 2)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


def case_a_train_step_with_its_own_loss_is_warned_of_once():
    x, y = np.ones((4, 3)), np.ones((4, 1))
    keras.utils.set_random_seed(1)
    model = OwnLoss()
    model.compile(khvd.DistributedOptimizer(sgd()))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            model.fit(x, y, verbose=0)
    ours = [str(one.message) for one in told if "OwnLoss was compiled without a loss" in str(one.message)]
    assert len(ours) == (hvd.size() > 1), told
    assert all("hvd.Objective" in text for text in ours)


def case_local_variables_may_be_named_before_the_optimizer_is_built():
    keras.utils.set_random_seed(1)
    found = []
    for early in (False, True):
        keras.utils.set_random_seed(1)
        i = keras.Input((3,))
        model = keras.Model(i, keras.layers.Dense(1)(i))
        optimizer = khvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
        if not early:
            optimizer.build(model.trainable_variables)
        optimizer.register_local_var(model.trainable_variables[0])
        model.compile(optimizer, loss="mse")
        data = np.full((4, 3), 1.0 + hvd.rank())
        callbacks = [khvd.SynchronizationCallback(at_epoch_end=False)]
        model.fit(data, np.ones((4, 1)), verbose=0, callbacks=callbacks)
        found.append(model.get_weights())
    assert difference(*found) == 0
    kernels = communicator_of(hvd.global_process_set).all_gather_bytes(found[0][0].tobytes(), "kernels")
    assert len(set(kernels)) == hvd.size()
