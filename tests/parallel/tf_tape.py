"""The exact global gradient of TensorFlow's tape, whatever way samples fall on ranks."""

from __future__ import annotations

import os

import numpy as np
import tensorflow as tf
from tf_support import (
    Network,
    cuts,
    data,
    difference,
    part,
    raised,
    reference,
    same_on_all_ranks,
    weighted_mse,
)

import hvdloss.tensorflow as hvd
from hvdloss.errors import AgreementError, NonFiniteLossError, NoWeightError, UsageError, WeightError
from tests.ranks import needs

NEEDS = needs("gloo-2")


def exact(net, objective, x, y, w, *, penalty=0.0, **options):
    """Return this rank's loss and the distributed gradients."""
    with tf.GradientTape() as tape:
        loss = objective(net(x), y, w)
        if penalty:
            loss += penalty * tf.add_n([tf.reduce_sum(p**2) for p in net.parameters])
    tape = hvd.DistributedGradientTape(tape, objective, **options)
    return loss, tape.gradient(loss, net.parameters)


def case_cross_entropy_with_ignored_classes():
    rng = np.random.default_rng(8)
    net, objective = Network(rng, out=3), hvd.Objective("cross_entropy")
    x, _, w = data(rng, 24)
    t = rng.integers(0, 3, size=24)
    t[5:9] = -100
    w = w[:, 0]
    where = cuts(rng, 24, hvd.size())
    _, g = exact(net, objective, *part((x, t, w), where))
    kept = t >= 0

    def loss():
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=t[kept], logits=net(x[kept]))
        return tf.reduce_sum(losses * w[kept]) / w[kept].sum()

    assert difference(g, reference(loss, net.parameters)) < 1e-12


def case_reductions():
    rng = np.random.default_rng(9)
    net = Network(rng, out=6)
    x = data(rng, 20)[0]
    y = rng.normal(size=(20, 6))
    w = rng.uniform(size=(20, 6)) * (rng.uniform(size=(20, 6)) > 0.3)
    where = cuts(rng, 20, hvd.size())

    def one(reduction):
        losses = w * (net(x) - y) ** 2
        if reduction == "sum":
            return tf.reduce_sum(losses)
        if reduction == "batch_mean":
            return tf.reduce_sum(losses) / (w != 0).sum()
        rows = w.sum(1)
        return tf.reduce_sum(tf.reduce_sum(losses, 1) / np.where(rows, rows, 1)) / (rows != 0).sum()

    for reduction in ("sum", "batch_mean", "sequence_mean"):
        objective = hvd.Objective("mse", reduction=reduction)
        _, g = exact(net, objective, *part((x, y, w), where))
        expected = reference(lambda reduction=reduction: one(reduction), net.parameters)
        assert difference(g, expected) < 1e-12, reduction
        assert abs(objective.last_step.loss / float(one(reduction)) - 1) < 1e-12, reduction


def case_retracing_with_new_shapes():
    rng = np.random.default_rng(10)
    net, objective = Network(rng), hvd.Objective("mse")
    traces = []

    @tf.function
    def step(x, y, w):
        traces.append(x.shape)
        return exact(net, objective, x, y, w)[1]

    for n in (3, 5 + hvd.rank(), 3, 8 + hvd.rank()):  # ranks retrace at different times
        rows = hvd.allgather(tf.constant([n]), name="rows").numpy()
        x, y, w = data(rng, int(rows.sum()))
        where = [0, *np.cumsum(rows)]
        g = step(*map(tf.constant, part((x, y, w), where)))
        expected = reference(lambda x=x, y=y, w=w: weighted_mse(net(x), y, w), net.parameters)
        assert difference(g, expected) < 1e-12
    assert len(traces) >= 3


def case_an_objective_inside_an_inner_function():
    rng = np.random.default_rng(11)
    net, objective = Network(rng), hvd.Objective("mse")
    x, y, w = data(rng, 20)
    where = cuts(rng, 20, hvd.size())
    inner = tf.function(lambda x, y, w: objective(net(x), y, w))

    def step(x, y, w):
        with tf.GradientTape() as tape:
            loss = inner(x, y, w)
        return hvd.DistributedGradientTape(tape, objective).gradient(loss, net.parameters)

    expected = reference(lambda: weighted_mse(net(x), y, w), net.parameters)
    for call in (step, tf.function(step), step):
        assert difference(call(*map(tf.constant, part((x, y, w), where))), expected) < 1e-12


