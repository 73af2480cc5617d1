"""Many ranks, TensorFlow and Keras: only sums of ledgers travel, as with more than 64 ranks."""

from __future__ import annotations

from contextlib import contextmanager

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_support import before_case, data, dataset, mine, network, sgd, step_batches
from tf_record import folder, loop
from tf_support import raised, same_on_all_ranks

import hvdloss
import hvdloss.keras
import hvdloss.tensorflow as hvd
from hvdloss.errors import NonFiniteLossError, UsageError, WeightError
from hvdloss.report import read
from hvdloss.terms.policies import SyncPeriod
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3 mpi-2")

__all__ = ["before_case"]

CAPS = {"64": 21, "1": 22}  # sizes that no other case asks for, so that tapes ask the environment again


@contextmanager
def summing(ranks="1"):
    """Have what is made inside send no more than sums from so many ranks on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HVDLOSS_TABLE_RANKS", ranks)
        yield


def stepping(objective, function, ranks="1", **options):
    """Return a step of a small model on uneven ranks, with a weight and a value to spoil."""
    variables = [tf.Variable(tf.ones((4, 3), tf.float64) / 9), tf.Variable(tf.zeros(3, tf.float64))]

    def step(x, y, w):
        with tf.GradientTape() as tape:
            loss = objective(x @ variables[0] + variables[1], y, w)
        tape = hvd.DistributedGradientTape(tape, objective, bucket_cap_mb=CAPS[ranks], **options)
        gradients = tape.gradient(loss, variables)
        for v, g in zip(variables, gradients, strict=True):
            v.assign_sub(0.1 * g)
        return gradients

    step = tf.function(step, reduce_retracing=True) if function else step

    def go(weight=1.0, value=0.0):
        n = 3 + 2 * hvd.rank()
        rng = np.random.default_rng(hvd.rank())
        x, y = rng.normal(size=(n, 4)), rng.integers(0, 3, n)
        x[0, 0] += value
        with summing(ranks):
            return step(
                tf.constant(x), tf.constant(y), tf.constant(np.full(n, weight) * rng.uniform(1, 2, n))
            )

    return go


def compare(function, limit=1e-12, **options):
    """Steps of which sums travel are those of a table."""
    found = []
    for ranks in ("64", "1"):
        objective = hvd.Objective("cross_entropy")
        step = stepping(objective, function, ranks, **options)
        found.append(([g.numpy() for g in (*step(), *step())], objective.last_step))
    (expected, table), (gradients, sums) = found
    for a, b in zip(gradients, expected, strict=True):
        assert np.allclose(a, b, rtol=limit, atol=limit)
    assert table.ranks.gathered
    assert not sums.ranks.gathered
    assert (table.elements, table.step) == (sums.elements, sums.step)
    assert sums.weight == table.weight  # to the last bit
    assert sums.loss == pytest.approx(table.loss, rel=1e-2)
    same_on_all_ranks([np.array([sums.loss, sums.weight])])


def case_a_function_is_that_of_a_table():
    compare(True)


def case_compressed_gradients_are_those_of_a_table():
    compare(False, 1e-3, compression=hvd.Compression.fp16)


def case_gradients_that_are_divided_before_are_those_of_a_table():
    compare(True, gradient_predivide_factor=3.0)


def case_who_reads_is_gathered_for_on_all_ranks():
    objective = hvd.Objective("cross_entropy")
    step = stepping(objective, True)
    step()
    first = objective.last_step
    if hvd.rank() == hvd.size() - 1:  # one rank looks
        assert isinstance(raised(lambda: first.ranks[0]), UsageError)
    step()
    second = objective.last_step
    assert [one.elements for one in second.ranks] == [3 + 2 * rank for rank in range(hvd.size())]
    same_on_all_ranks([np.array([one.weight for one in second.ranks])])


def case_faults_are_named_alike():
    last, name = hvd.rank() == hvd.size() - 1, f"rank {hvd.size() - 1}"
    for function in (False, True):
        objective = hvd.Objective("cross_entropy")
        step = stepping(objective, function)
        step()
        for kind, options, words in (
            (WeightError, {"weight": -1.0}, "below zero"),
            (NonFiniteLossError, {"value": np.nan}, "NaN or infinite"),
        ):
            error = raised(lambda step=step, options=options: step(**(options if last else {})))
            assert isinstance(error, tf.errors.OpError if function else kind), error
            assert name in str(error)
            assert words in str(error)
            same_on_all_ranks([np.frombuffer(str(error)[-300:].encode(), np.uint8)] if not function else [])
        step()
        assert objective.last_step.step == 2
        assert not objective.last_step.ranks.gathered


def case_dropping_knows_whose_it_was():
    last = hvd.size() - 1
    objective = hvd.Objective("cross_entropy", nonfinite="drop")
    step = stepping(objective, True)
    reports = []
    for bad in (False, True, True, False):
        step(value=np.nan if bad and hvd.rank() == last else 0.0)
        reports.append(objective.last_step)
    assert [report.ranks.gathered for report in reports] == [False, True, True, False]
    assert [one.dropped for one in reports[2].ranks] == [0] * last + [2]
    assert [one.nonfinite for one in reports[1].ranks] == [""] * last + ["loss"]
    assert reports[3].ranks.dropped == 2


def case_terms_see_every_rank_in_every_step():
    found = []
    for ranks in ("64", "1"):
        terms = (hvdloss.CommunicationCost(price=0.1), hvdloss.DataSkew(price=0.1, classes=3))
        objective = hvd.Objective("cross_entropy", terms=terms)
        step = stepping(objective, True, ranks)
        step()
        step()
        assert objective.last_step.ranks.gathered
        found.append(objective.last_step.terms["skew"].values)
    assert found[0] == found[1]


def case_a_record_of_a_loop():
    path = folder() / "run.jsonl"
    with summing():
        objective = hvd.Objective("cross_entropy", process_set=hvd.global_process_set)
        with hvd.Recorder(path) as recorder:
            recorder.follow(objective)
            step = stepping(objective, True)
            step()
            step()
        step()
    assert not objective.last_step.ranks.gathered
    if hvd.rank() == 0:
        steps = read(path).steps
        assert [line["step"] for line in steps] == [1, 2]
        assert steps[1]["ranks"]["elements"] == [3 + 2 * rank for rank in range(hvd.size())]


def fitted(ranks, steps, loss="mse", callbacks=(), **options):
    """Return a model that Keras's fit trained, and its optimizer."""
    with summing(ranks):
        model = network()
        model.compile(hvdloss.keras.DistributedOptimizer(sgd(), **options), loss=loss)
        model.fit(dataset(mine(steps)), epochs=2, verbose=0, callbacks=list(callbacks))
    return model, model.optimizer


