"""Code as users of TensorFlow and Keras write it: the number of one process, or an error on every rank."""

from __future__ import annotations

import re
import warnings

import keras
import numpy as np
import tensorflow as tf
from keras_support import before_case, dataset, mine, network, sgd, step_batches, train_alone
from tf_support import Network, cuts, data, difference, part, raised, reference, weighted_mse

import hvdloss.keras as khvd
import hvdloss.tensorflow as hvd
from hvdloss.errors import ShapeError
from hvdloss.tensorflow.ops import communicator_of
from hvdloss.tensorflow.step import unwrap_graph_errors
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3")

__all__ = ["before_case"]


def refused(action, *words: str, kind: str = "RankError") -> None:
    """Assert that `action` raises the same error on every rank."""
    try:
        unwrap_graph_errors(action)
        text = "nothing"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    # Keras adds the addresses of functions around it.
    text = text[: text.find(":")] + text[max(0, text.find("step ")) : text.find("as well)")]
    text = re.sub(r" at 0x\w+", "", text)
    texts = communicator_of(hvd.global_process_set).all_gather_bytes(text.encode(), "texts")
    assert len(set(texts)) == 1, texts
    for word in (kind, *words):
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


FUNCTIONS = {
    "root": tf.sqrt,
    "square": lambda loss: loss**2,
    "logarithm": lambda loss: tf.math.log(1 + loss),
    "of each rank": lambda loss: loss * (1 + hvd.rank()),
    "left out by one": lambda loss: loss * float(hvd.rank() != 1),
}


def case_a_function_of_a_losss_value_is_refused_on_every_rank():
    """Its derivative at this rank's mean is not that at the mean of all; one number for all is fine."""
    rng = np.random.default_rng(7)
    net, objective = Network(rng), hvd.Objective("mse")
    x, y, w = data(rng, 20)
    xs, ys, ws = map(tf.constant, part((x, y, w), cuts(rng, 20, hvd.size(), empty=False)))

    def gradient(function, mine=(xs, ys, ws)):
        with tf.GradientTape() as tape:
            loss = function(objective(net(mine[0]), *mine[1:]))
        return hvd.DistributedGradientTape(tape, objective).gradient(loss, net.parameters)

    for name, function in FUNCTIONS.items():
        calls = [lambda function=function: gradient(function)]
        if name == "root":  # one that travels in a graph does so as the others
            calls.append(tf.function(calls[0], autograph=False))
        for call in calls:
            refused(call, "factors from", "global_losses", "Nothing was updated", kind="UsageError")
    factor = tf.Variable(1.0, dtype=tf.float64, trainable=False)
    traced = tf.function(lambda: gradient(lambda loss: factor * loss), autograph=False)
    for number in (3.0, 0.5, 0.0, -1.0, -1.0):
        factor.assign(number)
        expected = reference(lambda number=number: number * weighted_mse(net(x), y, w), net.parameters)
        for found in (traced(), gradient(lambda loss: factor * loss)):
            assert max(float(tf.norm(a - b)) for a, b in zip(found, expected, strict=True)) < 1e-10
    # A rank without elements has no factor, and the only one that has any tells that of all.
    mine = [tf.constant(a if hvd.rank() == 0 else a[:0]) for a in (x, y, w)]
    expected = reference(lambda: tf.sqrt(weighted_mse(net(x), y, w)), net.parameters)
    assert difference(gradient(tf.sqrt, mine), expected) < 1e-12