def case_nested_sources_none_and_persistent_tapes():
    rng = np.random.default_rng(12)
    net, objective = Network(rng), hvd.Objective("mse")
    unused = tf.Variable(1.0, dtype=tf.float64)
    x, y, w = data(rng, 20)
    where = cuts(rng, 20, hvd.size())
    xs, ys, ws = part((x, y, w), where)
    expected = reference(lambda: weighted_mse(net(x), y, w), net.parameters)

    def step():
        with tf.GradientTape(persistent=True) as tape:
            loss = objective(net(xs), ys, ws)
            objective(net(xs) * 2, ys, ws)  # does not reach the target
        tape = hvd.DistributedGradientTape(tape, objective)
        first = tape.gradient(loss, {"layers": [net.w1, (net.b1, net.w2)], "unused": unused})
        return first, tape.gradient(loss, net.w2)

    for call in (step, tf.function(step)):
        g, again = call()
        assert g["unused"] is None
        got = [g["layers"][0], *g["layers"][1]]
        assert difference(got, expected) < 1e-12
        assert difference([again], expected[2:]) < 1e-12


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
def case_embeddings_sparse_and_dense():
    rng = np.random.default_rng(13)
    table = tf.Variable(rng.normal(size=(10, 3)))
    objective = hvd.Objective("mse")
    ids, y = rng.integers(0, 10, size=16), rng.normal(size=(16, 3))
    w = rng.uniform(size=(16, 1))
    where = cuts(rng, 16, hvd.size())
    i, ys, ws = part((ids, y, w), where)
    expected = reference(lambda: weighted_mse(tf.gather(table, ids), y, w), [table])

    def step(i, ys, ws, as_dense):
        with tf.GradientTape() as tape:
            loss = objective(tf.gather(table, i), ys, ws)
        return hvd.DistributedGradientTape(tape, objective, sparse_as_dense=as_dense).gradient(loss, table)

    for as_dense in (False, True):
        for call in (step, tf.function(step)):
            g = call(*map(tf.constant, (i, ys, ws)), as_dense)
            assert isinstance(g, tf.IndexedSlices) != as_dense
            assert difference([tf.convert_to_tensor(g)], expected) < 1e-12


def case_large_gradients_alone_and_totals_that_come_again():
    """From a size on a gradient travels as it lies, and is not divided where the total is the last one's."""
    os.environ["HVDLOSS_UNBUCKETED_MB"] = "2"
    try:
        rng = np.random.default_rng(27)
        big = tf.Variable(rng.normal(size=(512, 520)) / 20)
        small = tf.Variable(rng.normal(size=520))
        more = tf.Variable(rng.normal(size=520))
        objective = hvd.Objective("mse")

        def step(x, y, w):
            with tf.GradientTape() as tape:
                loss = objective(tf.tanh(x @ big) * small + more, y, w)
            # A size that no other case asks for, so that the environment is asked again.
            tape = hvd.DistributedGradientTape(tape, objective, bucket_cap_mb=24)
            return tape.gradient(loss, [big, small, more])

        worst = 0.0
        for call in (step, tf.function(step, reduce_retracing=True)):
            x, y, w = rng.normal(size=(6, 512)), rng.normal(size=(6, 520)), rng.uniform(0.5, 1.5, size=(6, 1))
            # The same weights again, other ones, and a rank without any element.
            for scale, where in ((1.0, [2]), (1.0, [4]), (3.0, [1]), (3.0, [0]), (0.1, [6])):
                where = [0, *where * (hvd.size() - 1), 6]
                g = call(*map(tf.constant, part((x, y, w * scale), where)))
                expected = reference(
                    lambda x=x, y=y, w=w: weighted_mse(tf.tanh(x @ big) * small + more, y, w),
                    [big, small, more],
                )
                worst = max(worst, difference(g, expected))
                assert worst < 1e-12, (scale, where)
        travel = {"messages": 2, "buckets": 1, "unbucketed": 1, "sparse": 0}
        assert objective.last_step.choices["comm_plan"] == travel
        return {"relative error": worst}
    finally:
        del os.environ["HVDLOSS_UNBUCKETED_MB"]


