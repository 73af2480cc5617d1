"""``import hvdloss.keras as hvd`` stands in for ``import horovod.keras as hvd``, for Keras 3.

Every public name of Horovod's module is here, and those of ``horovod.tensorflow.keras``. New are
:class:`Objective`, a loss of Keras; a :func:`DistributedOptimizer` that reduces gradients under Keras 3,
exactly; :func:`check_synchronized`, :class:`ShardedDataset` and :class:`ShardedDense`. Importing it puts
a layer around ``compile``, ``fit`` and ``evaluate`` that acts on models whose optimizer is distributed
(see :mod:`hvdloss.keras.training`).
"""

from __future__ import annotations

from hvdloss.keras import _backend, callbacks, training
from hvdloss.keras.functions import (
    allgather,
    allreduce,
    broadcast,
    broadcast_global_variables,
    load_model,
    reducescatter,
)
from hvdloss.keras.integrations.data import ShardedDataset
from hvdloss.keras.integrations.explain import (
    LossAttribution,
    lime_weights,
    permutation_importance,
    predict_function,
    shap_values,
)
from hvdloss.keras.integrations.metrics import merged_results, synchronized
from hvdloss.keras.integrations.recorder import Recorder, follow
from hvdloss.keras.integrations.stream import StreamDataset
from hvdloss.keras.losses import Objective
from hvdloss.keras.optimizer import DistributedOptimizer, PartialDistributedOptimizer
from hvdloss.keras.rates import WarmupSchedule
from hvdloss.keras.seeds import seed_everything
from hvdloss.keras.sharded import ShardedCrossEntropy, ShardedDense, full_weights, load_full_weights
from hvdloss.keras.training import SynchronizationCallback
from hvdloss.losses.segments import Segments
from hvdloss.report import RankReport, StepReport
from hvdloss.tensorflow import _elastic
from hvdloss.tensorflow.checkpoint import Checkpoint
from hvdloss.tensorflow.functions import allgather_object, broadcast_object, broadcast_variables
from hvdloss.tensorflow.guard import check_synchronized
from hvdloss.tensorflow.integrations.metrics import Metrics
from hvdloss.tensorflow.integrations.preemption import Preemption
from hvdloss.tensorflow.integrations.uneven import uneven
from hvdloss.tensorflow.normalization import SyncBatchNormalization
from hvdloss.tensorflow.segments import link_segments, sequence_weights
from hvdloss.tensorflow.sharded import ArcFace, ClassShards, CosFace, Grid, grid
from hvdloss.tensorflow.training import BestCheckpoint, EarlyStopping, merged_value
from hvdloss.train import mixup
from hvdloss.watch import same_fate

__all__ = [
    "ArcFace",
    "BestCheckpoint",
    "Checkpoint",
    "ClassShards",
    "CosFace",
    "DistributedOptimizer",
    "EarlyStopping",
    "Grid",
    "LossAttribution",
    "Metrics",
    "Objective",
    "PartialDistributedOptimizer",
    "Preemption",
    "RankReport",
    "Recorder",
    "Segments",
    "ShardedCrossEntropy",
    "ShardedDataset",
    "ShardedDense",
    "StepReport",
    "StreamDataset",
    "SyncBatchNormalization",
    "SynchronizationCallback",
    "WarmupSchedule",
    "allgather",
    "allgather_object",
    "allreduce",
    "broadcast",
    "broadcast_global_variables",
    "broadcast_object",
    "broadcast_variables",
    "callbacks",
    "check_synchronized",
    "follow",
    "full_weights",
    "grid",
    "lime_weights",
    "link_segments",
    "load_full_weights",
    "load_model",
    "merged_results",
    "merged_value",
    "mixup",
    "permutation_importance",
    "predict_function",
    "reducescatter",
    "same_fate",
    "seed_everything",
    "sequence_weights",
    "shap_values",
    "synchronized",
    "uneven",
]

# What Horovod's modules for Keras show: basics, operations, process sets.
_THEIRS = [
    name
    for name in vars(_backend.hvd)
    if not name.startswith("_") and name not in __all__ and name not in ("DistributedGradientTape",)
]
# Scripts use some with an underscore too, which are not public here either.
_USED = [name for name in vars(_backend.hvd) if name[0] == "_" != name[1] and name not in globals()]
globals().update({name: getattr(_backend.hvd, name) for name in (*_THEIRS, *_USED)})
globals().update(_elastic.watched)

globals()["elastic"] = _backend.elastic()
__all__ += _THEIRS

training.install()