def case_a_function_of_a_losss_value_is_refused_in_accumulation_too():
    """Between micro-batches of one rank, where ranks have the same; a scale that changes is none."""
    rng = np.random.default_rng(8)
    x, y, w = map(tf.constant, data(rng, 12))
    for scaled in (False, True):
        net, objective = Network(rng), hvd.Objective("mse")
        plain = tf.keras.optimizers.SGD(0.01)
        plain = keras.optimizers.LossScaleOptimizer(plain, 8.0, dynamic_growth_steps=1) if scaled else plain
        optimizer = hvd.DistributedOptimizer(plain, objective, backward_passes_per_step=2)

        def step(function, net=net, objective=objective, optimizer=optimizer, scaled=scaled):
            for rows in (slice(0, 4), slice(4, 12)):
                with tf.GradientTape() as tape:
                    loss = function(objective(net(x[rows]), y[rows], w[rows]))
                    loss = optimizer.scale_loss(loss) if scaled else loss
                optimizer.apply_gradients(
                    zip(tape.gradient(loss, net.parameters), net.parameters, strict=True)
                )

        for factor in (2.0, 2.0, 3.0):
            expected = reference(
                lambda factor=factor, net=net: factor * weighted_mse(net(x), y, w), net.parameters
            )
            moved = [p - 0.01 * g for p, g in zip(net.parameters, expected, strict=True)]
            step(lambda loss, factor=factor: factor * loss)
            assert difference(net.parameters, moved) < 1e-12
        refused(lambda step=step: step(tf.sqrt), "micro-batches of rank", kind="UsageError")


def case_a_function_of_the_loss_in_a_train_step_is_refused():
    """Of what compute_loss gives, with a regularizer in it."""

    class Root(keras.Model):
        def compute_loss(self, *args, **kwargs):
            return tf.sqrt(super().compute_loss(*args, **kwargs))

    x, y, _ = data(np.random.default_rng(9), 8 * hvd.size())
    rows = slice(8 * hvd.rank(), 8 * hvd.rank() + 8)
    inner = network()
    for losses in ("mse", ["mse", "mae"]):
        outputs = inner.outputs if losses == "mse" else [inner.outputs[0], 2 * inner.outputs[0]]
        model = Root(inner.inputs, outputs)
        model.compile(khvd.DistributedOptimizer(sgd()), loss=losses)
        targets = y[rows] if losses == "mse" else [y[rows], y[rows]]
        before = model.get_weights()
        refused(
            lambda model=model, targets=targets: model.fit(x[rows], targets, verbose=0),
            "factors from",
            kind="UsageError",
        )
        assert difference(model.get_weights(), before) == 0


