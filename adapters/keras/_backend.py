"""What this adapter stands on: Keras 3 with TensorFlow underneath, Horovod, and a few of Keras's internals.

Keras has no public name for what ``compile`` builds from a model's losses; all that is used of its
internals is imported here.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import keras
from hvdloss.errors import ConfigError

__all__ = ["CompileLoss", "TensorFlowTrainer", "Trainer", "get_keras_mask", "hvd", "pythonify_logs"]

if keras.backend.backend() != "tensorflow":
    raise ConfigError(
        f"hvdloss.keras needs Keras on the TensorFlow backend, but KERAS_BACKEND is "
        f"{keras.backend.backend()!r}: set KERAS_BACKEND=tensorflow, or train a PyTorch module with "
        f"hvdloss.torch"
    )
if int(keras.__version__.split(".")[0]) < 3:
    raise ConfigError(f"hvdloss.keras needs Keras 3, but this is Keras {keras.__version__}")

from hvdloss.tensorflow._backend import hvd
from keras.src.backend import get_keras_mask
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from keras.src.losses.loss import squeeze_or_expand_to_same_rank  # noqa: F401
from keras.src.trainers.compile_utils import CompileLoss
from keras.src.trainers.trainer import Trainer
from keras.src.utils.python_utils import pythonify_logs


class _CommitStateCallback(keras.callbacks.Callback):
    """Horovod's, where that is not installed: commits a state after every so many batches, and epochs."""

    def __init__(self, state: Any, batches_per_commit: int = 1) -> None:
        super().__init__()
        self.state, self.batches_per_commit = state, batches_per_commit

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Commit if due."""
        if (batch + 1) % self.batches_per_commit == 0:
            self.state.commit()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Commit."""
        self.state.commit()


def elastic() -> Any:
    """Return what ``hvd.elastic`` shows: Horovod's callbacks, and states that know hvdloss and Keras 3."""
    if importlib.util.find_spec("horovod") is None:
        return SimpleNamespace(
            **vars(hvd.elastic),
            KerasState=hvd.elastic.TensorFlowKerasState,
            CommitStateCallback=_CommitStateCallback,
        )
    from horovod.tensorflow.keras import elastic as theirs

    from hvdloss.tensorflow._elastic import elastic as ours

    names = {name: value for name, value in vars(theirs).items() if not name.startswith("_")}
    mine = vars(ours())
    return SimpleNamespace(**{**names, **mine, "KerasState": mine["TensorFlowKerasState"]})
