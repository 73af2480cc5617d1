"""Classification of handwritten digits in which errors on 8s and 9s count five times."""

import horovod.tensorflow.keras as hvd
import keras
import numpy as np
from sklearn.datasets import load_digits


def train(epochs=5, batch_size=32):
    hvd.init()
    keras.utils.set_random_seed(0)
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    mine = order[hvd.rank() :: hvd.size()]
    x, y = (x[mine] / 16).astype("float32"), y[mine]
    weight = np.where(y >= 8, 5.0, 1.0)

    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(10)]
    )
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
    model.compile(optimizer, loss=loss)
    model.fit(
        x,
        y,
        sample_weight=weight,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        verbose=2 if hvd.rank() == 0 else 0,
    )
    return model


if __name__ == "__main__":
    train()