def case_groups_and_predivide():
    rng = np.random.default_rng(14)
    net, objective = Network(rng), hvd.Objective("mse")
    x, y, w = data(rng, 20)
    where = cuts(rng, 20, hvd.size())
    expected = reference(lambda: weighted_mse(net(x), y, w), net.parameters)
    for options in (
        {"groups": 2},
        {"num_groups": 1},
        {"groups": [[net.w1, net.w2]]},
        {"gradient_predivide_factor": 4.0},
    ):
        for step in (exact, tf.function(exact)):
            _, g = step(net, objective, *part((x, y, w), where), **options)
            assert difference(g, expected) < 1e-12, options


def case_compression():
    rng = np.random.default_rng(15)
    net, objective = Network(rng, np.float32), hvd.Objective("mse")
    x, y, w = data(rng, 20, np.float32)
    w = w * 3e5  # far beyond float16
    where = cuts(rng, 20, hvd.size())
    _, g = exact(net, objective, *part((x, y, w), where), compression=hvd.Compression.fp16)
    error = difference(g, reference(lambda: weighted_mse(net(x), y, w), net.parameters))
    assert error < 3e-3
    return {"float16 on the wire": error}


def case_16_bit_variables():
    rng = np.random.default_rng(16)
    x, y, w = data(rng, 64)
    where = cuts(rng, 64, hvd.size())
    numbers = {}
    for dtype, tolerance in ((tf.float16, 5e-3), (tf.bfloat16, 4e-2)):
        net, objective = Network(np.random.default_rng(16), np.float32), hvd.Objective("mse")
        low = Network(np.random.default_rng(16), np.float32)
        low.w1, low.b1, low.w2 = (tf.Variable(tf.cast(p, dtype)) for p in low.parameters)
        for p, q in zip(net.parameters, low.parameters, strict=True):
            p.assign(tf.cast(q, tf.float32))
        cast = tf.cast(part((x,), where)[0], dtype)
        with tf.GradientTape() as tape:
            loss = objective(low(cast), *part((y, 1e4 * w), where))
        g = hvd.DistributedGradientTape(tape, objective).gradient(loss, low.parameters)
        assert [one.dtype for one in g] == [dtype] * 3
        expected = reference(
            lambda net=net: weighted_mse(net(x.astype("f")), y.astype("f"), w.astype("f")), net.parameters
        )
        error = difference([tf.cast(one, tf.float32) for one in g], expected)
        assert error < tolerance, (dtype, error)
        numbers[dtype.name] = error
    return numbers


@needs(more="gloo-3 gloo-4")
def case_process_sets():
    rng = np.random.default_rng(17)
    members = [0, hvd.size() - 1]
    group = hvd.add_process_set(members)
    try:
        net, objective = Network(rng), hvd.Objective("mse", process_set=group)
        x, y, w = data(rng, 20)
        where = [0, 3, 20]
        mine = members.index(hvd.rank()) if group.included() else 0
        xs, ys, ws = part((x, y, w), where, mine)
        _, g = exact(net, objective, xs, ys, ws)
        if group.included():
            expected = reference(lambda: weighted_mse(net(x), y, w), net.parameters)
            assert len(objective.last_step.ranks) == 2
        else:
            expected = reference(lambda: weighted_mse(net(xs), ys, ws), net.parameters)
        assert difference(g, expected) < 1e-12
    finally:
        hvd.remove_process_set(group)
    return None


