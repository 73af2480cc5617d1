"""Horovod's gradient compression, and bfloat16, which Horovod cannot send by itself."""

from __future__ import annotations

from typing import Any

import torch
from hvdloss.torch._backend import hvd

__all__ = ["BF16Compressor", "Compression"]


class BF16Compressor:
    """Send gradients as bfloat16: half the bytes of float32 with its whole range.

    Horovod has no bfloat16 sum, so ranks exchange the pieces (one all-to-all), add them in float32, and
    gather the sums (one all-gather). That only the exact optimizer can do: with an objective.
    """

    dtype = torch.bfloat16

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Round to bfloat16."""
        return tensor.to(torch.bfloat16), tensor.dtype

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Return to the dtype it came from."""
        return tensor.to(ctx)


class Compression(hvd.Compression):
    """What may be passed as ``compression=``: ``none``, ``fp16``, ``bf16``."""

    bf16 = BF16Compressor
