"""Terms in Keras's fit: what is measured on all ranks, what it does, how often ranks exchange."""

from __future__ import annotations

import time

import keras
import numpy as np
import tensorflow as tf
from keras_support import before_case, dataset, difference, mine, same_on_all_ranks, train_alone, union
from tf_support import raised
from tf_terms import CLASSES, Toggled, batch_of, histograms, raises_everywhere, same_but_for_a_message

import hvdloss
import hvdloss.keras as hvd
from hvdloss.errors import ConfigError, NonFiniteLossError, UsageError
from hvdloss.terms.distributions import divergences
from hvdloss.terms.policies import (
    BatchShares,
    ImportanceWeights,
    OuterStep,
    Proximal,
    RankWeights,
    SharedBatches,
    SyncPeriod,
)
from tests.ranks import needs

NEEDS = needs("gloo-2")

__all__ = ["before_case"]


def network(seed: int = 7, outputs: int = 1) -> keras.Model:
    """Return a small classifier with a regularizer, the same on every rank."""
    keras.utils.set_random_seed(seed)
    i = keras.Input((5,))
    h = keras.layers.Dense(4, activation="tanh", kernel_regularizer=keras.regularizers.L2(0.02))(i)
    heads = [keras.layers.Dense(CLASSES)(h) for _ in range(outputs)]
    return keras.Model(i, heads if outputs > 1 else heads[0])


def sgd() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(2.0**-4, momentum=0.75)


def steps_of(count: int) -> list[list[tuple[np.ndarray, ...]]]:
    """Return for each step one batch per rank; rank 1 has an empty one in the second."""
    return [[batch_of(rank, step) for rank in range(hvd.size())] for step in range(1, count + 1)]


def compiled(objective, make=sgd, seed: int = 7, **options) -> keras.Model:
    model = network(seed)
    model.compile(hvd.DistributedOptimizer(make(), **options), loss=objective)
    return model


def plain_loss() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")


@needs("gloo-2", more="gloo-1 gloo-3")
def case_skew_in_fit_is_that_of_all_labels():
    term, cost = hvdloss.DataSkew(0.5, classes=CLASSES, window=3), hvdloss.CommunicationCost(2.0)
    model = compiled(hvd.Objective("cross_entropy", terms=(term, cost)))
    steps = steps_of(5)
    if hvd.size() > 1:  # rank 0 runs out of batches, and takes part with empty rows
        steps[4][0] = None
    model.fit(dataset(mine(steps)), verbose=0)
    counts = sum(histograms(step) for step in (3, 4, 5))
    if hvd.size() > 1:
        counts[0] -= histograms(5)[0]
    expected, overall = divergences(counts)
    report = model.optimizer.last_step
    assert report.step == 5
    assert np.abs(np.array(report.terms["skew"].values) - expected).max() < 1e-12
    assert abs(term.overall - overall) < 1e-12
    priced = 0.5 * expected.sum() + 2.0 * sum(one.communication for one in report.ranks)
    assert abs(report.objective_value - report.loss - priced) < 1e-12
    assert [one.skew for one in report.ranks] == report.terms["skew"].values
    assert hvd.size() == 1 or all(one.computation > 0 < one.communication for one in report.ranks)
    same_on_all_ranks([term.counts, cost.exposed])
    same_on_all_ranks(model.get_weights())


@needs(more="gloo-2")
def case_fit_with_weights_from_terms():
    """Importance and rank weights: each step is that of one process with those weights."""
    numbers = {}
    for name, policy in (
        ("importance", ImportanceWeights("uniform")),
        ("ranks", RankWeights("dro", step=0.5)),
    ):
        steps = steps_of(5)
        term = hvdloss.DataSkew(classes=CLASSES, policies=(policy,))
        model = compiled(hvd.Objective("cross_entropy", terms=(term,)))
        other = network()
        other.compile(sgd(), loss=plain_loss())
        factor = [np.ones(CLASSES)] * hvd.size()
        for step in steps:
            model.train_on_batch(*step[hvd.rank()][:2], sample_weight=step[hvd.rank()][2])
            weighted = [(x, y, w * factor[rank][y]) for rank, (x, y, w) in enumerate(step)]
            train_alone(other, [weighted])
            if name == "importance":
                factor = [policy.table(term.counts, rank) for rank in range(hvd.size())]
            else:
                factor = [np.full(CLASSES, one) for one in policy.factors]
        numbers[name] = difference(model.get_weights(), other.get_weights())
        assert numbers[name] < 1e-12, numbers
        assert hvd.size() == 1 or np.ptp(np.concatenate(factor)) > 1e-3
        term = hvdloss.DataSkew(classes=CLASSES, policies=(policy,))
        again = compiled(hvd.Objective("cross_entropy", terms=(term,)))
        policy.reset(hvd.rank(), hvd.size())
        again.fit(dataset(mine(steps)), verbose=0)
        assert difference(again.get_weights(), model.get_weights()) < 1e-12
    return numbers


