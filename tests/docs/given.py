"""What pages take as given, where it is more than a few lines; hidden blocks import it."""

from __future__ import annotations

from typing import Any


def keras_names() -> dict[str, Any]:
    """Return names that snippets for Keras take as given: a compiled model and its data."""
    import keras
    import numpy as np
    import tensorflow as tf

    import hvdloss.keras as hvd
    from hvdloss.data import Shuffled

    hvd.init()
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    y = (x[:, :1] > 0).astype(np.float32)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, activation="sigmoid")])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), hvd.Objective("mse"))
    return {
        **{"keras": keras, "hvd": hvd, "Shuffled": Shuffled, "tf": tf},
        **{"x": x, "y": y, "w": np.ones(64), "model": model},
        "dataset": tf.data.Dataset.from_tensor_slices((x, y)).batch(16),
        "data": hvd.ShardedDataset((x, y), Shuffled(64), 16),
    }
