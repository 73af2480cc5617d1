"""Metrics by themselves, and training well with Keras: callbacks that decide alike, seeds, mixup, rates."""

from __future__ import annotations

import inspect
import json
import math
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
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
    union,
)

import hvdloss
import hvdloss.keras as hvd
import hvdloss.tensorflow as thvd
from hvdloss.data import Shuffled
from hvdloss.metrics import AUC, F1, MAE
from hvdloss.tensorflow.ops import communicator_of
from hvdloss.train import generator_for, scale_factor
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3")

__all__ = ["before_case"]

CLASSES = 3


def alone():
    """Return the loss of one process that means what ours does."""
    return keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")


def shared_folder():
    return Path(hvd.broadcast_object(tempfile.mkdtemp(prefix="hvdloss-keras-"), root_rank=0))


def told(value):
    """Return every rank's value."""
    ranks = communicator_of(hvd.global_process_set)
    return [json.loads(text) for text in ranks.all_gather_bytes(json.dumps(value).encode(), "told")]


def raises_everywhere(kind, action, *words):
    """Assert that all ranks raise the same error."""
    with pytest.raises(kind) as caught:
        action()
    texts = told(str(caught.value))
    assert len(set(texts)) == 1, texts
    for word in words:
        assert word in texts[0], (word, texts[0])


# -- metrics ------------------------------------------------------------------------------------------

# What Keras's classes need to be made of, and the kind of samples they take; the others take real ones.
ARGUMENTS = {
    "BinaryIoU": {"target_class_ids": [0, 1]},
    "IoU": {"num_classes": CLASSES, "target_class_ids": [0, 2]},
    "MeanIoU": {"num_classes": CLASSES},
    "OneHotIoU": {"num_classes": CLASSES, "target_class_ids": [0, 2]},
    "OneHotMeanIoU": {"num_classes": CLASSES},
    "PrecisionAtRecall": {"recall": 0.5},
    "RecallAtPrecision": {"precision": 0.5},
    "SensitivityAtSpecificity": {"specificity": 0.5},
    "SpecificityAtSensitivity": {"sensitivity": 0.5},
    "TopKCategoricalAccuracy": {"dtype": "float32"},
    "SparseTopKCategoricalAccuracy": {"dtype": "float32"},
    "MeanMetricWrapper": {"fn": keras.losses.mean_squared_error},
}
LABELS = ("IoU", "MeanIoU")
SPARSE = ("SparseCategoricalAccuracy", "SparseCategoricalCrossentropy", "SparseTopKCategoricalAccuracy")


