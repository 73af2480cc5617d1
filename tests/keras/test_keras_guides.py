"""The code of the guides, in TensorFlow and Keras, runs in one process, after what it takes as given."""

from __future__ import annotations

import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdloss.keras as hvd
import hvdloss.tensorflow as tf_hvd
from hvdloss.data import Shuffled

DOCS = Path(__file__).resolve().parents[2] / "docs"


def blocks(guide: str, kind: str, word: str) -> list[str]:
    """Return a guide's blocks of a kind that have a word in them."""
    found = re.findall(rf"```{kind}\n(.*?)```", (DOCS / guide).read_text(), re.DOTALL)
    return [block for block in found if word in block]


def given() -> dict[str, object]:
    """Return the names that snippets for Keras take as given."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    y = (x[:, :1] > 0).astype(np.float32)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, activation="sigmoid")])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), hvd.Objective("mse"))
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    data = hvd.ShardedDataset((x, y), Shuffled(64), 16)
    checkpoint = hvd.Checkpoint("checkpoints", model=model)
    names = {
        "data": data,
        "checkpoint": checkpoint,
        "x": x,
        "y": y,
        "w": np.ones(64),
        "model": model,
        "dataset": dataset,
    }
    return {**names, "keras": keras, "hvd": hvd, "Shuffled": Shuffled}


@pytest.fixture(autouse=True)
def _initialised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    hvd.init()


@pytest.mark.parametrize(
    ("guide", "kind", "word", "then"),
    [
        ("data.md", "py", "ShardedDataset", ""),
        ("training.md", "py", "BestModelCheckpoint", "model.fit(x, y, validation_data=(x, y), epochs=2, "
         "callbacks=callbacks, verbose=0)\nassert __import__('os').path.exists('best.keras')"),
        ("training.md", "py", "ShardedDataset", "model.fit(data, verbose=0)"),
        ("metrics.md", "py", "synchronized", "assert 0 <= float(auc.result()) <= 1"),
        ("tensorflow.md", "python", "model.compile", ""),
        ("elastic.md", "py", "checkpoint = hvd.Checkpoint", "assert checkpoint.load().step == 2"),
        ("elastic.md", "py", "KerasState", "train(state)\nassert data.epoch.number == 1 and data.made == 4"),
        ("elastic.md", "py", "PreemptionCallback", ""),
    ],
)  # fmt: skip
def test_snippets_for_keras(guide, kind, word, then):
    (block,) = blocks(guide, kind, word)
    names = given()
    exec(compile(block + "\n" + then, guide, "exec"), names)
    assert all(np.isfinite(w).all() for w in names["model"].get_weights())


def test_elastic_loop_with_a_tape():
    (block,) = blocks("elastic.md", "py", "TensorFlowState")
    names = given()
    w = tf.Variable(tf.ones((4, 1)))
    objective = tf_hvd.Objective("mse")

    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = objective(x @ w, y)
        (g,) = tf_hvd.DistributedGradientTape(tape, objective).gradient(loss, [w])
        w.assign_sub(0.1 * g)

    names.update(hvd=tf_hvd, variables=[w], objective=objective, train_step=train_step)
    exec(compile(block + "\ntrain(state)", "elastic.md", "exec"), names)
    assert names["state"].step == 2 * 4


def test_snippets_for_tensorflow(tmp_path):
    loop, accumulating = blocks("tensorflow.md", "python", "objective")[:2]
    names = {
        **{"x": tf.ones((5, 3)), "y": tf.ones((5, 1)), "weight": tf.ones((5, 1)), "keras": keras},
        **{"W": tf.Variable(tf.ones((3, 1))), "b": tf.Variable(tf.zeros(1))},
        "optimizer": keras.optimizers.SGD(0.1),
    }
    path = tmp_path / "snippet.py"  # tf.function reads the source
    path.write_text(loop)
    exec(compile(loop, str(path), "exec"), names)
    assert names["objective"].last_step.step == 1
    exec(compile(accumulating, "tensorflow.md", "exec"), names)