def case_local_sources():
    rng = np.random.default_rng(18)
    net, objective = Network(rng), hvd.Objective("mse")
    x, y, w = data(rng, 20)
    where = cuts(rng, 20, hvd.size(), empty=False)
    xs, ys, ws = part((x, y, w), where)
    own = reference(lambda: tf.reduce_sum(ws * (net(xs) - ys) ** 2) / w.sum(), net.parameters)
    whole = reference(lambda: weighted_mse(net(x), y, w), net.parameters)
    with tf.GradientTape() as tape:
        loss = objective(net(xs), ys, ws)
    tape = hvd.DistributedGradientTape(tape, objective)
    tape.register_local_source(net.b1)
    local, shared = tape.get_local_and_global_gradients(loss, net.parameters)
    assert [v is net.b1 for v, _ in local] == [True]
    assert difference([local[0][1]], [own[1]]) < 1e-12
    assert difference([g for _, g in shared], [whole[0], whole[2]]) < 1e-12


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
def case_errors_are_the_same_on_every_rank():
    rng = np.random.default_rng(19)
    net, objective = Network(rng), hvd.Objective("mse")
    x, y, w = data(rng, 20)
    where = cuts(rng, 20, hvd.size(), empty=False)
    last = hvd.size() - 1
    bad = {"weight": w.copy(), "nan": y.copy()}
    bad["weight"][-1] = -1.0
    bad["nan"][-1] = np.nan
    w[-1] = 1.0
    bad["weight"][-2] = np.nan
    trials = [
        (WeightError, f"rank {last}", (x, y, bad["weight"])),
        (NonFiniteLossError, f"rank {last}", (x, bad["nan"], w)),
        (NoWeightError, "no element", (x, y, 0 * w)),
    ]
    for step, function in ((exact, False), (tf.function(exact), True)):
        for kind, text, arrays in trials:
            before = objective.last_step
            error = raised(lambda s=step, a=arrays: s(net, objective, *part(a, where)))
            assert text in str(error), (kind, error)
            assert kind.__name__ in str(error) if function else type(error) is kind
            assert objective.last_step == before
        _, g = step(net, objective, *part((x, y, w), where))  # the next step is sound
        assert difference(g, reference(lambda: weighted_mse(net(x), y, w), net.parameters)) < 1e-12

    def without():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(net(x) ** 2)
        hvd.DistributedGradientTape(tape, objective).gradient(loss, net.parameters)

    def two_losses():
        xs, ys, ws = part((x, y, w), where)
        with tf.GradientTape() as tape:
            loss = objective(net(xs), ys, ws) + objective(net(xs), ys, 2 * ws)
        hvd.DistributedGradientTape(tape, objective).gradient(loss, net.parameters)

    assert type(raised(without)) is UsageError
    assert type(raised(two_losses)) is UsageError


def case_a_source_without_a_gradient_on_one_rank():
    rng = np.random.default_rng(17)
    model = Network(rng)
    x, y, _ = part(data(rng, 12), cuts(rng, 12, hvd.size(), empty=False))
    objective = hvd.Objective("mse")
    odd = hvd.rank() == hvd.size() - 1
    with tf.GradientTape() as tape:
        out = tf.tanh(x @ model.w1 + (0.0 if odd else model.b1)) @ model.w2
        loss = objective(out, y)
    exact = hvd.DistributedGradientTape(tape, objective)
    error = raised(lambda: exact.gradient(loss, model.parameters))
    if hvd.size() == 1:
        assert error is None
        return
    assert isinstance(error, AgreementError), error
    assert "b1" in str(error), error
    assert f"rank {hvd.size() - 1} has False" in str(error), error


def case_two_calls_with_one_weight_sum():
    rng = np.random.default_rng(20)
    net, objective = Network(rng), hvd.Objective("mse")
    x, y, w = data(rng, 20)
    where = cuts(rng, 20, hvd.size())
    xs, ys, ws = part((x, y, w), where)
    with tf.GradientTape() as tape:
        loss = objective(net(xs), ys, ws) + 0.5 * objective(net(xs) ** 2, ys, ws)
    g = hvd.DistributedGradientTape(tape, objective).gradient(loss, net.parameters)
    expected = reference(
        lambda: weighted_mse(net(x), y, w) + 0.5 * weighted_mse(net(x) ** 2, y, w), net.parameters
    )
    assert difference(g, expected) < 1e-12


def case_without_an_objective_it_is_horovods():
    import horovod.tensorflow as theirs

    rng = np.random.default_rng(21)
    net = Network(rng)
    x, y, w = data(rng, 20)
    w = w + 1  # Horovod alone makes NaN of a rank without weight
    xs, ys, ws = part((x, y, w), cuts(rng, 20, hvd.size(), empty=False))
    got = []
    for module in (hvd, theirs):
        with tf.GradientTape() as tape:
            loss = weighted_mse(net(xs), ys, ws)
        got.append(module.DistributedGradientTape(tape, sparse_as_dense=True).gradient(loss, net.parameters))
    assert difference(*got) < 1e-12, difference(*got)  # sums may be taken in another order


