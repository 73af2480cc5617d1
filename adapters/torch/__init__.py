"""``import hvdloss.torch as hvd`` stands in for ``import horovod.torch as hvd``.

Every public name of Horovod's module is here. New are :class:`Objective`, the exact
:func:`DistributedOptimizer` (with an objective; without one it is Horovod's), ``Compression.bf16``,
:func:`check_synchronized`, :func:`synchronized`, :class:`StepReport`, and what splits a model over ranks.
Started by torchrun and its like the same names run over ``torch.distributed``, without Horovod; started by
nothing, and without Horovod installed, they run one process.
"""

from __future__ import annotations

from hvdloss.losses.segments import Segments
from hvdloss.report import RankReport, StepReport
from hvdloss.torch import _backend, _elastic
from hvdloss.torch.checkpoint import Checkpoint
from hvdloss.torch.compression import Compression
from hvdloss.torch.functions import (
    allgather_object,
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
)
from hvdloss.torch.guard import check_synchronized
from hvdloss.torch.integrations.data import ShardedLoader
from hvdloss.torch.integrations.explain import (
    LossAttribution,
    lime_weights,
    permutation_importance,
    predict_function,
    shap_values,
)
from hvdloss.torch.integrations.metrics import Metrics, synchronized
from hvdloss.torch.integrations.preemption import Preemption
from hvdloss.torch.integrations.recorder import Recorder, follow
from hvdloss.torch.integrations.stream import StreamLoader
from hvdloss.torch.integrations.uneven import uneven
from hvdloss.torch.normalization import SyncBatchNorm, refuse_pytorchs_own
from hvdloss.torch.objective import Objective
from hvdloss.torch.optimizer import DistributedOptimizer
from hvdloss.torch.segments import link_segments
from hvdloss.torch.several import global_losses
from hvdloss.torch.sharded import (
    ArcFace,
    ClassShards,
    CosFace,
    Grid,
    ShardedCrossEntropy,
    ShardedLinear,
    grid,
    sharded_cross_entropy,
)
from hvdloss.torch.split.checkpoint import full_state_dict
from hvdloss.torch.split.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from hvdloss.torch.split.norm import clip_split_grad_norm_
from hvdloss.torch.split.stages import Pipeline, PipelineStats, pipeline_stage
from hvdloss.torch.split.transformer import ParallelSelfAttention, ParallelTransformerLayer
from hvdloss.torch.training import (
    BestCheckpoint,
    EarlyStopping,
    TransformedLoader,
    merged_value,
    mixup,
    seed_everything,
)
from hvdloss.watch import same_fate

__all__ = [
    "ArcFace",
    "BestCheckpoint",
    "Checkpoint",
    "ClassShards",
    "ColumnParallelLinear",
    "Compression",
    "CosFace",
    "DistributedOptimizer",
    "EarlyStopping",
    "Grid",
    "LossAttribution",
    "Metrics",
    "Objective",
    "ParallelSelfAttention",
    "ParallelTransformerLayer",
    "Pipeline",
    "PipelineStats",
    "Preemption",
    "RankReport",
    "Recorder",
    "RowParallelLinear",
    "Segments",
    "ShardedCrossEntropy",
    "ShardedLinear",
    "ShardedLoader",
    "StepReport",
    "StreamLoader",
    "SyncBatchNorm",
    "TransformedLoader",
    "VocabParallelEmbedding",
    "allgather_object",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "check_synchronized",
    "clip_split_grad_norm_",
    "follow",
    "full_state_dict",
    "global_losses",
    "grid",
    "lime_weights",
    "link_segments",
    "merged_value",
    "mixup",
    "permutation_importance",
    "pipeline_stage",
    "predict_function",
    "same_fate",
    "seed_everything",
    "shap_values",
    "sharded_cross_entropy",
    "synchronized",
    "uneven",
]

# Horovod has no list of its names; what its module shows is public. Modules of our own stay ours, so that
# `import hvdloss.torch.optimizer as m` means what it says.
_names = getattr(_backend.hvd, "__all__", None) or [n for n in vars(_backend.hvd) if not n.startswith("_")]
_theirs = [
    name for name in _names if name not in __all__ and name not in ("compression", "functions", "optimizer")
]
# Scripts use some with an underscore too, which are not public here either.
_used = [
    name
    for name in vars(_backend.hvd)
    if _backend.engine == "horovod" and name[0] == "_" != name[1] and name not in globals()
]
globals().update({name: getattr(_backend.hvd, name) for name in (*_theirs, *_used)})
globals().update(_elastic.watched)
globals()["elastic"] = _elastic.elastic()
__all__ += _theirs

refuse_pytorchs_own()
