"""Collectives with gradients against one process that holds all ranks' inputs; and Horovod's own."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tensorflow as tf

import hvdloss.tensorflow as hvd
from hvdloss.comm.collectives import even_sizes
from hvdloss.errors import ConfigError, ShapeError, UsageError
from hvdloss.tensorflow import collectives as c
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3 gloo-4 mpi-2")

EXACT = 1e-12
DRAWS = 3


def case_horovods_own_gradients():
    """What Horovod's operations give for the loss sum_k k * sum(out_k), over the exact gradient.

    This is what docs/reference/collectives.md says; should Horovod mend it, this case tells.
    """
    size, rank = hvd.size(), hvd.rank()
    total = float(sum(range(1, size + 1)))

    def ratio(call, exact, rows=None):
        x = tf.ones([rows or size, 1], tf.float64)
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(call(x)) * (1.0 + rank)
        return float(tape.gradient(loss, x)[0, 0]) / exact

    found = {
        "allreduce, Sum": ratio(lambda x: hvd.allreduce(x, op=hvd.Sum, name="a"), total),
        "allreduce, Average": ratio(lambda x: hvd.allreduce(x, name="b"), total / size),
        "allgather": ratio(lambda x: hvd.allgather(x, name="c"), total, rows=2 + rank),
        "alltoall": ratio(lambda x: hvd.alltoall(x, name="d"), 1.0),
        "reducescatter, Sum": ratio(lambda x: hvd.reducescatter(x, op=hvd.Sum, name="e"), 1.0),
        "reducescatter, Average": ratio(lambda x: hvd.reducescatter(x, name="f"), 1.0 / size),
    }
    of_root = ratio(lambda x: hvd.broadcast(x, 0, name="g"), total)
    if rank == 0:
        found["broadcast, at the root"] = of_root
    expected = {
        "allreduce, Sum": 1.0,
        "allreduce, Average": 1.0,
        "allgather": 1.0 / size,
        "alltoall": 1.0,
        "reducescatter, Sum": float(size),
        "reducescatter, Average": float(size),
        "broadcast, at the root": 1.0 / size,
    }
    for key, value in found.items():
        assert abs(value - expected[key]) < 1e-12, (key, value, expected[key])
    return found


def _rows(rng, size, least=0):
    """Return numbers of rows for each rank: uneven, some 0, now and then all even."""
    if rng.random() < 0.3:
        return [rng.randint(least, 4)] * size
    return [rng.choice([least, rng.randint(least, 6)]) for _ in range(size)]


def _close(a, b, what):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape, f"{what}: {a.shape} is not {b.shape}"
    scale = max(float(np.abs(b).max()) if b.size else 0.0, 1e-3)
    error = float(np.abs(a - b).max()) / scale if b.size else 0.0
    assert error <= EXACT, f"{what}: relative error {error:.3g}"
    return error


def _graph(function):
    """Return a function of a graph that knows no number of rows."""
    signature = [tf.TensorSpec([None, 3], tf.float64)] * 3
    return tf.function(function, input_signature=signature, autograph=False)


def _against_one_process(rng, wire, alone, sizes, *, once=False, input_once=False, wrap=None):
    """Compare value, gradient and gradient of a gradient penalty with one process.

    The loss is sum_k f_k(out_k); with `once` it is f(out), the same on all ranks. `input_once`: all ranks
    have the same input, whose gradient counts once.
    """
    rank, size = hvd.rank(), hvd.size()
    xs = [tf.constant(rng.normal(size=(n, 3))) for n in sizes]
    xs = xs[:1] if input_once else xs
    with tf.GradientTape() as outer:
        outer.watch(xs)
        with tf.GradientTape() as inner:
            inner.watch(xs)
            outs = alone(xs * size if input_once else xs)
            first = [tf.constant(rng.normal(size=out.shape)) for out in outs]
            first = [first[0]] * size if once else first
            terms = zip(first[:1] if once else first, outs, strict=False)
            loss = tf.add_n([tf.reduce_sum(a * tf.sin(out)) for a, out in terms])
        grads = inner.gradient(loss, xs)
        second = [tf.constant(rng.normal(size=x.shape)) for x in xs]
        penalty = tf.add_n([tf.reduce_sum(b * d**2) for b, d in zip(second, grads, strict=True)])
    twice = outer.gradient(penalty, xs)

    def mine(x, a, b):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                out = wire(x)
                loss = tf.reduce_sum(a * tf.sin(out))
            grad = inner.gradient(loss, x)
            penalty = tf.reduce_sum(b * grad**2)
        return out, grad, outer.gradient(penalty, x)

    at = 0 if input_once else rank
    error = 0.0
    function = (wrap or _graph)(mine)
    for run in (mine, function, function):
        out, grad, again = run(xs[at], first[rank], second[at])
        error = max(error, _close(out, outs[rank], "value"))
        error = max(error, _close(grad, grads[at], "gradient"))
        error = max(error, _close(again, twice[at], "second derivative"))
    return error


def case_all_reduce():
    rng, draw = np.random.default_rng(1), random.Random(1)
    error = 0.0
    for _ in range(DRAWS):
        sizes = [draw.randint(0, 4)] * hvd.size()
        for once in (False, True):
            error = max(
                error,
                _against_one_process(
                    rng,
                    lambda x, once=once: c.all_reduce(x, replicated=once),
                    lambda xs: [tf.add_n(xs)] * len(xs),
                    sizes,
                    once=once,
                ),
            )
    return {"error": error}


def case_all_gather():
    rng, draw = np.random.default_rng(2), random.Random(2)
    error = 0.0
    for number in range(2 * DRAWS):
        sizes = _rows(draw, hvd.size())
        for once in (False, True):
            known = sizes if number % 2 else None
            error = max(
                error,
                _against_one_process(
                    rng,
                    lambda x, once=once, known=known: c.all_gather(x, replicated=once, sizes=known),
                    lambda xs: [tf.concat(xs, 0)] * len(xs),
                    sizes,
                    once=once,
                ),
            )
    return {"error": error}


@needs(more="gloo-3")
def case_all_gather_of_nothing():
    rng = np.random.default_rng(3)
    for once in (False, True):
        _against_one_process(
            rng,
            lambda x, once=once: c.all_gather(x, replicated=once),
            lambda xs: [tf.concat(xs, 0)] * len(xs),
            [0] * hvd.size(),
            once=once,
        )


def case_reduce_scatter():
    rng, draw = np.random.default_rng(4), random.Random(4)
    error = 0.0
    for number in range(2 * DRAWS):
        parts = _rows(draw, hvd.size())
        rows = sum(parts) if number % 2 else draw.randint(0, 9)
        parts = parts if number % 2 else None
        cut = parts or even_sizes(rows, hvd.size())
        error = max(
            error,
            _against_one_process(
                rng,
                lambda x, parts=parts: c.reduce_scatter(x, sizes=parts),
                lambda xs, cut=cut: tf.split(tf.add_n(xs), cut),
                [rows] * hvd.size(),
                wrap=tf.function,
            ),
        )
    return {"error": error}


def case_broadcast():
    rng = np.random.default_rng(5)
    error = 0.0
    for root in range(hvd.size()):
        for once in (False, True):
            error = max(
                error,
                _against_one_process(
                    rng,
                    lambda x, root=root, once=once: c.broadcast(x, root, replicated=once),
                    # The others' inputs count for nothing, but have a gradient: zero.
                    lambda xs, root=root: [xs[root] + tf.add_n([0 * x for x in xs])] * len(xs),
                    [3] * hvd.size(),
                    once=once,
                ),
            )
    return {"error": error}


def case_shift():
    rng, draw = np.random.default_rng(6), random.Random(6)
    error = 0.0
    for by in (1, -1, 2, hvd.size(), -5):
        error = max(
            error,
            _against_one_process(
                rng,
                lambda x, by=by: c.shift(x, by),
                lambda xs, by=by: [xs[(k - by) % len(xs)] * 1 for k in range(len(xs))],
                _rows(draw, hvd.size()),
            ),
        )
    return {"error": error}


@needs(more="gloo-3")
def case_copy_to_ranks():
    error = _against_one_process(
        np.random.default_rng(7),
        c.copy_to_ranks,
        lambda xs: [x * 1 for x in xs],
        [4] * hvd.size(),
        input_once=True,
    )
    return {"error": error}


@needs(more="gloo-3")
def case_scale_gradient():
    x = tf.ones(3)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(c.scale_gradient(x, 2.5))
    assert tape.gradient(y, x).numpy().tolist() == [2.5] * 3


@needs(more="gloo-3")
def case_constants_are_sent_every_time():
    """A rank without samples may give a constant, which TensorFlow would compute with once."""
    size, rank = hvd.size(), hvd.rank()

    @tf.function
    def step(x):
        def mine(shape):  # known to be ones on rank 0 while tracing
            return tf.ones(shape) if rank == 0 else x + tf.zeros(shape)

        return (
            tf.reduce_sum(c.all_gather(mine((rank + 1, 2)))),
            tf.reduce_sum(c.all_gather(mine((0, 1) if rank == 0 else (2, 1)))),
            c.all_reduce(mine(())),
            tf.reduce_sum(c.shift(mine((2,)), -1)),
            tf.reduce_sum(c.broadcast(mine((1,)), size - 1)),
            tf.reduce_sum(c.reduce_scatter(mine((2 * size,)))),
        )

    for k in (1.0, 2.0, 3.0):
        out = [float(v) for v in step(tf.constant(k))]
        rows = sum(range(2, size + 1))
        from_next = 2.0 * (k if rank < size - 1 else 1.0)
        exact = [
            2 + 2 * rows * k,
            2 * (size - 1) * k,
            1 + (size - 1) * k,
            from_next,
            k,
            2 + 2 * (size - 1) * k,
        ]
        assert out == exact, (out, exact)


@needs(more="gloo-3")
def case_equal_calls_are_not_merged():
    """Two calls of equal inputs on one rank may have different ones on another."""
    size, rank = hvd.size(), hvd.rank()

    @tf.function
    def step():
        a = tf.ones((2, 1))
        b = tf.ones((2, 1)) if rank == 0 else tf.ones((3, 1))
        with tf.GradientTape() as tape:
            tape.watch([a, b])
            loss = tf.reduce_sum(c.all_gather(a)) + 2 * tf.reduce_sum(c.all_gather(b))
        return (loss, *tape.gradient(loss, [a, b]))

    for _ in range(3):
        loss, da, db = step()
        assert float(loss) == 2 * size + 2 * (3 * size - 1)
        assert da.numpy().tolist() == [[size]] * 2
        assert db.numpy().tolist() == [[2 * size]] * (2 if rank == 0 else 3)


@needs(more="gloo-3")
def case_what_nobody_uses_is_sent():
    """On a rank whose rows are known to be none, or that drops a result, a graph needs no collective."""
    size, rank = hvd.size(), hvd.rank()
    rows = 0 if rank == 0 else 2
    theta = tf.Variable(tf.ones((3, 1)))

    @tf.function(autograph=False)
    def step():
        with tf.GradientTape() as tape:
            x = tf.ones((rows, 3)) @ theta
            loss = tf.reduce_sum(c.all_gather(x) ** 2)
        c.shift(tf.ones((1,)))
        c.all_gather(tf.ones((rank, 1)))
        c.all_reduce(tf.ones(()))
        total = c.all_reduce(tf.ones(3)) if rank == 0 else tf.ones(3) + 0 * c.all_reduce(tf.ones(3))
        return tape.gradient(loss, theta), total

    for _ in range(3):
        grad, _ = step()
        assert (grad.numpy() == 6 * rows * size).all(), grad


def case_ranks_that_trace_differently():
    """Names are counted within a graph: a rank may have traced more often."""
    size, rank = hvd.size(), hvd.rank()

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(c.all_gather(x)) + tf.reduce_sum(c.all_reduce(tf.reduce_sum(x)))
        return tape.gradient(loss, x)

    for k in range(5):
        rows = 3 + k * rank  # rank 0 traces once, the others every time
        assert (step(tf.ones((rows, 2))).numpy() == 2 * size).all()


@needs(more="gloo-3")
def case_functions_within_functions():
    """An inner function called twice in a step, a loop and a branch; the tape inside and outside."""
    size, rank = hvd.size(), hvd.rank()

    @tf.function
    def inner(x):
        return tf.reduce_sum(c.all_gather(x) ** 2)

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = inner(x) + inner(2 * x)
        return loss, tape.gradient(loss, x)

    @tf.function
    def loop(x):
        total = tf.constant(0.0)
        for k in tf.range(3):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)
            total += c.all_reduce(tf.reduce_sum(x)) * tf.cast(k, tf.float32)
        return total

    x = tf.ones((rank + 1, 2))
    for _ in range(3):
        loss, grad = step(x)
        assert float(loss) == 5 * 2 * sum(range(1, size + 1))
        assert (grad.numpy() == 10 * size).all(), grad
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = inner(x) + inner(2 * x)
        assert (tape.gradient(value, x).numpy() == 10 * size).all()
        assert float(loop(x)) == 3 * 2 * sum(range(1, size + 1))


@needs(more="gloo-3")
def case_sparse_gradients():
    """Rows looked up in what was gathered have a sparse gradient."""
    x = tf.ones((2, 3))
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(tf.gather(c.all_gather(x), [0, 0, 1]))
    expected = hvd.size() * np.array([[2.0] * 3, [1.0] * 3]) * (hvd.rank() == 0)
    np.testing.assert_array_equal(tape.gradient(loss, x), expected)


def case_dtypes():
    size, rank = hvd.size(), hvd.rank()
    for dtype in (tf.float16, tf.bfloat16, tf.float32):
        x = tf.fill((rank + 1, 2), tf.cast(rank + 1.0, dtype))
        with tf.GradientTape() as tape:
            tape.watch(x)
            out = c.all_gather(x)
            loss = tf.reduce_sum(c.all_reduce(tf.ones(2, dtype)) * tf.reduce_sum(out))
        grad = tape.gradient(loss, x)
        assert out.dtype == grad.dtype == dtype
        assert float(out[-1, 0]) == size
        assert (tf.cast(grad, tf.float32).numpy() == 2 * size * size).all(), grad
        y = tf.fill((2 * size,), tf.cast(1.0 + rank, dtype))
        assert tf.cast(c.reduce_scatter(y), tf.float32).numpy().tolist() == [sum(range(1, size + 1))] * 2
        assert float(c.shift(y)[0]) == 1.0 + (rank - 1) % size
        assert float(c.broadcast(y, size - 1)[0]) == size
    for dtype in (tf.int64, tf.int32, tf.uint8, tf.bool):
        x = tf.cast(tf.ones((rank, 2)), dtype)
        assert c.all_gather(x).dtype == dtype
        assert c.shift(x).shape == ((rank - 1) % size, 2)


def case_process_sets():
    """Ranks of a set count from 0; a rank may be in several sets, and in some of which others are not."""
    if hvd.size() < 3:
        sets = [hvd.add_process_set([hvd.size() - 1])]
    else:
        sets = [hvd.add_process_set([1, 2]), hvd.add_process_set([0, 2])]
    mine = [group for group in sets if group.included()]
    for group in sets:
        if group not in mine:
            with pytest.raises(UsageError, match=f"rank {hvd.rank()} is not in the process set"):
                c.all_reduce(tf.ones(1), process_set=group)

    def step():
        out = []
        for group in mine:
            me = group.rank()
            x, y = tf.ones((me + 1, 2)), tf.fill((2,), 1.0 + me)
            with tf.GradientTape(persistent=True) as tape:
                tape.watch([x, y])
                gathered = tf.reduce_sum(c.all_gather(x, process_set=group)) * (1.0 + me)
                root = c.broadcast(y, group.size() - 1, process_set=group)
                loss = tf.reduce_sum(root) * (1.0 + me)
            out.append((tape.gradient(gathered, x), root, tape.gradient(loss, y)))
        return out

    function = tf.function(step)
    for run in (step, function, function):
        for group, (dx, root, dy) in zip(mine, run(), strict=True):
            me, size = group.rank(), group.size()
            assert (dx.numpy() == sum(range(1, size + 1))).all()
            assert root.numpy().tolist() == [float(size)] * 2
            assert (dy.numpy() == (sum(range(1, size + 1)) if me == size - 1 else 0)).all()
            assert c.group_of(group).size == size
    c.all_reduce(tf.ones(1))  # nobody removes what others still use
    for group in sets:
        hvd.remove_process_set(group)


@needs(more="gloo-3")
def case_errors():
    size = hvd.size()
    for call, kind, text in (
        (lambda: c.all_gather(1.0), ShapeError, "all_gather: x has no axis 0"),
        (lambda: c.shift(1.0), ShapeError, "shift: x has no axis 0"),
        (lambda: c.broadcast(tf.ones(1), size), ConfigError, f"root={size} is not a rank"),
        (lambda: c.reduce_scatter(tf.ones(size), sizes=[1] * (size + 1)), ShapeError, "sizes="),
        (lambda: c.reduce_scatter(tf.ones(size), sizes=[2] * size), ShapeError, f"together {size}"),
        (lambda: c.all_gather(tf.ones(2), sizes=[1] * size), ShapeError, "this rank's part"),
    ):
        with pytest.raises(kind, match=f"{text}.*rank {hvd.rank()}"):
            call()
    rows = [tf.TensorSpec([None], tf.float32)]
    unknown = tf.function(c.reduce_scatter, input_signature=rows, autograph=False)
    with pytest.raises(ShapeError, match="not known while tracing"):
        unknown(tf.ones(size))