def case_accumulation_over_tf_variables():
    rng = np.random.default_rng(22)
    net, other = Network(rng), Network(np.random.default_rng(22))
    objective = hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(
        tf.keras.optimizers.SGD(0.05, momentum=0.9), objective, backward_passes_per_step=3
    )
    alone = tf.keras.optimizers.SGD(0.05, momentum=0.9)

    def micro(x, y, w):
        with tf.GradientTape() as tape:
            loss = objective(net(x), y, w)
        optimizer.apply_gradients(zip(tape.gradient(loss, net.parameters), net.parameters, strict=True))

    for step in (micro, tf.function(micro, reduce_retracing=True)):
        for _ in range(3):
            x, y, w = data(rng, 40)
            where = cuts(rng, 40, hvd.size() * 3)
            for m in range(3):
                step(*map(tf.constant, part((x, y, w), where, 3 * hvd.rank() + m)))
            expected = reference(lambda x=x, y=y, w=w: weighted_mse(other(x), y, w), other.parameters)
            alone.apply_gradients(zip(map(tf.constant, expected), other.parameters, strict=True))
            assert difference(net.parameters, other.parameters) < 1e-12
            assert optimizer.last_step.elements == int((w != 0).sum())
    same_on_all_ranks([p.numpy() for p in net.parameters])


def case_an_optimizer_of_tf_compat_v1():
    rng = np.random.default_rng(23)
    net, other = Network(rng), Network(np.random.default_rng(23))
    objective = hvd.Objective("mse")
    x, y, w = data(rng, 20)
    xs, ys, ws = part((x, y, w), cuts(rng, 20, hvd.size()))
    optimizer = hvd.DistributedOptimizer(tf.compat.v1.train.GradientDescentOptimizer(0.125), objective)
    optimizer.minimize(lambda: objective(net(xs), ys, ws), var_list=net.parameters)
    expected = reference(lambda: weighted_mse(other(x), y, w), other.parameters)
    for p, g in zip(other.parameters, expected, strict=True):
        p.assign_sub(0.125 * g)
    assert difference(net.parameters, other.parameters) < 1e-12


def case_the_guard_names_the_first_parameter_and_the_ranks():
    net = Network(np.random.default_rng(24))
    hvd.check_synchronized(net)
    if hvd.rank() == hvd.size() - 1:
        net.b1.assign_add([0.0, 1e-15, 0.0, 0.0])
    error = raised(lambda: hvd.check_synchronized(net.parameters, when="after step 7"))
    assert type(error) is AgreementError
    assert "after step 7: parameter 1 (b1" in str(error)
    assert f"on rank(s) {hvd.size() - 1} than on rank 0 (1 of 3" in str(error)


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
def case_without_our_reduction_the_guard_raises():
    from hvdloss.tensorflow.reducer import GradientReducer

    rng = np.random.default_rng(25)
    net, objective = Network(rng), hvd.Objective("mse")
    x, y, w = data(rng, 20)
    arrays = part((x, y, w), cuts(rng, 20, hvd.size(), empty=False))

    def train():
        _, g = exact(net, objective, *arrays)
        for p, one in zip(net.parameters, g, strict=True):
            p.assign_sub(0.1 * one)
        hvd.check_synchronized(net)

    train()
    kept = GradientReducer.reduce
    GradientReducer.reduce = lambda self, gradients, variables, row, **_: (
        list(gradients),
        self.sum_table(row),
    )
    try:
        error = raised(train)
    finally:
        GradientReducer.reduce = kept
    assert type(error) is AgreementError, error


def case_a_function_is_traced_once():
    """Tracing takes seconds. Functions that make variables are traced twice, as Keras's optimizers do."""
    import keras

    rng = np.random.default_rng(27)
    batch = part(data(rng, 20), cuts(rng, 20, hvd.size(), empty=False))

    def traces(built):
        net, objective, count = Network(rng), hvd.Objective("mse"), []
        optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.0), objective)
        if built:
            optimizer.build(net.parameters)

        @tf.function
        def step(x, y, w):
            count.append(1)
            with tf.GradientTape() as tape:
                loss = objective(net(x), y, w)
            if built is None:
                return hvd.DistributedGradientTape(tape, objective).gradient(loss, net.parameters)
            optimizer.apply_gradients(zip(tape.gradient(loss, net.parameters), net.parameters, strict=True))
            return None

        for _ in range(2):
            step(*batch)
        return len(count)

    assert [traces(built) for built in (None, True, False)] == [1, 1, 2]