class Spread(hvdloss.Term):
    """A user's own: the mean squared prediction, of which a share is added to the loss."""

    name, unit, width, has_penalty = "spread", "logits^2", 2, True

    def observe(self, batch):
        square = tf.reduce_sum(batch.prediction**2, -1)
        return [batch.ops.sum64(square * batch.weight), batch.ops.sum64(batch.weight)]

    def penalty(self, batch):
        square = tf.reduce_sum(batch.prediction**2, -1)
        total = tf.reduce_sum(batch.weight)
        return 0.1 * tf.math.divide_no_nan(tf.reduce_sum(square * batch.weight), total)

    def on_step_end(self, step):
        return step.sums[:, 0] / np.maximum(step.sums[:, 1], 1e-300)


def case_a_term_of_the_users_own_in_fit():
    # A penalty that is a weighted mean of the batch is, averaged by weights, that of all elements.
    steps = steps_of(4)
    model, other = compiled(hvd.Objective("cross_entropy", terms=(Spread(),))), network()

    def loss(y, p):
        losses = keras.ops.sparse_categorical_crossentropy(y, p, from_logits=True)
        return losses + 0.1 * keras.ops.sum(p**2, -1)

    class Wrapped(keras.losses.Loss):
        def call(self, y, p):
            return loss(keras.ops.cast(y, "int64"), p)

    other.compile(sgd(), loss=Wrapped(reduction="mean_with_sample_weight"))
    model.fit(dataset(mine(steps)), epochs=2, verbose=0)
    train_alone(other, steps, 2)
    error = difference(model.get_weights(), other.get_weights())
    assert error < 1e-12, error
    values = model.optimizer.last_step.terms["spread"].values
    assert len(values) == hvd.size()
    assert min(values) > 0
    return {"error": error}


@needs("gloo-2", more="gloo-1 gloo-3")
def case_terms_without_a_price_or_act_change_nothing():
    steps = steps_of(4)
    found = []
    for terms in ((), (hvdloss.CommunicationCost(), hvdloss.DataSkew(classes=CLASSES))):
        model = compiled(
            hvd.Objective("cross_entropy", terms=terms),
            lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
        )
        model.fit(dataset(mine(steps)), epochs=2, verbose=0)
        report = model.optimizer.last_step
        found.append((model.get_weights(), report.loss, report.choices.get("comm_plan")))
    same_but_for_a_message(*found)


def case_a_label_that_is_no_class():
    last = hvd.size() - 1
    wrong = tf.Variable(1, dtype=tf.int64)
    term = hvdloss.DataSkew(
        classes=CLASSES, label=lambda y: tf.cast(y, tf.int64) + (wrong * CLASSES if hvd.rank() == last else 0)
    )
    model = compiled(hvd.Objective("cross_entropy", terms=(term,)))
    before = model.get_weights()
    data = dataset(mine(steps_of(1)))
    words = (f"outside 0..{CLASSES - 1} on rank(s) {last}", "Nothing was updated")
    error = raised(lambda: model.fit(data, verbose=0))
    assert type(error) is ConfigError, repr(error)  # not one of TensorFlow's
    raises_everywhere(ConfigError, lambda: model.fit(data, verbose=0), *words)
    assert difference(model.get_weights(), before) == 0
    assert model.optimizer.last_step is None
    wrong.assign(0)
    model.fit(data, verbose=0)
    assert difference(model.get_weights(), before) > 0
    same_on_all_ranks(model.get_weights())

    class Broken(hvdloss.Term):
        name = "broken"

        def on_step_end(self, step):
            raise ValueError("a mistake in the user's own term")

    model = compiled(hvd.Objective("cross_entropy", terms=(Broken(),)))
    assert "user's own term" in str(raised(lambda: model.fit(data, verbose=0)))
    keyed = hvd.Objective("cross_entropy", terms=(hvdloss.DataSkew(classes=3, of="keys"),))
    raises_everywhere(UsageError, lambda: compiled(keyed).fit(data, verbose=0), "label=", "model.fit")


