"""Keras's fit under real ranks: the weights of one process that saw the union of all batches."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras_support import (
    before_case,
    data,
    dataset,
    difference,
    mine,
    network,
    same_on_all_ranks,
    sgd,
    step_batches,
    train_alone,
    trial,
    union,
)
from tf_support import cuts, raised

import hvdloss.keras as hvd
from hvdloss.errors import AgreementError, ConfigError, NonFiniteLossError, WeightError
from tests.ranks import needs

NEEDS = needs("gloo-2")

__all__ = ["before_case"]

WEIGHTED = keras.losses.MeanSquaredError


def exact_alone():
    return WEIGHTED(reduction="mean_with_sample_weight")


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
def case_a_string_loss_and_a_regularizer():
    # Every step is a random split of its own.
    return trial(step_batches(np.random.default_rng(1), 12), epochs=2)


def case_plain_averaging_would_be_wrong():
    steps = step_batches(np.random.default_rng(1), 12)
    model, other = network(), network()
    model.compile(sgd(), loss="mse")
    other.compile(sgd(), loss="mse")
    for step in steps:  # average what each rank's local step would use
        x, y, w = step[hvd.rank()]
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, tf.constant(y), model(x), tf.constant(w))
        variables = model.trainable_variables
        local = tape.gradient(loss, variables)
        model.optimizer.apply([hvd.allreduce(g, name=f"g{i}") for i, g in enumerate(local)], variables)
    train_alone(other, steps)
    error = difference(model.get_weights(), other.get_weights())
    assert error > 1e-3
    return {"plain averaging": error}


@needs(more="gloo-2")
def case_other_losses_of_keras():
    rng = np.random.default_rng(5)
    steps = step_batches(rng, 3)
    for loss in (
        keras.losses.Huber(),
        keras.losses.MeanAbsoluteError(reduction="sum"),
        exact_alone(),
        lambda y, p: keras.ops.mean(keras.ops.square(y - p) ** 2, axis=-1),
    ):
        trial(steps, loss=loss)


def case_class_weights_and_cross_entropy():
    rng = np.random.default_rng(6)
    x = rng.normal(size=(40, 5))
    t = rng.integers(0, 3, size=40)
    where = cuts(rng, 40, hvd.size(), empty=False)
    a, b = where[hvd.rank()], where[hvd.rank() + 1]
    weight = {0: 1.0, 1: 5.0, 2: 0.5}

    def make():
        return network(out=3)

    for loss, alone in (
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True),) * 2,
        (
            hvd.Objective("cross_entropy"),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight"),
        ),
    ):
        model, other = make(), make()
        model.compile(hvd.DistributedOptimizer(sgd()), loss=loss)
        other.compile(sgd(), loss=alone)
        options = {"class_weight": weight, "epochs": 3, "batch_size": 64, "verbose": 0, "shuffle": False}
        model.fit(x[a:b], t[a:b], **options)
        other.fit(x, t, **options)
        assert difference(model.get_weights(), other.get_weights()) < 1e-10


def case_masks():
    rng = np.random.default_rng(7)

    def make():
        keras.utils.set_random_seed(3)
        i = keras.Input((6, 2))
        h = keras.layers.Masking()(i)
        return keras.Model(i, keras.layers.Dense(1)(keras.layers.Dense(3, activation="tanh")(h)))

    x = rng.normal(size=(20, 6, 2))
    for row, length in enumerate(rng.integers(1, 7, size=20)):
        x[row, length:] = 0.0
    y = rng.normal(size=(20, 6, 1)) + np.linspace(-2, 2, 20)[:, None, None]
    where = cuts(rng, 20, hvd.size(), empty=False)
    a, b = where[hvd.rank()], where[hvd.rank() + 1]
    for loss, alone in (("mse", "mse"), (hvd.Objective("mse"), "mse")):
        model, other = make(), make()
        model.compile(hvd.DistributedOptimizer(sgd()), loss=loss)
        other.compile(sgd(), loss=alone)
        for _ in range(3):
            model.train_on_batch(x[a:b], y[a:b])
            other.train_on_batch(x, y)
        assert difference(model.get_weights(), other.get_weights()) < 1e-10


def case_add_loss_and_activity_regularizers_count_once():
    class Penalised(keras.layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(shape[-1],), initializer="ones")

        def call(self, x):
            self.add_loss(0.3 * keras.ops.sum(self.w**2))
            return x * self.w

    def make():
        keras.utils.set_random_seed(3)
        i = keras.Input((5,))
        h = Penalised()(keras.layers.Dense(4, activation="tanh")(i))
        return keras.Model(i, keras.layers.Dense(1)(h))

    return trial(step_batches(np.random.default_rng(8), 5), make=make)


def _two_outputs():
    keras.utils.set_random_seed(3)
    i = keras.Input((5,))
    h = keras.layers.Dense(4, activation="tanh", kernel_regularizer=keras.regularizers.L2(0.02))(i)
    return keras.Model(i, [keras.layers.Dense(1, name="a")(h), keras.layers.Dense(1, name="b")(h)])


def _two_weights(steps, rng):
    # The second output has weights of its own, so that its normaliser is another one.
    return [[(x, (y, y**2), (w, rng.uniform(size=w.shape) * (x[:, 0] > 0))) for x, y, w in s] for s in steps]


@needs(more="gloo-2 gloo-3 gloo-4 mpi-2")
def case_several_outputs_with_their_own_losses_and_weights():
    rng = np.random.default_rng(9)
    steps = _two_weights(step_batches(rng, 5), rng)
    found = trial(
        steps,
        make=_two_outputs,
        loss=[hvd.Objective("mse"), hvd.Objective("mae")],
        alone=[exact_alone(), keras.losses.MeanAbsoluteError(reduction="mean_with_sample_weight")],
        loss_weights=[1.0, 0.3],
    )
    trial(steps, make=_two_outputs, loss=["mse", "mae"], loss_weights=[1.0, 0.3])
    return found


def case_several_outputs_report_their_exact_total():
    rng = np.random.default_rng(10)
    steps = _two_weights(step_batches(rng, 1), rng)
    model = _two_outputs()
    losses = [hvd.Objective("mse"), hvd.Objective("mae")]
    model.compile(hvd.DistributedOptimizer(sgd()), loss=losses, loss_weights=[1.0, 0.3])
    x, (y, z), (v, w) = union(steps[0])
    a, b = (np.asarray(p) for p in model(x))
    total = (v[:, None] * (a - y) ** 2).sum() / v.sum() + 0.3 * (w[:, None] * abs(b - z)).sum() / w.sum()
    model.fit(dataset(mine(steps)), verbose=0)
    assert abs(model.optimizer.last_step.loss / total - 1) < 1e-12, (model.optimizer.last_step, total)


def case_gradient_accumulation():
    rng = np.random.default_rng(11)
    micro = step_batches(rng, 6)
    pairs = [[*a, *b] for a, b in zip(micro[::2], micro[1::2], strict=True)]
    for clip in ({}, {"clipnorm": 0.5}):
        model = network()
        accumulating = keras.optimizers.SGD(0.02, momentum=0.9, gradient_accumulation_steps=2, **clip)
        model.compile(hvd.DistributedOptimizer(accumulating), loss=hvd.Objective("mse"))
        model.fit(dataset(mine(micro)), epochs=2, verbose=0)
        other = network()
        other.compile(keras.optimizers.SGD(0.02, momentum=0.9, **clip), loss=exact_alone())
        train_alone(other, pairs, 2)
        assert difference(model.get_weights(), other.get_weights()) < 1e-10
        same_on_all_ranks(model.get_weights())


def _fewer(rng, steps):
    """Leave out the last batches of all ranks but the last one."""
    for number, step in enumerate(steps):
        for rank in range(hvd.size() - 1):
            if number >= len(steps) - 2 - rank:
                step[rank] = None
    return steps


def case_a_rank_that_has_fewer_batches():
    rng = np.random.default_rng(12)
    return trial(_fewer(rng, step_batches(rng, 6)), epochs=3)


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
def case_a_rank_that_has_fewer_batches_of_unknown_number():
    rng = np.random.default_rng(13)
    return trial(_fewer(rng, step_batches(rng, 6)), epochs=3, counted=False)


def case_a_rank_without_any_batch():
    rng = np.random.default_rng(28)
    steps = [[None if rank == 0 else b for rank, b in enumerate(step)] for step in step_batches(rng, 3)]
    model, other = network(), network()
    model.compile(hvd.DistributedOptimizer(sgd()), loss="mse")
    own = dataset(mine(steps) or [steps[0][1]], counted=False)
    model.fit(own.take(0) if hvd.rank() == 0 else own, epochs=2, verbose=0)
    other.compile(sgd(), loss="mse")
    train_alone(other, steps, 2)
    assert difference(model.get_weights(), other.get_weights()) < 1e-10
    same_on_all_ranks(model.get_weights())


@needs(more="gloo-2")
def case_fewer_batches_with_several_losses():
    rng = np.random.default_rng(14)
    steps = step_batches(rng, 5)
    steps = [[(x, (y, y**2), (w, w**2)) for x, y, w in s] for s in steps]
    for counted in (True, False):
        trial(
            _fewer(rng, [list(s) for s in steps]),
            make=_two_outputs,
            loss=[hvd.Objective("mse"), hvd.Objective("mae")],
            alone=[exact_alone(), keras.losses.MeanAbsoluteError(reduction="mean_with_sample_weight")],
            counted=counted,
        )


def case_fewer_batches_with_accumulation():
    rng = np.random.default_rng(15)
    micro = _fewer(rng, step_batches(rng, 6))
    pairs = [[*a, *b] for a, b in zip(micro[::2], micro[1::2], strict=True)]
    for counted in (True, False):
        model = network()
        accumulating = keras.optimizers.SGD(0.02, momentum=0.9, gradient_accumulation_steps=2)
        model.compile(hvd.DistributedOptimizer(accumulating), loss=hvd.Objective("mse"))
        model.fit(dataset(mine(micro), counted=counted), epochs=2, verbose=0)
        other = network()
        other.compile(sgd(), loss=exact_alone())
        train_alone(other, pairs, 2)
        assert difference(model.get_weights(), other.get_weights()) < 1e-10, (
            counted,
            model.optimizer.last_step,
        )
        same_on_all_ranks(model.get_weights())


@needs(more="gloo-2")
def case_generators_and_steps_per_execution():
    rng = np.random.default_rng(16)
    steps = step_batches(rng, 4)
    for how in ({"steps_per_execution": 2}, {"run_eagerly": True}, {}):
        model = network()
        model.compile(hvd.DistributedOptimizer(sgd()), loss="mse", **how)
        if how:
            model.fit(dataset(mine(steps)), epochs=2, verbose=0)
        else:
            batches = mine(steps)

            def forever(batches=batches):
                while True:
                    yield from batches

            model.fit(forever(), steps_per_epoch=4, epochs=2, verbose=0)
        other = network()
        other.compile(sgd(), loss="mse")
        train_alone(other, steps, 2)
        assert difference(model.get_weights(), other.get_weights()) < 1e-10, how


def case_fewer_batches_with_several_steps_a_call():
    rng = np.random.default_rng(27)
    steps = [list(step) for step in step_batches(rng, 5)]
    for step in steps[3:]:
        step[-1] = None  # the last rank has three batches
    return {
        f"{several} steps a call{'' if counted else ', uncounted'}": trial(
            steps, counted=counted, steps_per_execution=several
        )["relative error"]
        for several, counted in ((2, True), (2, False))
    }


def case_a_layer_frozen_on_one_rank():
    model = network()
    model.layers[1].trainable = hvd.rank() != hvd.size() - 1
    model.compile(hvd.DistributedOptimizer(sgd()), loss="mse")
    error = raised(lambda: model.fit(np.ones((4, 5)), np.ones((4, 1)), verbose=0))
    assert hvd.size() == 1 or isinstance(error, AgreementError), error
    assert hvd.size() == 1 or f"rank(s) {hvd.size() - 1} lack 'dense/kernel'" in str(error), error


@needs(more="gloo-2")
def case_options_of_optimizers():
    rng = np.random.default_rng(17)
    steps = step_batches(rng, 4)
    for make in (
        lambda: keras.optimizers.Adam(0.02, use_ema=True, ema_momentum=0.7, ema_overwrite_frequency=3),
        lambda: keras.optimizers.AdamW(0.02, weight_decay=0.1, global_clipnorm=0.3),
        lambda: keras.optimizers.SGD(0.1, clipnorm=0.1),
        lambda: keras.optimizers.SGD(0.1, clipvalue=0.05, weight_decay=0.1),
        lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)),
        lambda: keras.optimizers.SGD(0.02, loss_scale_factor=64.0),
    ):
        trial(steps, optimizer=make)


def case_loss_scaling_agrees_on_what_is_finite():
    rng = np.random.default_rng(18)
    steps = step_batches(rng, 4)

    def make():
        return keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=8.0)

    found = trial(steps, optimizer=make)
    # One rank's gradient overflows: every rank skips the step and halves the scale.
    model = network()
    model.compile(hvd.DistributedOptimizer(make()), loss="mse")
    before = None
    x, y, w = steps[0][hvd.rank()]
    for number in range(2):
        if number == 1:
            before = model.get_weights()
            model.optimizer.dynamic_scale.assign(1e306 if hvd.rank() == 0 else 8.0)
        model.train_on_batch(x, y, sample_weight=w)
    assert difference(model.get_weights(), before) == 0.0
    assert int(model.optimizer.iterations) == 1
    return found


def case_mixed_precision():
    keras.config.set_floatx("float32")
    steps = step_batches(np.random.default_rng(19), 4, dtype=np.float32)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, other = network(), network()
        model.compile(hvd.DistributedOptimizer(sgd()), loss="mse")
        other.compile(sgd(), loss="mse")
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    for one in (model, other):  # low, so that no step is skipped
        one.optimizer.build(one.trainable_variables)
        one.optimizer.dynamic_scale.assign(8.0)
    model.fit(dataset(mine(steps)), verbose=0)
    train_alone(other, steps)
    error = difference(model.get_weights(), other.get_weights())
    assert error < 2e-3, error
    same_on_all_ranks(model.get_weights())
    return {"mixed_float16": error}


@needs(more="gloo-2")
def case_embeddings_and_fewer_batches():
    rng = np.random.default_rng(20)

    def make():
        keras.utils.set_random_seed(3)
        i = keras.Input((4,), dtype="int32")
        h = keras.layers.Flatten()(keras.layers.Embedding(12, 3)(i))
        return keras.Model(i, keras.layers.Dense(1)(h))

    steps = _fewer(rng, step_batches(rng, 5))
    steps = [
        [b and (rng.integers(0, 12, size=(len(b[0]), 4)).astype("int32"), b[1], b[2]) for b in s]
        for s in steps
    ]
    for options in ({}, {"sparse_as_dense": True}):
        trial(steps, make=make, options=options)
    return trial(steps, make=make, counted=False, optimizer=lambda: keras.optimizers.Adam(0.05))


def case_compression_and_groups():
    steps = step_batches(np.random.default_rng(21), 4)
    trial(steps, options={"groups": 2})
    found = trial(steps, options={"compression": hvd.Compression.fp16}, tolerance=1e-2)
    return {"float16 on the wire": found["relative error"]}


def case_a_custom_loop_with_an_objective():
    rng = np.random.default_rng(22)
    steps = step_batches(rng, 4)
    model, other = network(), network()
    objective = hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(sgd(), objective)

    def step(x, y, w):
        with tf.GradientTape() as tape:
            loss = objective(y, model(x), w) + sum(model.losses)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    other.compile(sgd(), loss=exact_alone())
    for call, one in zip((step, step, tf.function(step), step), steps, strict=True):
        call(*map(tf.constant, one[hvd.rank()]))
    train_alone(other, steps)
    assert difference(model.get_weights(), other.get_weights()) < 1e-10


@needs(more="gloo-3")
def case_process_sets():
    group = hvd.add_process_set([0, hvd.size() - 1])
    try:
        if not group.included():
            return
        rng = np.random.default_rng(23)
        x, y, w = data(rng, 20)
        model, other = network(), network()
        model.compile(hvd.DistributedOptimizer(sgd(), process_set=group), loss="mse")
        other.compile(sgd(), loss="mse")
        half = slice(0, 7) if group.rank() == 0 else slice(7, 20)
        model.fit(x[half], y[half], sample_weight=w[half, 0], epochs=2, batch_size=32, verbose=0)
        other.fit(x, y, sample_weight=w[:, 0], epochs=2, batch_size=32, shuffle=False, verbose=0)
        assert difference(model.get_weights(), other.get_weights()) < 1e-10
    finally:
        hvd.allreduce(np.zeros(1), name="all have left")
        hvd.remove_process_set(group)


def case_errors_reach_every_rank_as_themselves():
    rng = np.random.default_rng(24)
    (step,) = step_batches(rng, 1)
    x, y, w = step[hvd.rank()]
    last = hvd.rank() == hvd.size() - 1
    for kind, bad in (
        (WeightError, (x, y, np.where(np.arange(len(w)) == 0, -1.0 if last else 1.0, w))),
        (NonFiniteLossError, (x, y * np.nan if last else y, w + 1)),
    ):
        model = network()
        model.compile(hvd.DistributedOptimizer(sgd()), loss=hvd.Objective("mse"))
        before = model.get_weights()
        for call in (
            lambda m=model, b=bad: m.fit(*b[:2], sample_weight=b[2], verbose=0),
            lambda m=model, b=bad: m.train_on_batch(*b[:2], sample_weight=b[2]),
        ):
            error = raised(call)
            assert type(error) is kind, error
            assert f"rank {hvd.size() - 1}" in str(error)
        assert difference(model.get_weights(), before) == 0.0


def case_settings_that_differ_are_named():
    model = network()
    model.compile(hvd.DistributedOptimizer(sgd()), loss="mse")
    x, y, _ = data(np.random.default_rng(25), 8)
    error = raised(lambda: model.fit(x, y, epochs=1 + hvd.rank(), verbose=0))
    assert type(error) is AgreementError
    assert "epochs" in str(error)
    if hvd.rank() == 0:
        model.layers[1].bias.assign_add([0.0, 1e-12, 0.0, 0.0])
    error = raised(lambda: model.fit(x, y, verbose=0))
    assert type(error) is AgreementError
    assert "bias" in str(error)


def case_jit_compile_is_refused_at_compile_time():
    model = network()
    optimizer = hvd.DistributedOptimizer(sgd())
    error = raised(lambda: model.compile(optimizer, loss="mse", jit_compile=True))
    assert type(error) is ConfigError
    assert 'jit_compile="auto"' in str(error)
    model.compile(optimizer, loss="mse", jit_compile="auto")
    assert model.jit_compile is False


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
def case_without_our_reduction_the_guard_raises():
    from hvdloss.tensorflow.reducer import GradientReducer

    steps = step_batches(np.random.default_rng(26), 3)
    kept = GradientReducer.reduce
    GradientReducer.reduce = lambda self, gradients, variables, row, **_: (
        list(gradients),
        self.sum_table(row),
    )
    try:
        model = network()
        model.compile(hvd.DistributedOptimizer(sgd()), loss="mse")
        error = raised(lambda: model.fit(dataset(mine(steps)), verbose=0))
    finally:
        GradientReducer.reduce = kept
    assert type(error) is AgreementError, error
    assert "after epoch 1: parameter 0 (dense" in str(error)
    # every: sooner than the end of the epoch
    GradientReducer.reduce = lambda self, gradients, variables, row, **_: (
        list(gradients),
        self.sum_table(row),
    )
    try:
        model = network()
        model.compile(hvd.DistributedOptimizer(sgd()), loss="mse")
        often = hvd.callbacks.SynchronizationCallback(every=2)
        error = raised(lambda: model.fit(dataset(mine(steps)), verbose=0, callbacks=[often]))
    finally:
        GradientReducer.reduce = kept
    assert "after batch 2" in str(error)


def case_horovods_own_wrapper_trains_ranks_apart():
    import horovod.tensorflow.keras as theirs

    steps = step_batches(np.random.default_rng(27), 3)
    model = network()
    model.compile(theirs.DistributedOptimizer(sgd()), loss="mse")
    model.fit(dataset(mine(steps)), verbose=0)
    flat = np.concatenate([w.ravel() for w in model.get_weights()])
    apart = float(np.abs(hvd.allgather(flat[None], name="flat") - flat).max())
    assert apart > 1e-3
    assert type(raised(lambda: hvd.check_synchronized(model))) is AgreementError
    return {"Horovod's wrapper: ranks apart": apart}
