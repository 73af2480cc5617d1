"""Training well on many ranks: decisions from global numbers, seeds, mixing, learning rates."""

from hvdloss.train.batches import TransformedBatches
from hvdloss.train.checkpoint import Checkpoint, CheckpointWarning, Loaded
from hvdloss.train.decisions import BestCheckpoint, EarlyStopping, merged_value
from hvdloss.train.files import write_atomically
from hvdloss.train.mixing import Mixed, mixup, partners
from hvdloss.train.rates import SCALING_RULES, Warmup, scale_factor
from hvdloss.train.seeds import generator_for, seed_for, seed_process

__all__ = [
    "SCALING_RULES",
    "BestCheckpoint",
    "Checkpoint",
    "CheckpointWarning",
    "EarlyStopping",
    "Loaded",
    "Mixed",
    "TransformedBatches",
    "Warmup",
    "generator_for",
    "merged_value",
    "mixup",
    "partners",
    "scale_factor",
    "seed_for",
    "seed_process",
    "write_atomically",
]
