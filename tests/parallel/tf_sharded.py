"""A head split over ranks by class, in TensorFlow and Keras, against one process."""

from __future__ import annotations

import math
import unittest
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras_support import dataset
from tf_support import difference, raised, same_on_all_ranks

import hvdloss.keras as khvd
import hvdloss.tensorflow as hvd
from hvdloss.comm.world import set_name_base
from hvdloss.errors import AgreementError, ConfigError, HvdlossError, ShapeError
from hvdloss.tensorflow.collectives import copy_to_ranks
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3")

EXACT = 1e-11


def before_case(number: int) -> None:
    """Give every case its own names on the wire, and Keras its own."""
    set_name_base(1000 * (number + 1))
    keras.backend.clear_session()
    keras.config.set_floatx("float64")


def random_sizes(rng: np.random.Generator, classes: int, ranks: int) -> list[int]:
    """Return random sizes of at least 1."""
    cuts = np.sort(rng.choice(np.arange(1, classes), ranks - 1, replace=False))
    return np.diff([0, *cuts, classes]).tolist()


def own(shards: hvd.ClassShards, rank: int | None = None) -> slice:
    mine = shards.range(hvd.rank() if rank is None else rank)
    return slice(mine.start, mine.stop)


def one_process(logits, target, margin, scale, smoothing):
    """Return per-element losses of the whole logits, from the definitions; absent ones are 0."""
    classes = logits.shape[-1]
    present = target >= 0
    hot = tf.one_hot(tf.where(present, target, 0), classes, dtype=logits.dtype)
    if margin is not None:
        if isinstance(margin, hvd.CosFace):
            harder = logits - margin.margin
        else:
            theta, m = tf.acos(logits), margin.margin
            harder = tf.where(theta + m < math.pi, tf.cos(theta + m), logits - m * math.sin(m))
        logits = tf.where(hot > 0, harder, logits)
    goal = hot * (1 - smoothing) + smoothing / classes
    losses = -tf.reduce_sum(goal * tf.nn.log_softmax(logits * scale), -1)
    return tf.where(present, losses, tf.zeros_like(losses))


def random_case(rng: np.random.Generator) -> dict[str, Any]:
    """Draw a head, a batch and a loss; the same on all ranks."""
    classes, width = int(rng.integers(hvd.size(), 14)), int(rng.integers(2, 6))
    lead = [(int(rng.integers(0, 6)),), (2, int(rng.integers(1, 4)))][int(rng.integers(4) == 0)]
    normalize = bool(rng.integers(2))
    margins = [None, hvd.CosFace(float(rng.uniform(0, 0.5))), hvd.ArcFace(float(rng.uniform(0, 0.8)))]
    target = rng.integers(0, classes, lead)
    target[rng.uniform(size=lead) < 0.2] = -100
    return {
        "sizes": random_sizes(rng, classes, hvd.size()) if rng.integers(2) else None,
        "classes": classes,
        "normalize": normalize,
        "bias": bool(rng.integers(2)) and not normalize,
        "margin": margins[int(rng.integers(3))] if normalize else None,
        "scale": float(rng.choice([1.0, 8.0])),
        "smoothing": float(rng.choice([0.0, 0.1])),
        "x": rng.normal(size=(*lead, width)),
        "target": target,
        "upstream": rng.normal(size=lead),
        "seed": int(rng.integers(10**6)),
    }


def heads(case: dict[str, Any]) -> tuple[keras.layers.Layer, khvd.ShardedDense]:
    """Return the whole head and this rank's part of it, built."""
    made = []
    for make, options in (
        (keras.layers.Dense, {}),
        (khvd.ShardedDense, {"sizes": case["sizes"], "normalize": case["normalize"]}),
    ):
        options["kernel_initializer"] = keras.initializers.GlorotUniform(seed=case["seed"])
        options["bias_initializer"] = keras.initializers.RandomNormal(seed=case["seed"] + 1)
        made.append(make(case["classes"], use_bias=case["bias"], dtype="float64", **options))
        made[-1].build((None, case["x"].shape[-1]))
    return made[0], made[1]