def samples(name, n=40):
    """Return targets and predictions that a metric takes."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, CLASSES, n)
    if name in LABELS:
        return labels, rng.integers(0, CLASSES, n)
    scores = rng.dirichlet(np.ones(CLASSES), n)
    if "TopK" in name:
        scores = scores.astype(np.float32)  # in TensorFlow it takes nothing else
    if name in SPARSE:
        return labels[:, None], scores
    if name in ("R2Score", "PearsonCorrelation", "ConcordanceCorrelation", "CosineSimilarity"):
        return rng.normal(size=(n, CLASSES)) + scores, rng.normal(size=(n, CLASSES)) + scores
    if name == "BinaryIoU":
        return (labels > 0).astype(float), scores[:, 0]
    return np.eye(CLASSES)[labels], scores


@needs(more="gloo-2 gloo-3")
def case_every_metric_of_keras_merges_by_summing():
    """Rank 0 has no batch at all: some metrics make their states with the first one."""
    rng = np.random.default_rng(4)
    n, worst, count = 40, 0.0, 0
    cut = [0, *(int(n * (r / max(hvd.size() - 1, 1)) ** 2) for r in range(hvd.size()))]
    weight = rng.uniform(0.5, 2.0, n)
    for name, kind in inspect.getmembers(keras.metrics, inspect.isclass):
        if name == "Metric":
            continue
        for options in ({}, {"multi_label": True, "num_labels": CLASSES}) if name == "AUC" else ({},):
            metric, one = (kind(**ARGUMENTS.get(name, {}), **options) for _ in range(2))
            assert hvd.synchronized(metric) is metric
            y, p = samples(name)
            reduces = name in ("Mean", "Sum")
            a, b = cut[hvd.rank()], cut[hvd.rank() + 1]
            for rows in (slice(a, (a + b) // 2), slice((a + b) // 2, b)):
                if rows.start < rows.stop:
                    arrays = (p[rows],) if reduces else (y[rows], p[rows])
                    weighted = {} if reduces else {"sample_weight": weight[rows]}
                    metric.update_state(*arrays, **weighted)
            one.update_state(*((p,) if reduces else (y, p)), **({} if reduces else {"sample_weight": weight}))
            found, expected = np.asarray(metric.result()), np.asarray(one.result())
            assert np.isfinite(expected).all(), name
            error = float(np.max(np.abs(found - expected) / (1e-9 + np.abs(expected))))
            assert error < 1e-5, (name, found, expected)  # some states are float32 whatever the dtype
            worst = max(worst, error)
            same_on_all_ranks([found])
            # What this rank saw is still its own: it can go on.
            assert np.allclose(np.asarray(metric.result()), found)
            count += 1
    assert count > 40
    return {"metrics of Keras": count, "error": worst}


class Largest(keras.metrics.Metric):
    """The largest value, which no sum gives."""

    def __init__(self, initializer="zeros", **options):
        super().__init__()
        self.initializer = initializer
        self.largest = self.add_variable((), initializer, name="largest", **options)

    def get_config(self):
        return {"initializer": self.initializer}

    def update_state(self, y, p=None, sample_weight=None):
        self.largest.assign(keras.ops.maximum(self.largest, keras.ops.max(y)))

    def result(self):
        return self.largest


def case_metrics_that_do_not_merge_by_summing_are_refused():
    with pytest.raises(hvdloss.ConfigError, match="aggregation='mean'"):
        hvd.synchronized(Largest(aggregation="mean"))
    with pytest.raises(hvdloss.ConfigError, match="begins at -1"):
        hvd.synchronized(Largest(keras.initializers.Constant(-1.0)))
    with pytest.raises(hvdloss.ConfigError, match="no metric of Keras"):
        hvd.synchronized(max)
    with pytest.raises(hvdloss.ConfigError, match="synchronized already"):
        hvd.synchronized(hvd.synchronized(keras.metrics.Mean()))
    metric = hvd.synchronized(keras.metrics.Mean(name="it"))
    with pytest.raises(hvdloss.UsageError, match="MetricAverageCallback"):
        tf.function(lambda: metric.result(), autograph=False)()
    metric = hvd.synchronized(keras.metrics.MeanIoU(num_classes=2 + hvd.rank()))
    raises_everywhere(hvdloss.AgreementError, metric.result, "rank 1", "number of classes")
    model = network()
    model.compile(hvd.DistributedOptimizer(sgd()), "mse", metrics=[Largest(aggregation="mean")])
    x, y, _ = data(np.random.default_rng(1), 8)
    raises_everywhere(
        hvdloss.ConfigError,
        lambda: model.fit(x, y, verbose=0, callbacks=[hvd.callbacks.MetricAverageCallback()]),
        "do not merge by summing",
    )


def case_metrics_of_tensors_are_those_of_one_process():
    rng = np.random.default_rng(6)
    n = 50
    scores, target = rng.normal(size=(n, CLASSES)), rng.integers(0, CLASSES, n)
    weight = rng.uniform(0, 2, n)
    metrics = {"f1": F1(CLASSES), "auc": AUC(CLASSES, from_logits=True)}
    for module in (hvd, thvd):
        ours = module.Metrics(metrics)
        rows = slice(n * hvd.rank() ** 2 // hvd.size() ** 2, n * (hvd.rank() + 1) ** 2 // hvd.size() ** 2)
        ours.update(tf.constant(scores[rows]), tf.constant(target[rows]), tf.constant(weight[rows]))
        found = ours.compute()
        for name, metric in metrics.items():
            assert abs(found[name] - metric(scores, target, weight)) < 1e-12
    half = thvd.Metrics(MAE())
    half.update(tf.cast(scores, tf.bfloat16), tf.zeros(scores.shape))
    assert abs(half.compute() - abs(tf.cast(tf.cast(scores, tf.bfloat16), tf.float64).numpy()).mean()) < 1e-12
    bad = hvd.Metrics(metrics)
    bad.update(scores * (math.nan if hvd.rank() == 1 else 1.0), target)
    raises_everywhere(hvdloss.ConfigError, bad.compute, "rank 1, update 1", "NaN")


# -- decisions ----------------------------------------------------------------------------------------


def _validation(steps):
    """Return each rank's: rank 0 has few samples, which the model fits best before it is trained."""
    x, y, _ = union(steps[0])
    first = x[:3], np.asarray(network()(x[:3]))
    return [first, *((x[r :: hvd.size()], y[r :: hvd.size()]) for r in range(1, hvd.size()))]