def case_what_cannot_be_done_is_refused():
    def acting(*policies):
        return hvd.Objective("cross_entropy", terms=(hvdloss.CommunicationCost(policies=policies),))

    two = network(outputs=2)
    optimizer = hvd.DistributedOptimizer(sgd())
    raises_everywhere(
        ConfigError, lambda: two.compile(optimizer, loss=[acting(), acting()]), "2 objectives", "one of them"
    )
    optimizer = hvd.DistributedOptimizer(sgd(), acting())
    raises_everywhere(
        ConfigError, lambda: network().compile(optimizer, loss="mse"), "has terms", "loss=objective"
    )
    local = acting(SyncPeriod(2))
    raises_everywhere(
        ConfigError, lambda: compiled(local, lambda: keras.optimizers.LossScaleOptimizer(sgd())), "LossScale"
    )
    raises_everywhere(
        ConfigError, lambda: compiled(local, lambda: keras.optimizers.SGD(0.1, use_ema=True)), "use_ema"
    )
    raises_everywhere(
        ConfigError,
        lambda: compiled(acting(Toggled()), compression=hvd.Compression.fp16),
        "AdaptiveCompression",
    )
    model, inner = network(), sgd()
    inner.build(model.trainable_variables)
    partial = hvd.PartialDistributedOptimizer(inner, local_layers=model.layers[1])
    raises_everywhere(ConfigError, lambda: model.compile(partial, loss=local), "SyncPeriod", "rank's own")


def case_several_outputs_of_which_one_has_terms():
    term = hvdloss.DataSkew(classes=CLASSES)
    # Named by the caller, as layers are numbered anew in every process.
    losses = [hvd.Objective("cross_entropy", terms=(term,)), hvd.Objective("cross_entropy")]
    steps = [[(x, (y, 0 * y), (w, w**2)) for x, y, w in step] for step in steps_of(3)]
    model, other = network(outputs=2), network(outputs=2)
    model.compile(hvd.DistributedOptimizer(sgd()), loss=losses, loss_weights=[1.0, 0.3])
    other.compile(sgd(), loss=[plain_loss(), plain_loss()], loss_weights=[1.0, 0.3])
    model.fit(dataset(mine(steps)), verbose=0)
    train_alone(other, steps)
    error = difference(model.get_weights(), other.get_weights())
    assert error < 1e-12, error
    counts = sum(histograms(step) for step in (1, 2, 3))
    assert np.abs(term.counts - counts).max() < 1e-12
    report = model.optimizer.last_step
    assert list(report.terms) == ["skew"]
    assert np.abs(np.array(report.terms["skew"].values) - divergences(counts)[0]).max() < 1e-12
    return {"error": error}


def case_a_link_is_measured_and_settings_are_compared():
    cost = hvdloss.CommunicationCost(calibrate=True)
    model = compiled(hvd.Objective("cross_entropy", terms=(cost,)))
    model.fit(dataset(mine(steps_of(1))), verbose=0)
    fit = cost.link.fit()
    if hvd.size() == 1:
        return
    same_on_all_ranks([np.array([fit.alpha, fit.beta])])
    assert model.optimizer.last_step.terms["communication"].details["alpha"] == fit.alpha
    cost = hvdloss.CommunicationCost(price=float(hvd.rank()))
    model = compiled(hvd.Objective("cross_entropy", terms=(cost,)))
    error = raised(lambda: model.fit(dataset(mine(steps_of(1))), verbose=0))
    assert "terms.communication" in str(error), repr(error)


def case_the_slow_rank_waits_for_nobody_in_fit():
    if hvd.size() == 1:
        return
    slow, steps = hvd.size() - 1, [steps_of(1)[0]] * 8

    class Slow(keras.callbacks.Callback):
        def __init__(self, pause):
            super().__init__()
            self.pause, self.held, self.computed = pause, [], []

        def on_train_batch_begin(self, batch, logs=None):
            if hvd.rank() == slow:
                time.sleep(self.pause)

        def on_train_batch_end(self, batch, logs=None):
            if batch > 2:
                ranks = self.model.optimizer.last_step.ranks
                self.held.append([one.communication for one in ranks])
                self.computed.append([one.computation for one in ranks])

    def told_apart(model, pause, found):
        """Fit with a pause on the slow rank; return whether the times of all ranks show it."""
        seen = Slow(pause)
        model.fit(dataset(mine(steps)), verbose=0, callbacks=[seen])
        held, computed = np.median(seen.held, 0), np.median(seen.computed, 0)
        found.append((pause, held, computed))
        assert (held > 0).all()
        return (
            held[slow] == held.min()
            and (np.delete(held, slow) > held[slow] + 0.4 * pause).all()
            and (np.delete(computed, slow) < computed[slow] - 0.4 * pause).all()
        )

    for loss in ("sparse_categorical_crossentropy", hvd.Objective("cross_entropy")):  # without any term
        model, found = compiled(loss), []
        # A machine with other work adds to any time; some pause is longer than what it adds.
        assert any(told_apart(model, 0.05 * 2**i, found) for i in range(7)), found