def whole_logits(case: dict[str, Any], head: Any, x: Any) -> tf.Tensor:
    if case["normalize"]:
        kernel = tf.convert_to_tensor(head.kernel)
        return tf.tensordot(
            x / tf.norm(x, axis=-1, keepdims=True), kernel / tf.norm(kernel, axis=0, keepdims=True), 1
        )
    return head(x)


def near(mine: Any, right: Any, what: str) -> float:
    """Assert that arrays are equal up to rounding."""
    mine, right = np.asarray(mine), np.asarray(right)
    assert mine.shape == right.shape, (what, mine.shape, right.shape)
    scale = np.abs(right).max() if right.size else 1.0
    error = float(np.abs(mine - right).max() / max(scale, 1e-3)) if right.size else 0.0
    assert error <= EXACT, f"{what}: {error:.3g}"
    return error


def everywhere_refused(call: Callable[[], Any], *words: str, kind: type[Exception] = HvdlossError) -> None:
    """Assert that all ranks raise the same text."""
    error = raised(call)
    text = str(error) if isinstance(error, kind) else f"{type(error).__name__} was raised: {error}"
    assert all(word in text for word in words), text
    same_on_all_ranks([np.frombuffer(text[:200].ljust(200).encode(), np.uint8)])


def run_cases(number: int, compiled: bool) -> dict[str, float]:
    rng = np.random.default_rng(3)
    worst: dict[str, float] = {}
    for index in range(number):
        case = random_case(rng)
        one, head = heads(case)
        options = {"label_smoothing": case["smoothing"], "margin": case["margin"], "scale": case["scale"]}

        def step(x, y, upstream, head=head, options=options):
            with tf.GradientTape() as tape:
                tape.watch(x)
                logits = head(x)
                losses = hvd.sharded_cross_entropy(logits, y, head.shards, **options)
                total = tf.reduce_sum(losses * upstream)
            sources = [logits, x, *(v.value for v in head.trainable_variables)]
            return losses, tape.gradient(total, sources)

        given = [tf.constant(case[key]) for key in ("x", "target", "upstream")]
        if compiled:
            anything = [
                tf.TensorSpec([None] * (a.shape.rank - 1) + [a.shape[-1]], a.dtype) for a in given[:1]
            ]
            anything += [tf.TensorSpec([None] * a.shape.rank, a.dtype) for a in given[1:]]
            losses, mine = tf.function(step, input_signature=anything)(*given)
        else:
            losses, mine = step(*given)
        with tf.GradientTape() as tape:
            x = given[0]
            tape.watch(x)
            whole = whole_logits(case, one, x)
            right = one_process(whole, given[1], case["margin"], case["scale"], case["smoothing"])
            total = tf.reduce_sum(right * given[2])
        theirs = tape.gradient(total, [whole, x, *(v.value for v in one.trainable_variables)])
        columns = own(head.shards)
        pairs = {"losses": (losses, right), "input": (mine[1], theirs[1])}
        pairs["logits"] = (mine[0], theirs[0].numpy()[..., columns])
        for name, a, b in zip(("weight", "bias"), mine[2:], theirs[2:], strict=False):
            pairs[name] = (a, b.numpy()[..., columns])
        for what, (a, b) in pairs.items():
            worst[what] = max(worst.get(what, 0.0), near(a, b, f"case {index}, {what}"))
        same_on_all_ranks([losses, mine[1]])
    return {f"error of {what}": value for what, value in worst.items()}


@needs("gloo-2", more="gloo-3 gloo-4")
def case_random_shards_equal_one_process():
    return run_cases(40, compiled=False)


@needs(more="gloo-2 gloo-3 mpi-2")
def case_random_shards_in_a_function():
    return run_cases(12, compiled=True)