def case_fit_is_that_of_a_table():
    steps = step_batches(np.random.default_rng(3), 6)
    found = []
    for ranks in ("64", "1"):
        model, optimizer = fitted(ranks, steps)
        assert optimizer.last_step.ranks.gathered == (ranks == "64")
        found.append((model.get_weights(), optimizer.last_step))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        assert np.allclose(a, b, rtol=1e-12, atol=1e-14)
    assert found[0][1].weight == found[1][1].weight


def case_fit_with_a_record():
    path = folder() / "run.jsonl"
    steps = step_batches(np.random.default_rng(4), 3)
    fitted("1", steps, callbacks=[hvdloss.keras.callbacks.RecorderCallback(path)])
    if hvd.rank() == 0:
        lines = read(path).steps
        assert len(lines) == 2 * len(steps)
        assert all(len(line["ranks"]["elements"]) == hvd.size() for line in lines)


def case_fit_with_local_steps():
    steps = step_batches(np.random.default_rng(5), 4)
    found = []
    for ranks in ("64", "1"):
        loss = hvdloss.keras.Objective("mse", terms=(hvdloss.CommunicationCost(policies=(SyncPeriod(2),)),))
        model, _ = fitted(ranks, steps, loss)
        same_on_all_ranks(model.get_weights())
        found.append(model.get_weights())
    for a, b in zip(*found, strict=True):
        assert np.allclose(a, b, rtol=1e-12, atol=1e-14)


def case_several_losses_share_exact_sums():
    rng = np.random.default_rng(6)
    found = []
    x, y, _ = data(rng, 8)
    n = 3 + hvd.rank()
    for ranks in ("64", "1"):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((x.shape[1],), dtype="float64")
        heads = [keras.layers.Dense(y.shape[1], dtype="float64", name=name)(inputs) for name in ("a", "b")]
        with summing(ranks):
            model = keras.Model(inputs, heads)
            model.compile(hvdloss.keras.DistributedOptimizer(sgd()), loss={"a": "mse", "b": "mae"})
            model.fit(x[:n], {"a": y[:n], "b": y[:n]}, batch_size=8, verbose=0)
        found.append(model.get_weights())
    for a, b in zip(*found, strict=True):
        assert np.allclose(a, b, rtol=1e-12, atol=1e-14)


def case_a_listener_that_came_late_is_told_from_the_next_step_on():
    objective = hvd.Objective("cross_entropy")
    go = loop(objective, False)
    with summing():
        go(1)
        told = []
        objective.step_state.add_listener(told.append)
        go(2)
        objective.step_state.remove_listener(told.append)
    assert all(report.ranks.gathered for report in told)