# -- local steps --------------------------------------------------------------------------------------


class Simulation:
    """Ranks that take local steps, one after another in this process."""

    def __init__(self, period, *, make=sgd, outer=None, strength=None):
        self.period, self.outer, self.strength = period if hvd.size() > 1 else 1, outer, strength
        self.models = [network() for _ in range(hvd.size())]
        for model in self.models:
            model.compile(make(), loss=plain_loss())
            model.optimizer.build(model.trainable_variables)
        self.weights, self.done, self.step = np.zeros(hvd.size()), 0, 0
        self.velocity = [np.zeros_like(w) for w in self.models[0].get_weights()]

    def train(self, step):
        self.step += 1
        if self.step == 1 or self.period == 1:
            x, y, w = union(step)
            for model in self.models:
                model.train_on_batch(x, y, sample_weight=w)
            return
        if not self.done:
            self.anchor = self.models[0].get_weights()
        for rank, (model, batch) in enumerate(zip(self.models, step, strict=True)):
            if batch is None or not batch[2].sum():
                model.optimizer.iterations.assign_add(1)  # a step all the same, for schedules
                continue
            model.train_on_batch(*batch[:2], sample_weight=batch[2])
            self.weights[rank] += batch[2].sum()
        self.done += 1
        if self.done == self.period:
            self.exchange()

    def exchange(self):
        if not self.done:
            return
        every = [model.get_weights() for model in self.models]
        for i, anchor in enumerate(self.anchor):
            move = sum(w * (one[i] - anchor) for w, one in zip(self.weights, every, strict=True))
            move = move / self.weights.sum()
            if self.outer is not None:
                move, self.velocity[i] = self.outer.update(move, self.velocity[i])
            self.anchor[i] = anchor + move
        for model in self.models:
            model.set_weights(self.anchor)
        self.weights, self.done = np.zeros(hvd.size()), 0