@needs("gloo-2", more="gloo-3 mpi-2")
def case_two_losses_in_one_graph():
    shards = hvd.ClassShards(5, hvd.size())
    g = np.random.default_rng(0)
    one, two = (tf.constant(g.normal(size=(4, 5))) for _ in range(2))
    y = tf.constant([0, 4, 2, 1])

    @tf.function
    def both(one, two):
        two = tf.ensure_shape(two, [4, 5])
        a = hvd.sharded_cross_entropy(one[:, own(shards)], y, shards)
        return a + hvd.sharded_cross_entropy(two[:, own(shards)], y, shards)

    right = sum(tf.nn.sparse_softmax_cross_entropy_with_logits(y, z) for z in (one, two))
    if hvd.rank() == 0:  # traces once more than the others
        both.get_concrete_function(one, tf.TensorSpec([None, 5], tf.float64))
    return {"error": near(both(one, two), right, "both")}


@needs("gloo-2", more="gloo-3 mpi-2")
def case_extreme_and_half_precision_logits():
    inf = math.inf
    rows = np.array(
        [
            [1e300, 0.0, -1e300, 5.0, 2.0],
            [-inf, 0.0, 1.0, -inf, 2.0],
            [800.0, 801.0, -inf, 799.0, 800.5],
            [-inf, -inf, -inf, 3.0, -inf],
        ]
    )
    y = np.array([0, 2, 1, 3])
    shards = hvd.ClassShards(5, hvd.size())
    mine = tf.constant(rows[:, own(shards)])
    with tf.GradientTape() as tape:
        tape.watch(mine)
        losses = hvd.sharded_cross_entropy(mine, y, shards)
    gradient = tape.gradient(losses, mine)
    top = rows.max(1, keepdims=True)
    powers = np.exp(rows - top)
    right = np.log(powers.sum(1)) + top[:, 0] - rows[np.arange(4), y]
    soft = powers / powers.sum(1, keepdims=True) - np.eye(5)[y]
    error = max(near(losses, right, "losses"), near(gradient, soft[:, own(shards)], "gradient"))
    for dtype in (tf.float16, tf.bfloat16):
        small = tf.cast(mine[1:3], dtype)
        with tf.GradientTape() as tape:
            tape.watch(small)
            losses = hvd.sharded_cross_entropy(small, y[1:3], shards)
        assert losses.dtype == tf.float32
        assert tape.gradient(losses, small).dtype == dtype
    nobody = hvd.sharded_cross_entropy(mine[:0], y[:0], shards)
    assert nobody.shape == (0,)
    return {"error": error}


def case_absent_elements_and_weights_through_an_objective():
    shards = hvd.ClassShards(7, hvd.size())
    g = np.random.default_rng(5)
    whole = g.normal(size=(6, 7))
    whole[1] = math.nan
    y = np.array([4, -100, 0, 6, 5, 1])
    weight = np.array([1.0, 2.0, 0.0, 0.5, 3.0, 1.0])
    worst = 0.0
    for given in (None, weight):
        mine = tf.constant(whole[:, own(shards)])
        objective = hvd.Objective(hvd.ShardedCrossEntropy(shards, label_smoothing=0.1))
        with tf.GradientTape() as tape:
            tape.watch(mine)
            value = objective(mine, y, given)
        keep = y >= 0
        exact = tf.constant(whole[keep])
        w = (np.ones(6) if given is None else given)[keep]
        with tf.GradientTape() as one:
            one.watch(exact)
            losses = one_process(exact, tf.constant(y[keep]), None, 1.0, 0.1)
            right = tf.reduce_sum(w * losses) / w.sum()
        gradient = np.zeros((6, 7))
        gradient[keep] = one.gradient(right, exact).numpy()
        mine_gradient = tape.gradient(value, mine)
        worst = max(
            worst,
            near(value, right, "value"),
            near(mine_gradient, gradient[:, own(shards)], "gradient"),
            near(
                khvd.Objective(khvd.ShardedCrossEntropy(shards, label_smoothing=0.1))(
                    y[:, None].astype("float64"), mine, given
                ),
                right,
                "keras",
            ),
        )
    return {"error": worst}