def case_keras_s_callbacks_decide_from_global_numbers_as_one_process():
    steps = step_batches(np.random.default_rng(8), 2)
    parts, folder = _validation(steps), shared_folder()
    logs, weights = {}, {}
    for who in ("ranks", "one"):
        model = network()
        optimizer = keras.optimizers.SGD(0.005, momentum=0.9)
        ours = who == "ranks"
        model.compile(
            hvd.DistributedOptimizer(optimizer) if ours else optimizer,
            loss=hvd.Objective("mse") if ours else alone(),
            metrics=["mse"],
        )
        checkpoint = {"monitor": "val_mse", "mode": "min", "filepath": folder / f"{who}-{hvd.rank()}.keras"}
        calls = [
            keras.callbacks.EarlyStopping(
                monitor="val_mse", mode="min", patience=3, restore_best_weights=True
            ),
            keras.callbacks.ReduceLROnPlateau(
                monitor="val_mse", mode="min", factor=0.5, patience=1, min_delta=0
            ),
        ]
        if ours:
            best = hvd.callbacks.BestModelCheckpoint(**checkpoint)
            calls = [hvd.callbacks.MetricAverageCallback(), *calls, best]
        feed, held = (mine(steps), parts[hvd.rank()]) if ours else ([union(step) for step in steps], None)
        if held is None:
            held = tuple(np.concatenate(a) for a in zip(*parts, strict=True))
        history = model.fit(
            dataset(feed),
            epochs=30,
            verbose=0,
            validation_data=held,
            validation_batch_size=64,
            callbacks=calls,
        )
        logs[who], weights[who] = history.history, model.get_weights()
    ranks, one = logs["ranks"], logs["one"]
    assert 3 < len(ranks["val_mse"]) < 20, (ranks["val_mse"], ranks["learning_rate"])
    assert ranks["learning_rate"] == one["learning_rate"]
    assert len(set(one["learning_rate"])) > 1
    assert np.allclose(ranks["val_mse"], one["val_mse"], rtol=1e-9)
    error = difference(weights["ranks"], weights["one"])
    assert error < 1e-10, error
    same_on_all_ranks(weights["ranks"])
    same_on_all_ranks([np.array(values) for name, values in ranks.items()])
    hvd.allreduce(np.zeros(1), name="written")
    assert sorted(p.name for p in folder.iterdir()) == ["ranks-0.keras"]
    saved = keras.models.load_model(folder / "ranks-0.keras", compile=False)
    assert difference(saved.get_weights(), weights["ranks"]) < 1e-12  # the best ones, that were restored
    return {"error, float64": error}


def case_what_keras_makes_of_nan_is_what_the_guide_says():
    def stops(values):
        stopping = keras.callbacks.EarlyStopping(monitor="v", mode="min", patience=2)
        stopping.set_model(network())
        stopping.model.stop_training = False
        stopping.on_train_begin()
        for epoch, value in enumerate(values):
            stopping.on_epoch_end(epoch, {"v": value})
            if stopping.model.stop_training:
                return epoch
        return None

    assert stops([2.0, math.nan, 1.0, math.nan, math.nan]) == 4  # NaN is never better
    assert stops([math.nan, 2.0, 1.0, 0.5]) == 2  # but the first value is the best, whatever it is


def case_callbacks_that_would_decide_apart_are_refused_on_every_rank():
    x, y, _ = data(np.random.default_rng(9), 8)
    average = hvd.callbacks.MetricAverageCallback
    stopping = keras.callbacks.EarlyStopping(monitor="loss", restore_best_weights=True)
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss")
    best = hvd.callbacks.BestModelCheckpoint(monitor="loss", filepath=shared_folder() / "best.keras")
    for calls, words in (
        ([stopping, average()], "EarlyStopping comes before MetricAverageCallback"),
        (
            [average(), stopping] if hvd.rank() else [plateau, average()],
            "callbacks of rank 0: ReduceLROnPlateau",
        ),
        ([*([best] if hvd.rank() == 1 else []), average()], "callbacks of rank 1: BestModelCheckpoint"),
        ([plateau], "ReduceLROnPlateau would decide from each rank's own metrics"),
        ([stopping], "EarlyStopping(restore_best_weights=True) would decide"),
    ):
        model = network()
        model.compile(hvd.DistributedOptimizer(sgd()), "mse")
        raises_everywhere(
            hvdloss.ConfigError, lambda m=model, c=calls: m.fit(x, y, verbose=0, callbacks=c), words
        )
    model.fit(x, y, verbose=0, callbacks=[keras.callbacks.EarlyStopping(monitor="loss")])  # all are told