class Watch(keras.callbacks.Callback):
    """Checks that weights are equal on all ranks whenever anybody may look at them."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.tests = 0

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(self.model.get_weights())
        same_on_all_ranks(self.seen[-1])

    def on_test_begin(self, logs=None):
        self.tests += 1
        same_on_all_ranks(self.model.get_weights())


def _fit_locally(steps, epochs=2, *, policy, make=sgd, counted=True, more=(), **fit):
    cost = hvdloss.CommunicationCost(policies=(policy,), calibrate=False)
    model = compiled(hvd.Objective("cross_entropy", terms=(cost, *more)), make)
    watch = Watch()
    model.fit(dataset(mine(steps), counted=counted), epochs=epochs, verbose=0, callbacks=[watch], **fit)
    return model, watch, cost


def _fewer(steps):
    """Leave out the last batches of all ranks but the last one."""
    steps = [list(step) for step in steps]
    for number, step in enumerate(steps):
        for rank in range(hvd.size() - 1):
            if number >= len(steps) - 3 - rank:
                step[rank] = None
    return steps


@needs(more="gloo-2 gloo-1 gloo-3")
def case_fit_with_local_steps():
    numbers = {}
    batch = union(steps_of(1)[0])
    for name, steps, counted in (
        ("even", steps_of(7), True),
        ("uneven", _fewer(steps_of(7)), True),
        ("unknown", _fewer(steps_of(7)), False),
        ("unknown, even", steps_of(7), False),
    ):
        model, watch, _ = _fit_locally(
            steps, 2, policy=SyncPeriod(4), counted=counted, validation_data=(batch[0], batch[1])
        )
        one = Simulation(4)
        error = 0.0
        for epoch in range(2):
            for step in steps:
                one.train(step)
            one.exchange()
            error = max(error, difference(watch.seen[epoch], one.models[0].get_weights()))
        numbers[name] = error
        assert error < 1e-12, numbers
        assert watch.tests == 2
        assert int(model.optimizer.iterations) == 14
        assert model.optimizer.last_step.step == 14
    return numbers


@needs(more="gloo-2")
def case_fit_with_local_steps_and_more():
    """Outer momentum, accumulation, batches per call, eager, and another fit."""
    numbers = {}
    steps, outer = steps_of(6), OuterStep(0.7, 0.5)
    model, _, _ = _fit_locally(steps, policy=SyncPeriod(3, outer=outer))
    outer = outer if hvd.size() > 1 else None
    one = Simulation(3, outer=outer)
    for _ in range(2):
        for step in steps:
            one.train(step)
        one.exchange()
    numbers["outer"] = difference(model.get_weights(), one.models[0].get_weights())
    model.fit(dataset(mine(steps)), verbose=0)
    for step in steps:
        one.train(step)
    one.exchange()
    numbers["again"] = difference(model.get_weights(), one.models[0].get_weights())

    cost = hvdloss.CommunicationCost(policies=(SyncPeriod(3),))
    model = compiled(hvd.Objective("cross_entropy", terms=(cost,)))
    model.compile(model.optimizer, loss=model.loss, steps_per_execution=3)
    model.fit(dataset(mine(steps)), verbose=0)
    cost = hvdloss.CommunicationCost(policies=(SyncPeriod(3),))
    eager = compiled(hvd.Objective("cross_entropy", terms=(cost,)))
    eager.compile(eager.optimizer, loss=eager.loss, run_eagerly=True)
    eager.fit(dataset(mine(steps)), verbose=0)
    one = Simulation(3)
    for step in steps:
        one.train(step)
    one.exchange()
    numbers["steps_per_execution"] = difference(model.get_weights(), one.models[0].get_weights())
    numbers["run_eagerly"] = difference(eager.get_weights(), one.models[0].get_weights())

    def accumulating():
        return keras.optimizers.SGD(2.0**-4, momentum=0.75, gradient_accumulation_steps=2)

    micro = steps_of(8)
    pairs = [
        [union([a, b]) for a, b in zip(first, second, strict=True)]
        for first, second in zip(micro[::2], micro[1::2], strict=True)
    ]
    model, _, _ = _fit_locally(micro, policy=SyncPeriod(2), make=accumulating)
    one = Simulation(2)
    for _ in range(2):
        for step in pairs:
            one.train(step)
        one.exchange()
    numbers["accumulation"] = difference(model.get_weights(), one.models[0].get_weights())
    # A rank stops in the middle of a step, and nobody knows how many batches there are.
    if hvd.size() > 1:
        for step in micro[5:]:
            step[0] = None
        pairs = [
            [None if a is None and b is None else union([a, b]) for a, b in zip(first, second, strict=True)]
            for first, second in zip(micro[::2], micro[1::2], strict=True)
        ]
        for counted in (True, False):
            model, _, _ = _fit_locally(micro, policy=SyncPeriod(2), make=accumulating, counted=counted)
            one = Simulation(2)
            for _ in range(2):
                for step in pairs:
                    one.train(step)
                one.exchange()
            name = f"accumulation, uneven, counted={counted}"
            numbers[name] = difference(model.get_weights(), one.models[0].get_weights())
            assert int(model.optimizer._iterations) == 16, model.optimizer._iterations
    assert max(numbers.values()) < 1e-12, numbers
    return numbers


@needs(more="gloo-2")
def case_fit_with_a_proximal_pull_and_switching_compression():
    if hvd.size() == 1:
        return None
    skew = hvdloss.DataSkew(classes=CLASSES, policies=(Proximal(1.0),))
    model, _, _ = _fit_locally(steps_of(6), policy=SyncPeriod(3), more=(skew,))
    free, _, _ = _fit_locally(steps_of(6), policy=SyncPeriod(3))
    assert difference(model.get_weights(), free.get_weights()) > 1e-6
    assert skew.policies[0].mu > 0
    cost = hvdloss.CommunicationCost(policies=(SyncPeriod(3), Toggled()), calibrate=False)
    model = compiled(hvd.Objective("cross_entropy", terms=(cost,)))
    watch = Watch()
    model.fit(dataset(mine(steps_of(6))), epochs=2, verbose=0, callbacks=[watch])
    rough = difference(model.get_weights(), free.get_weights())
    assert 1e-9 < rough < 3e-3, rough
    cost = hvdloss.CommunicationCost(policies=(Toggled(),), calibrate=False)
    model, exact = (compiled(hvd.Objective("cross_entropy", terms=terms)) for terms in ((cost,), ()))
    for one in (model, exact):
        one.fit(dataset(mine(steps_of(6))), verbose=0)
    gradients = difference(model.get_weights(), exact.get_weights())
    assert 1e-9 < gradients < 3e-3, gradients
    same_on_all_ranks(model.get_weights())
    return {"float16 on the wire, parameters": rough, "float16 on the wire, gradients": gradients}


def case_a_fault_in_a_stretch_of_fit():
    if hvd.size() == 1:
        return
    cost = hvdloss.CommunicationCost(policies=(SyncPeriod(3),))
    model = compiled(hvd.Objective("cross_entropy", terms=(cost,)))
    steps = steps_of(4)
    model.fit(dataset(mine(steps[:1])), verbose=0)
    before = model.get_weights()
    bad = [list(step) for step in steps]
    x, y, w = bad[1][0]
    bad[1][0] = (x * np.nan, y, w)
    for count in (3, 4):  # at the end of a stretch, and of an epoch
        data = dataset(mine(bad[1:count]))
        raises_everywhere(NonFiniteLossError, lambda data=data: model.fit(data, verbose=0), "rank 0")
        assert difference(model.get_weights(), before) == 0
    model.fit(dataset(mine(steps[1:])), verbose=0)
    same_on_all_ranks(model.get_weights())
    assert difference(model.get_weights(), before) > 0


@needs(more="gloo-2")
def case_several_losses_with_local_steps():
    cost = hvdloss.CommunicationCost(policies=(SyncPeriod(3),))
    losses = [hvd.Objective("cross_entropy", terms=(cost,)), hvd.Objective("cross_entropy")]
    steps = _fewer([[(x, (y, 0 * y), (w, w**2)) for x, y, w in step] for step in steps_of(6)])
    for counted in (True, False):
        model = network(outputs=2)
        model.compile(hvd.DistributedOptimizer(sgd()), loss=losses, loss_weights=[1.0, 0.3])
        watch = Watch()
        before = model.get_weights()
        model.fit(dataset(mine(steps), counted=counted), epochs=2, verbose=0, callbacks=[watch])
        assert len(watch.seen) == 2
        assert difference(model.get_weights(), before) > 1e-6


@needs(more="gloo-2")
def case_a_period_that_goes_back_to_one():
    """Exact steps after local ones: optimizers had moments of their own, and must agree again."""
    policy = SyncPeriod("adacomm", initial_period=4, interval=1e-3)
    steps = steps_of(9)
    model, watch, _ = _fit_locally(steps, 3, policy=policy)
    assert len(watch.seen) == 3
    assert int(model.optimizer.iterations) == 27
    assert model.optimizer.last_step.step == 27
    decisions = model.loss.controller.decisions
    assert hvd.size() == 1 or [d.after for d in decisions] == [2, 1], decisions
    same_on_all_ranks([np.array([d.step for d in decisions])])
    same_on_all_ranks([v.numpy() for v in model.optimizer.variables])


@needs(more="gloo-2")
def case_batch_shares_batch_by_batch():
    """What ``train_on_batch`` is given follows the shares; the loss is that of equal ones."""
    if hvd.size() == 1:
        return
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(20 * 12 * hvd.size(), 5)), rng.integers(0, CLASSES, size=20 * 12 * hvd.size())
    weights = []
    for gain in (0.1, 0.999):
        # A machine with other work adds to any time; some pause is longer than what it adds.
        for pause in (0.002 * 2**i for i in range(7)):
            shares = BatchShares(12 * hvd.size(), every=4, gain=gain)
            objective = hvd.Objective("cross_entropy", terms=(hvdloss.CommunicationCost(policies=(shares,)),))
            model = compiled(objective)
            objective.prepare()
            for indices in SharedBatches(len(x), shares, seed=2):
                time.sleep(pause * len(indices) * (4 if hvd.rank() == 0 else 1))
                model.train_on_batch(x[indices], y[indices])
            if gain > 0.5 or shares.sizes[0] < 0.7 * shares.sizes[1]:
                break
        else:
            raise AssertionError(shares.sizes)
        weights.append(np.concatenate([w.ravel() for w in model.get_weights()]))
        same_on_all_ranks(shares.sizes.tolist())
        assert gain < 0.5 or shares.sizes[0] == 12
    error = difference(*weights)
    assert error < 1e-11, error
    return {"error": error}