def case_sampled_columns():
    rng = np.random.default_rng(11)
    worst = 0.0
    for number in range(16):
        case = random_case(rng)
        one, head = heads(case)
        y = case["target"]
        columns = head.sample(y, float(rng.uniform(0.01, 1)), seed=number)
        starts = hvd.allgather(columns + head.shards.offset(hvd.rank()), name="columns").numpy()
        assert np.isin(y[y >= 0], starts).all()
        options = {"label_smoothing": case["smoothing"], "margin": case["margin"], "scale": case["scale"]}
        x = tf.constant(case["x"])
        with tf.GradientTape() as tape:
            tape.watch(x)
            losses = hvd.sharded_cross_entropy(
                head(x, columns=columns), y, head.shards, columns=columns, **options
            )
            total = tf.reduce_sum(losses * case["upstream"])
        mine = tape.gradient(total, [x, head.kernel.value])
        among = np.full(case["classes"], -100)
        among[starts] = np.arange(len(starts))
        renamed = np.where(y >= 0, among[np.maximum(y, 0)], -100)
        with tf.GradientTape() as tape:
            tape.watch(x)
            some = tf.gather(whole_logits(case, one, x), starts, axis=-1)
            right = one_process(some, tf.constant(renamed), case["margin"], case["scale"], case["smoothing"])
            total = tf.reduce_sum(right * case["upstream"])
        theirs = tape.gradient(total, [x, one.kernel.value])
        dense = [tf.convert_to_tensor(g).numpy() for g in (*mine, *theirs)]
        worst = max(
            worst,
            near(losses, right, "losses"),
            near(dense[0], dense[2], "input"),
            near(dense[1], dense[3][:, own(head.shards)], "weight"),
        )
    return {"error": worst}


def case_mistakes_are_told_on_all_ranks():
    rank, size = hvd.rank(), hvd.size()
    if size == 1:
        raise unittest.SkipTest("nobody to disagree with")
    shards = hvd.ClassShards(6, size)
    logits, y, last = tf.zeros((4, shards.size(rank))), np.array([0, 5, 2, 1]), size - 1

    def loss(y: Any = y, z: Any = logits, **options: Any) -> Any:
        return lambda: hvd.sharded_cross_entropy(z, y, shards, **options)

    everywhere_refused(
        loss(np.array([0, 6, 2, -3])), "2 target(s) on rank 0", "is 6", "0 to 5", kind=ConfigError
    )
    mine = y.copy()
    mine[2] += rank == last
    everywhere_refused(loss(mine), "different targets", kind=AgreementError)
    n = 4 + (rank == last)
    everywhere_refused(
        loss(np.zeros(n, int), tf.zeros((n, shards.size(rank)))), f"rank {last}: 5", kind=ShapeError
    )
    everywhere_refused(loss(label_smoothing=0.1 * (rank == last)), "arguments", kind=AgreementError)
    everywhere_refused(loss(z=logits[:, :1], columns=[0]), "lack the class", kind=ShapeError)
    for wrong, word in ((loss(y.astype("float32")), "float32"), (loss(y[:3]), "does not fit")):
        error = raised(wrong)  # on this rank, before any message
        assert isinstance(error, ShapeError), error
        assert word in str(error), error

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64), tf.TensorSpec([None, None])])
    def traced(y, z):
        return hvd.sharded_cross_entropy(tf.ensure_shape(z, [None, shards.size(rank)]), y, shards)

    error = raised(lambda: traced(tf.constant(mine), logits))
    assert "different targets" in str(error), error
    error = raised(lambda: traced(np.zeros(n, int), tf.zeros((n, shards.size(rank)))))
    assert f"rank {last}: 5" in str(error), error
    assert traced(tf.constant(y), logits).shape == (4,)  # and the next call works
    x = tf.constant(np.ones((4, shards.size(rank))))
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            total = tf.reduce_sum(hvd.sharded_cross_entropy(x, y, shards))
        gradient = inner.gradient(total, x)
    error = raised(lambda: outer.gradient(gradient, x))
    assert "differentiated once" in str(error), error


