"""Keras's ``fit`` on several ranks, logged to TensorBoard through a callback.

Data: 600 of scikit-learn's digits on uneven ranks. Rank 0 alone writes.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from sklearn.datasets import load_digits

import hvdloss.keras as hvd
from hvdloss.data import Shuffled
from hvdloss.report.trackers import TensorBoard


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument(
        "--output", default="runs/keras-trackers", help="folder of what is written (%(default)s)"
    )
    args = parser.parse_args()
    hvd.init()
    x, y = load_digits(return_X_y=True)
    x, y = (x[:600] / 16).astype("float32"), y[:600]
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.2)), loss=hvd.Objective("cross_entropy"))
    shares = 1.0 / (1.0 + np.arange(hvd.size()))
    data = hvd.ShardedDataset((x, y), Shuffled(len(x), seed=1, shares=shares), batch_size=32)
    model.fit(
        data,
        epochs=args.epochs,
        verbose=0,
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.FollowCallback(TensorBoard(f"{args.output}/tensorboard")),
        ],
    )
    if hvd.rank() == 0:
        print(model.optimizer.last_step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