def case_an_interrupted_writer_keeps_the_best_model():
    folder = shared_folder()
    path = folder / "best.keras"
    model = network()
    model.compile(sgd(), "mse")
    best = hvd.callbacks.BestModelCheckpoint(monitor="loss", filepath=path)
    best.set_model(model)
    best.on_epoch_end(0, {"loss": 2.0})
    kept = [w.copy() for w in model.get_weights()]
    plain = model.save

    def half(name, **options):
        Path(name).write_bytes(b"half a model")
        raise OSError("no space left")

    model.set_weights([w + 1 for w in kept])
    model.save = half
    if hvd.rank() == 0:
        with pytest.raises(OSError, match="no space"):
            best.on_epoch_end(1, {"loss": 1.0})
        assert [p.name for p in folder.iterdir()] == ["best.keras"]
        assert difference(keras.models.load_model(path).get_weights(), kept) == 0
        (folder / ".unfinished-best.keras").write_bytes(b"of a writer that was killed")
        model.save = plain
        best.on_epoch_end(2, {"loss": 3.0})  # no better: what is left takes no name
        assert difference(keras.models.load_model(path).get_weights(), kept) == 0
        best.on_epoch_end(3, {"loss": 0.5})
        assert difference(keras.models.load_model(path).get_weights(), model.get_weights()) == 0
        assert [p.name for p in folder.iterdir()] == ["best.keras"]
    hvd.allreduce(np.zeros(1), name="done")


def case_loops_of_ones_own_stop_together_and_keep_the_best():
    folder = shared_folder()
    best = thvd.BestCheckpoint(folder / f"best-{hvd.rank()}.npz")
    stopping, weights = thvd.EarlyStopping(patience=2), [np.zeros((2, 2)), np.zeros(3, np.float32)]
    values = [[1.0, 1.2, 1.4, 1.6, 1.8, 2.0], [3.0, 1.0, 0.5, 0.6, 0.7, 0.1]]
    for epoch in range(6):
        value, samples = values[min(hvd.rank(), 1)][epoch], [1, 99][min(hvd.rank(), 1)]
        best.step(tf.constant(value), [w + epoch for w in weights], tf.constant(samples))
        if stopping.step(value, samples):
            break
    assert (epoch, stopping.best_step, best.best_step) == (4, 2, 2)
    assert [p.name for p in folder.iterdir()] == ["best-0.npz"]
    held = best.load()
    assert [w.dtype for w in held] == [w.dtype for w in weights]
    assert all((w == 2).all() for w in held)
    assert hvd.merged_value(float(hvd.rank()), 1.0) == (hvd.size() - 1) / 2
    raises_everywhere(hvdloss.AgreementError, lambda: hvd.merged_value(float(hvd.rank())), "rank 1 has 1.0")


# -- regularisation and seeds -------------------------------------------------------------------------


def _regularized():
    keras.utils.set_random_seed(7)
    i = keras.Input((5,))
    h = keras.layers.Dense(
        4, activation="tanh", kernel_regularizer=keras.regularizers.L1L2(0.01, 0.05), bias_regularizer="l1"
    )(i)
    return keras.Model(i, keras.layers.Dense(1, kernel_regularizer="l2")(h))


@needs(more="gloo-2 gloo-3")
def case_l1_l2_and_weight_decay_count_once_with_accumulation():
    micro = step_batches(np.random.default_rng(10), 6, empty=True)
    pairs = [[*a, *b] for a, b in zip(micro[::2], micro[1::2], strict=True)]
    errors = []
    for make in (keras.optimizers.SGD, keras.optimizers.AdamW):
        model, other = _regularized(), _regularized()
        accumulating = make(0.02, weight_decay=0.1, gradient_accumulation_steps=2)
        model.compile(hvd.DistributedOptimizer(accumulating), loss=hvd.Objective("mse"))
        model.fit(dataset(mine(micro)), epochs=2, verbose=0)
        other.compile(make(0.02, weight_decay=0.1), loss=alone())
        train_alone(other, pairs, 2)
        errors.append(difference(model.get_weights(), other.get_weights()))
        assert errors[-1] < 1e-10, errors
        same_on_all_ranks(model.get_weights())
    return {"error, float64": max(errors)}


def _dropout_run(seed, epochs, start=0):
    """Return the initial weights, and the masks of every epoch."""
    hvd.seed_everything(seed, alike=True)
    i = keras.Input((5,))
    h = keras.layers.Dropout(0.5)(keras.layers.Dense(32)(i))
    h = keras.layers.GaussianNoise(0.1)(h)
    model = keras.Model(i, keras.layers.Dense(1)(h))
    first = [np.array(w).tolist() for w in model.get_weights()]
    masks = []

    class Look(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            kept = (
                model.layers[2](np.ones((1, 32)), training=True),
                model.layers[3](np.ones((1, 4)), training=True),
            )
            masks.append([np.asarray(k).tolist() for k in kept])

    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse")
    x, y, _ = data(np.random.default_rng(11), 8)
    calls = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.SeedCallback(seed), Look()]
    model.fit(x, y, epochs=epochs, initial_epoch=start, verbose=0, callbacks=calls)
    return first, masks, [np.array(w).tolist() for w in model.get_weights()]


