"""``import hvdloss.tensorflow as hvd`` stands in for ``import horovod.tensorflow as hvd``.

Every public name of Horovod's module is here. New are :class:`Objective`, the exact
:func:`DistributedGradientTape` (with an objective; without one it is Horovod's), a
:func:`DistributedOptimizer` that reduces under Keras 3 as well, :func:`check_synchronized`, and
:class:`StepReport`. Without Horovod installed the same names run one process.
"""

from __future__ import annotations

from hvdloss.losses.segments import Segments
from hvdloss.report import RankReport, StepReport
from hvdloss.tensorflow import _backend, _elastic
from hvdloss.tensorflow._compat import leave_library_unconverted, let_variables_be_called
from hvdloss.tensorflow.checkpoint import Checkpoint
from hvdloss.tensorflow.functions import allgather_object, broadcast_object, broadcast_variables
from hvdloss.tensorflow.guard import check_synchronized
from hvdloss.tensorflow.integrations.explain import (
    LossAttribution,
    lime_weights,
    permutation_importance,
    predict_function,
    shap_values,
)
from hvdloss.tensorflow.integrations.metrics import Metrics
from hvdloss.tensorflow.integrations.preemption import Preemption
from hvdloss.tensorflow.integrations.recorder import Recorder, follow
from hvdloss.tensorflow.integrations.uneven import uneven
from hvdloss.tensorflow.normalization import SyncBatchNormalization, synchronize_moments
from hvdloss.tensorflow.objective import Objective
from hvdloss.tensorflow.optimizer import DistributedOptimizer
from hvdloss.tensorflow.segments import link_segments, sequence_weights
from hvdloss.tensorflow.several import Objectives, global_losses
from hvdloss.tensorflow.sharded import (
    ArcFace,
    ClassShards,
    CosFace,
    Grid,
    ShardedCrossEntropy,
    grid,
    sample_columns,
    sharded_cross_entropy,
)
from hvdloss.tensorflow.tape import DistributedGradientTape, PartialDistributedGradientTape
from hvdloss.tensorflow.training import BestCheckpoint, EarlyStopping, merged_value, seed_everything
from hvdloss.watch import same_fate

__all__ = [
    "ArcFace",
    "BestCheckpoint",
    "Checkpoint",
    "ClassShards",
    "CosFace",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "EarlyStopping",
    "Grid",
    "LossAttribution",
    "Metrics",
    "Objective",
    "Objectives",
    "PartialDistributedGradientTape",
    "Preemption",
    "RankReport",
    "Recorder",
    "Segments",
    "ShardedCrossEntropy",
    "StepReport",
    "SyncBatchNormalization",
    "allgather_object",
    "broadcast_object",
    "broadcast_variables",
    "check_synchronized",
    "follow",
    "global_losses",
    "grid",
    "lime_weights",
    "link_segments",
    "merged_value",
    "permutation_importance",
    "predict_function",
    "same_fate",
    "sample_columns",
    "seed_everything",
    "sequence_weights",
    "shap_values",
    "sharded_cross_entropy",
    "uneven",
]

# Horovod has no list of its names; what its module shows is public.
_THEIRS = [name for name in vars(_backend.hvd) if not name.startswith("_") and name not in __all__]
# Scripts use some with an underscore too (`hvd._executing_eagerly`), which is not public here either.
_USED = [name for name in vars(_backend.hvd) if name[0] == "_" != name[1] and name not in globals()]
globals().update({name: getattr(_backend.hvd, name) for name in (*_THEIRS, *_USED)})

globals().update(_elastic.watched)
globals()["elastic"] = _elastic.elastic()
__all__ += _THEIRS

leave_library_unconverted()
let_variables_be_called()
synchronize_moments(_backend.hvd)
