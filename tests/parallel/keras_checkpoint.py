"""Checkpoints with TensorFlow and Keras on several ranks: a run that goes on was not interrupted."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import keras
import numpy as np
from keras_support import before_case, same_on_all_ranks

import hvdloss
import hvdloss.keras as hvd
from hvdloss.data import Shuffled
from hvdloss.terms.policies import RankWeights
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3")

__all__ = ["before_case"]

ROWS = 50


def _folder() -> Path:
    """Return a folder that is there for rank 0 only."""
    made = Path(tempfile.mkdtemp(prefix="hvdloss-checkpoint-"))
    return made / "checkpoints" if hvd.rank() == 0 else made / "none" / "here"


def _run(folder: Path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(ROWS, 3)), rng.integers(0, 2, ROWS)
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((3,), dtype="float64"),
            keras.layers.Dense(8, activation="tanh", dtype="float64"),
            keras.layers.Dropout(0.2, seed=7 + hvd.rank(), dtype="float64"),
            keras.layers.Dense(2, dtype="float64"),
        ]
    )
    term = hvdloss.DataSkew(price=0.1, classes=2, window=4, policies=(RankWeights("dro", step=0.5),))
    objective = hvd.Objective("cross_entropy", terms=(term,))
    model.compile(hvd.DistributedOptimizer(keras.optimizers.AdamW(0.01, weight_decay=0.1)), objective)
    model.optimizer.build(model.trainable_variables)
    data = hvd.ShardedDataset((x, y), Shuffled(ROWS, seed=2), 4)
    return model, data, hvd.Checkpoint(folder, model=model, optimizer=model.optimizer, data=data)


class _SaveAfter(keras.callbacks.Callback):
    def __init__(self, checkpoint, batch: int) -> None:
        super().__init__()
        self.checkpoint, self.batch = checkpoint, batch

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 == self.batch:
            self.checkpoint.save(int(self.model.optimizer.iterations))


def case_a_fit_that_goes_on_is_the_fit_that_was_not_interrupted():
    folder = _folder()
    model, data, checkpoint = _run(folder)
    assert checkpoint.load() is None
    model.fit(data, epochs=1, verbose=0, callbacks=[_SaveAfter(checkpoint, 3)])
    model.fit(data, epochs=1, verbose=0)
    expected, report = model.get_weights(), model.optimizer.last_step
    model, data, checkpoint = _run(folder)
    assert checkpoint.load().step == 3
    for _ in data.epochs(2):
        model.fit(data, epochs=1, verbose=0)
    found = model.optimizer.last_step
    assert found.step == report.step
    error = max(float(np.abs(a - b).max()) for a, b in zip(expected, model.get_weights(), strict=True))
    assert error < 1e-12, error
    assert abs(found.loss / report.loss - 1) < 1e-12
    same_on_all_ranks(repr(found.loss))
    shutil.rmtree(folder.parent, ignore_errors=True)
    return {"error": error}