def network(head: keras.layers.Layer) -> keras.Model:
    i = keras.Input((6,))
    return keras.Model(i, head(keras.layers.Dense(5, activation="tanh")(i)))


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
def case_checkpoints_for_any_shards():
    rng = np.random.default_rng(4)
    keras.utils.set_random_seed(1)
    ordinary = network(keras.layers.Dense(11))
    saved = ordinary.get_weights()
    for sizes in (None, random_sizes(rng, 11, hvd.size())):
        keras.utils.set_random_seed(1)
        head = khvd.ShardedDense(11, sizes=sizes)
        model = network(head)
        assert np.array_equal(model.get_weights()[2], saved[2][:, own(head.shards)])  # the same seeds
        back = khvd.full_weights(model, everywhere=True)
        assert all(np.array_equal(a, b) for a, b in zip(back, saved, strict=True))
        assert (khvd.full_weights(model) is not None) == (hvd.rank() == 0)
        other = khvd.ShardedDense(11, sizes=random_sizes(rng, 11, hvd.size()))
        again = network(other)
        khvd.load_full_weights(again, saved)
        assert np.array_equal(again.get_weights()[2], saved[2][:, own(other.shards)])
        ordinary.set_weights(back)
    error = raised(lambda: khvd.load_full_weights(model, [*saved[:2], np.zeros((5, 12)), saved[3]]))
    assert isinstance(error, ShapeError), error
    assert "(5, 12)" in str(error)
    assert "(5, 11)" in str(error)
    twin = khvd.ShardedDense.from_config(head.get_config())
    assert twin.shards == head.shards


def grid_models(model: int, rng: np.random.Generator, classes: int) -> tuple[Any, Any, Any, Any]:
    groups = hvd.grid(model)
    sizes = random_sizes(rng, classes, model) if model > 1 else None
    keras.utils.set_random_seed(23)
    one = network(keras.layers.Dense(classes))
    keras.utils.set_random_seed(23)
    head = khvd.ShardedDense(classes, process_set=groups.model, sizes=sizes)
    return groups, one, head, network(head)


def step_data(rng: np.random.Generator, parts: int, classes: int) -> list[tuple[Any, Any, Any]]:
    """Return one batch for each part, uneven."""
    out = []
    for part in range(parts):
        n = int(rng.integers(1, 7))
        y, w = rng.integers(0, classes, n), rng.uniform(0, 2, n)
        y[rng.uniform(size=n) < 0.1] = -100
        if not part:
            y[0], w[0] = 3, 1.0
        out.append((rng.normal(size=(n, 6)), y, w))
    return out


def union(parts: list[tuple[Any, Any, Any]]) -> list[Any]:
    return [np.concatenate(a) for a in zip(*parts, strict=True)]


def reference_step(one: keras.Model, optimizer: Any, parts: list[tuple[Any, Any, Any]]) -> float:
    x, y, w = union(parts)
    w = w * (y >= 0)
    with tf.GradientTape() as tape:
        losses = one_process(one(x), tf.constant(y), None, 1.0, 0.0)
        loss = tf.reduce_sum(w * losses) / w.sum()
    optimizer.apply(tape.gradient(loss, one.trainable_variables), one.trainable_variables)
    return float(loss)


def expected(one: keras.Model, head: khvd.ShardedDense) -> list[np.ndarray]:
    """Return what this rank must hold of one process's weights."""
    first, second, kernel, bias = one.get_weights()
    return [first, second, kernel[:, own(head.shards, head.rank)], bias[own(head.shards, head.rank)]]


MODELS = {1: (1,), 2: (1, 2), 3: (1, 3), 4: (1, 2, 4)}