def case_a_weight_that_carries_a_gradient_is_refused():
    rng = np.random.default_rng(10)
    net, objective = Network(rng), hvd.Objective("mse")
    x, y, w = data(rng, 20)
    where = cuts(rng, 20, hvd.size(), empty=False)
    xs, ys, ws = map(tf.constant, part((x, y, w), where))

    def weights(p, w):
        return w * tf.exp(-p)

    def forward(detached):
        p = net(xs)
        weight = weights(tf.stop_gradient(p) if detached else p, ws)
        return objective(p, ys, weight if hvd.rank() == 0 or detached else ws)

    def gradient(detached, forward=forward):
        with tf.GradientTape() as tape:
            loss = forward(detached)
        return hvd.DistributedGradientTape(tape, objective).gradient(loss, net.parameters)

    inner = tf.function(forward, autograph=False)
    for call in (gradient, tf.function(gradient, autograph=False), lambda some: gradient(some, inner)):
        refused(lambda call=call: call(False), "rank 0", "carries a gradient", "stop_gradient")
        fixed = weights(net(x), w)
        expected = reference(lambda fixed=fixed: weighted_mse(net(x), y, fixed), net.parameters)
        assert difference(call(True), expected) < 1e-12

    class Weighing(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return super().compute_loss(x, y, y_pred, tf.squeeze(tf.exp(-y_pred), -1), training)

    inner = network()
    model = Weighing(inner.inputs, inner.outputs)
    model.compile(khvd.DistributedOptimizer(sgd()), loss=khvd.Objective("mse"))
    before = model.get_weights()
    refused(lambda: model.fit(xs, ys, batch_size=20, verbose=0), "carries a gradient")
    assert difference(model.get_weights(), before) == 0


def case_a_weight_that_fits_the_losses_in_two_ways_is_refused():
    objective, square = hvd.Objective("mse"), tf.ones((3, 3), tf.float64)
    w = tf.constant([1.0, 2.0, 4.0], tf.float64)
    for call in (objective, tf.function(objective, autograph=False)):
        error = raised(lambda call=call: call(square, 2 * square, w))
        assert isinstance(error, ShapeError), error
        for words in ("weight[:, None]", "weight[None, :]"):
            assert words in str(error), error
    rows = tf.constant([[1.0], [2.0], [3.0]], tf.float64) * square
    for weight in (w[:, None], w[None, :]):
        expected = weighted_mse(rows, 0 * square, weight)
        assert abs(float(objective(rows, 0 * square, weight) / expected) - 1) < 1e-12


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
        for own, theirs in zip(other.parameters, net.parameters, strict=True):
            own.assign(theirs)
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

    for ours, alone in (
        (loss(), loss()),
        (khvd.Objective(loss(reduction=None)), loss()),
        (khvd.Objective("cross_entropy", ignore_index=2), loss()),
    ):
        model, one = network(out=3), network(out=3)
        model.compile(khvd.DistributedOptimizer(sgd()), loss=ours)
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


class OwnStep(keras.Model):
    """A model whose train_step changes gradients before it gives them to the optimizer."""

    change = None

    def train_step(self, batch):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
            scaled = self.optimizer.scale_loss(loss)
        variables = self.trainable_variables
        self.optimizer.apply(self.change(tape.gradient(scaled, variables)), variables)
        return {"loss": loss}


def centred(gradients):
    """Return twice the gradients of matrices without their means, and the other gradients halved."""
    return [2 * (g - tf.reduce_mean(g, 0)) if len(g.shape) > 1 else g / 2 for g in gradients]


def case_gradients_changed_before_the_optimizer_takes_them():
    """Exact if linearly; clipped ones are refused, and eagerly, where it cannot be known, warned of once."""
    x, y, _ = data(np.random.default_rng(11), 20)
    rows = slice(*cuts(np.random.default_rng(12), 20, hvd.size(), empty=False)[hvd.rank() :][:2])

    def model(change, optimizer=sgd, ours=True, **options):
        made = network()
        made = OwnStep(made.inputs, made.outputs)
        made.change = change
        made.compile(khvd.DistributedOptimizer(optimizer()) if ours else optimizer(), loss="mse", **options)
        return made

    def fit(one, rows=rows):
        one.fit(x[rows], y[rows], batch_size=20, epochs=2, verbose=0)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for optimizer in (sgd, lambda: keras.optimizers.LossScaleOptimizer(sgd(), 8.0)):
            ours, alone = model(centred, optimizer), model(centred, optimizer, ours=False)
            fit(ours)
            fit(alone, slice(None))
            assert difference(ours.get_weights(), alone.get_weights()) < 1e-12
    assert not [one for one in told if "tape.gradient gave" in str(one.message)]
    if hvd.size() == 1:
        return
    for optimizer, clip in (
        (sgd, lambda gradients: tf.clip_by_global_norm(gradients, 1.0)[0]),
        (
            lambda: keras.optimizers.LossScaleOptimizer(sgd(), 8.0),
            lambda gradients: [tf.clip_by_value(g, -0.1, 0.1) for g in gradients],
        ),
    ):
        ours = model(clip, optimizer)
        before = ours.get_weights()
        refused(lambda ours=ours: fit(ours), "was clipped", "global_clipnorm")
        assert difference(ours.get_weights(), before) == 0
    ours = model(lambda gradients: tf.clip_by_global_norm(gradients, 1.0)[0], run_eagerly=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(ours)
    assert sum("tape.gradient gave" in str(one.message) for one in told) == 1, told


def normalized(synchronized):
    """Return a model with a layer of batch normalisation, the same on every rank."""
    keras.utils.set_random_seed(3)
    layers = keras.layers.Dense(4), keras.layers.BatchNormalization(synchronized=synchronized, name="norm")
    return keras.Sequential([keras.Input((5,)), *layers, keras.layers.Dense(1, activation="tanh")])


def case_synchronized_batch_normalization_is_one_processs():
    """Values, gradients and moving statistics, whatever each rank holds and weighs; masks too."""
    rng = np.random.default_rng(13)
    error = 0.0
    for shape, mask in (((9, 3), False), ((9, 4, 3), True)):
        ours, alone = hvd.SyncBatchNormalization(name="mine"), keras.layers.BatchNormalization()
        for layer in (ours, alone):
            layer.build(shape)
        x, price = (
            rng.normal(size=shape) + np.arange(9.0).reshape(-1, *[1] * (len(shape) - 1)),
            rng.normal(size=shape),
        )
        kept = rng.uniform(size=shape[:-1]) > 0.3

        def run(layer, x, price, kept, mask=mask):
            with tf.GradientTape() as tape:
                tape.watch(x)
                out = layer(x, training=True, mask=kept if mask else None)
                value = tf.reduce_sum(price * tf.tanh(out))
            return [out, *tape.gradient(value, [x, layer.gamma.value, layer.beta.value])]

        for call in (run, tf.function(run, autograph=False, reduce_retracing=True)):
            where = cuts(rng, 9, hvd.size())
            right = run(alone, *map(tf.constant, (x, price, kept)))
            found = call(ours, *map(tf.constant, part((x, price, kept), where)))
            found[2:] = [hvd.allreduce(g, op=hvd.Sum, name=f"norm.{i}") for i, g in enumerate(found[2:])]
            right[:2] = part(right[:2], where)
            error = max(error, *(difference([a], [b]) for a, b in zip(found, right, strict=True) if len(b)))
            error = max(error, difference(ours.get_weights(), alone.get_weights()))
    assert error < 1e-12, error

    ours, alone, objective = normalized(True), normalized(False), hvd.Objective("mse")
    x, y, w = data(rng, 20)

    def gradient(x, y, w):
        with tf.GradientTape() as tape:
            loss = objective(ours(x, training=True), y, w) + tf.reduce_sum(ours.weights[0] ** 2)
        return hvd.DistributedGradientTape(tape, objective).gradient(loss, ours.trainable_variables)

    def right(w):
        loss = weighted_mse(alone(x, training=True), y, w) + tf.reduce_sum(alone.weights[0] ** 2)
        return loss

    where = cuts(rng, 20, hvd.size(), empty=False)
    for call in (gradient, tf.function(gradient, autograph=False)):
        w[:] = rng.permutation(w)
        w[where[:-1]] = 1.0
        expected = reference(lambda: right(w), [v.value for v in alone.trainable_variables])
        found = call(*map(tf.constant, part((x, y, w), where)))
        error = max(error, difference(found, expected))
        assert error < 1e-12, error
        if hvd.size() > 1:
            none = w * (np.arange(20)[:, None] >= where[1])
            refused(
                lambda call=call, none=none: call(*map(tf.constant, part((x, y, none), where))),
                "SyncBatchNormalization",
                kind="UsageError",
            )

    ours, alone = normalized(True), normalized(False)
    ours.compile(khvd.DistributedOptimizer(sgd()), loss=khvd.Objective("mse"))
    alone.compile(sgd(), loss=keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"))
    steps = step_batches(rng, 3)
    ours.fit(dataset(mine(steps)), epochs=2, verbose=0)
    train_alone(alone, steps, 2)
    error = max(error, difference(ours.get_weights(), alone.get_weights()))
    assert error < 1e-10, error
    if hvd.size() > 1:
        refused(
            lambda: ours.fit(dataset(mine(steps)[: 2 + (hvd.rank() > 0)]), verbose=0),
            "'norm'",
            "needs all ranks in every step",
            kind="ConfigError",
        )
    return {"error": error}


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