@needs(more="gloo-2 gloo-3")
def case_dropout_differs_between_ranks_and_not_between_runs():
    first, masks, trained = _dropout_run(7, 3)
    again = _dropout_run(7, 3)
    assert (first, masks, trained) == again
    assert len({json.dumps(one) for one in told(first)}) == 1
    assert len({json.dumps(mask) for one in told(masks) for mask in one}) == 3 * hvd.size()
    assert _dropout_run(7, 3, start=2)[1] == masks[2:]  # gone on with after an interruption
    assert _dropout_run(8, 1)[0] != first


# -- mixup --------------------------------------------------------------------------------------------

SAMPLES = 31


def _mixed(seed=5, **options):
    rng = np.random.default_rng(12)
    x = rng.normal(size=(SAMPLES, 5))
    arrays = x, 2 * x[:, :1] + rng.normal(size=(SAMPLES, 1)), rng.uniform(0.5, 2.0, SAMPLES)
    return hvd.ShardedDataset(
        arrays,
        Shuffled(SAMPLES, seed=1),
        4,
        transform=lambda batch, rng: hvd.mixup(*batch, alpha=1.0, rng=rng).batch(),
        seed=seed,
        **options,
    )


def _lists(batch):
    return [np.asarray(a).tolist() for a in batch]


def case_mixup_in_fit_is_exact_and_goes_on_where_it_stopped():
    model, one = network(), network()
    model.compile(hvd.DistributedOptimizer(sgd()), hvd.Objective("mse"))
    one.compile(sgd(), alone())
    batches = _mixed()
    model.fit(batches, epochs=2, verbose=0)
    again = _mixed()
    seen = []
    for epoch in range(2):
        seen.append([_lists(again[number]) for number in range(len(again))])
        if epoch == 1:
            state = json.loads(json.dumps(again.state_dict(2)))
        again.next_epoch()
    ranks = told(seen)
    for epoch in range(2):
        for step in range(len(seen[epoch])):
            parts = [[np.array(a) for a in rank[epoch][step]] for rank in ranks if rank[epoch][step][0]]
            x, y, w = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            one.train_on_batch(x, y, sample_weight=w)
    error = difference(model.get_weights(), one.get_weights())
    assert error < 1e-10, error
    assert seen[0] != seen[1]
    resumed = _mixed()
    resumed.load_state_dict(state)
    assert [_lists(resumed[number]) for number in range(len(resumed))] == seen[1][2:]
    place = {"rank": hvd.rank(), "epoch": 1, "step": 2}
    assert (
        generator_for(5, **place, stream="batch").random()
        == generator_for(5, **place, stream="batch").random()
    )
    with pytest.raises(hvdloss.ConfigError, match="transform=3"):
        hvd.ShardedDataset((np.ones(3),), Shuffled(3), 1, transform=3)
    return {"error, float64": error}


# -- learning rates -----------------------------------------------------------------------------------


def case_warmup_to_a_scaled_rate_is_one_process_s():
    steps = step_batches(np.random.default_rng(13), 7)
    factor = scale_factor(8 * hvd.size(), 8)
    decay = keras.optimizers.schedules.PiecewiseConstantDecay([4], [0.02, 0.01])

    def make():
        return keras.optimizers.SGD(hvd.WarmupSchedule(decay, factor, 4), momentum=0.9)

    schedule = make().learning_rate
    rates = [float(make()._learning_rate(step)) for step in range(7)]
    expected = [(0.02 if s <= 4 else 0.01) * (1 + (factor - 1) * min(s / 4, 1)) for s in range(7)]
    assert np.allclose(rates, expected, rtol=1e-6), (rates, expected, schedule)
    model, one = network(), network()
    model.compile(hvd.DistributedOptimizer(make()), hvd.Objective("mse"))
    one.compile(make(), alone())
    model.fit(dataset(mine(steps)), verbose=0)
    train_alone(one, steps)
    error = difference(model.get_weights(), one.get_weights())
    assert error < 1e-10, error
    kept = keras.optimizers.schedules.deserialize(keras.optimizers.schedules.serialize(make()._learning_rate))
    assert [float(kept(step)) for step in range(7)] == rates
    return {"error, float64": error}