@needs("gloo-2", more="gloo-3 gloo-4")
def case_a_grid_trains_like_one_process_with_a_tape():
    worst = 0.0
    for model in MODELS[hvd.size()]:
        rng = np.random.default_rng(17)
        groups, one, head, split = grid_models(model, rng, 9)
        objective = hvd.Objective(hvd.ShardedCrossEntropy(head.shards, process_set=groups.model))
        optimizer, alone = keras.optimizers.SGD(0.3, momentum=0.9), keras.optimizers.SGD(0.3, momentum=0.9)

        def step(x, y, w, split=split, objective=objective, optimizer=optimizer, groups=groups):
            with tf.GradientTape() as tape:
                loss = objective(split(x), y, w)
            tape = hvd.DistributedGradientTape(tape, objective, process_set=groups.data)
            optimizer.apply(tape.gradient(loss, split.trainable_variables), split.trainable_variables)

        signature = [tf.TensorSpec([None, 6], tf.float64), tf.TensorSpec([None], tf.int64)]
        traced = tf.function(step, input_signature=[*signature, tf.TensorSpec([None], tf.float64)])
        for number in range(4):
            parts = step_data(rng, groups.data.size(), 9)
            (traced if number % 2 else step)(*parts[groups.data.rank()])
            right = reference_step(one, alone, parts)
            worst = max(
                worst,
                abs(objective.last_step.loss / right - 1),
                difference(split.get_weights(), expected(one, head)),
            )
            assert worst <= 1e-12, worst
        hvd.check_synchronized(split, process_set=groups.data)
        hvd.check_synchronized(split.layers[1], process_set=groups.model)
    return {"error after training": worst}


@needs("gloo-2", more="gloo-3 gloo-4")
def case_a_grid_fits_like_one_process():
    worst = 0.0
    for model in MODELS[hvd.size()]:
        rng = np.random.default_rng(19)
        groups, one, head, split = grid_models(model, rng, 9)
        loss = khvd.ShardedCrossEntropy(head.shards, process_set=groups.model)
        optimizer = khvd.DistributedOptimizer(
            keras.optimizers.SGD(0.3, momentum=0.9), process_set=groups.data
        )
        split.compile(optimizer, loss=khvd.Objective(loss))
        steps = [step_data(rng, groups.data.size(), 9) for _ in range(4)]
        mine = [parts[groups.data.rank()] for parts in steps]
        split.fit(dataset(mine), epochs=1, verbose=0, shuffle=False)
        alone = keras.optimizers.SGD(0.3, momentum=0.9)
        for parts in steps:
            right = reference_step(one, alone, parts)
        worst = max(
            worst,
            abs(optimizer.last_step.loss / right - 1),
            difference(split.get_weights(), expected(one, head)),
        )
        assert worst <= 1e-12, worst
        whole = khvd.full_weights(split, everywhere=True)
        assert difference(whole, one.get_weights()) <= 1e-12
    return {"error after training": worst}


def case_without_keras():
    """Raw variables behind copy_to_ranks are a split model too."""
    rng = np.random.default_rng(2)
    shards = hvd.ClassShards(7, hvd.size())
    x, kernel, y = rng.normal(size=(5, 3)), rng.normal(size=(3, 7)), rng.integers(0, 7, 5)
    given, mine = tf.constant(x), tf.Variable(kernel[:, own(shards)])
    with tf.GradientTape() as tape:
        tape.watch(given)
        logits = copy_to_ranks(given, name="features") @ mine
        loss = tf.reduce_mean(hvd.sharded_cross_entropy(logits, y, shards))
    found = tape.gradient(loss, [given, mine])
    whole = tf.constant(kernel)
    with tf.GradientTape() as tape:
        tape.watch([given, whole])
        right = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, given @ whole))
    theirs = tape.gradient(right, [given, whole])
    error = max(near(loss, right, "loss"), near(found[0], theirs[0], "input"))
    return {"error": max(error, near(found[1], theirs[1].numpy()[:, own(shards)], "kernel"))}
