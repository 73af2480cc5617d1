"""Linear layers and an embedding split over ranks, of which two or three make a block (Megatron-LM).

A column-parallel layer, something elementwise, and a row-parallel layer compute what the ordinary ones do,
for one all-reduce in the forward pass and one in the backward pass: Shoeybi et al. 2019, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hvdloss.errors import ConfigError, ShapeError
from hvdloss.losses.shards import ClassShards
from hvdloss.split.parts import Cut, Parts
from hvdloss.torch.collectives import all_reduce, copy_to_ranks
from hvdloss.torch.ops import on_host
from hvdloss.torch.split.base import SplitModule, linear_bound

__all__ = ["ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding"]


class ColumnParallelLinear(SplitModule):
    """A ``torch.nn.Linear`` of whose outputs each rank computes some, and holds their rows of the weight.

    It is made, saved and loaded as the ordinary layer (:class:`~hvdloss.torch.split.base.SplitModule`).
    What follows is split too, up to a :class:`RowParallelLinear` with the same sizes: activation functions,
    and whatever else treats outputs one by one.

    Args:
        in_features, out_features: of the whole layer.
        bias: whether there is one.
        process_set: the ranks that share the layer; None for all.
        sizes: how many outputs each of them computes; None for even parts.
        device, dtype: of the parameters.

    Attributes:
        weight: (outputs of this rank, in_features).
        bias: (outputs of this rank,), or None.
        parts: which rank computes which outputs.

    Raises:
        ConfigError: an argument that cannot be used.
        UsageError: this rank is not in the process set.

    >>> ColumnParallelLinear(3, 4)(torch.ones(2, 3)).shape  # one rank
    torch.Size([2, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        process_set: Any = None,
        sizes: Sequence[int] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(process_set)
        self.in_features, self.out_features = in_features, out_features
        self.parts = self._parts(out_features, sizes)
        cut = Cut(self.parts)
        self._split_parameter("weight", cut, (in_features,), device, dtype)
        if bias:
            self._split_parameter("bias", cut, (), device, dtype)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def _parts(self, outputs: int, sizes: Sequence[int] | None) -> Parts:
        return Parts(outputs, self.size, sizes, "out_features")

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as ``torch.nn.Linear`` does, and keep this rank's."""
        bound = linear_bound(self.in_features)
        self._draw("weight", lambda t: t.uniform_(-bound, bound))
        if self.bias is not None:
            limit = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
            self._draw("bias", lambda t: t.uniform_(-limit, limit))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's outputs, (..., outputs of this rank).

        Args:
            x: (..., in_features), the same on all ranks of the process set.

        Raises:
            ShapeError: another last axis.

        Collectives: none; one all-reduce of the gradient of `x` in the backward pass.
        """
        return F.linear(self._copied(x), self.weight, self.bias)

    def _copied(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input, checked, which each rank uses differently from here on."""
        self._check_input(x, self.in_features, "in_features")
        return copy_to_ranks(x, name=self.wire_name, process_set=self.process_set)

    def extra_repr(self) -> str:
        """Return what the layer is."""
        mine = self.parts.range(self.rank)
        return (
            f"in_features={self.in_features}, {self.parts.noun}={self.out_features}, here {mine.start} to "
            f"{mine.stop - 1}, bias={self.bias is not None}"
        )


class RowParallelLinear(SplitModule):
    """A ``torch.nn.Linear`` of whose inputs each rank has some, and holds their columns of the weight.

    It is made, saved and loaded as the ordinary layer (:class:`~hvdloss.torch.split.base.SplitModule`).
    The bias is whole on every rank, and added once.

    Args:
        in_features, out_features: of the whole layer.
        bias: whether there is one.
        process_set: the ranks that share the layer; None for all.
        sizes: how many inputs each of them has: those of the layer before it. None for even parts.
        device, dtype: of the parameters.

    Attributes:
        weight: (out_features, inputs of this rank).
        bias: (out_features,), or None.
        parts: which rank has which inputs.

    Raises:
        ConfigError: an argument that cannot be used.
        UsageError: this rank is not in the process set.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        process_set: Any = None,
        sizes: Sequence[int] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(process_set)
        self.in_features, self.out_features = in_features, out_features
        self.parts = Parts(in_features, self.size, sizes, "in_features")
        self._split_parameter("weight", Cut(self.parts, axis=1), (out_features,), device, dtype)
        self.bias: torch.nn.Parameter | None
        if bias:
            self.bias = torch.nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as ``torch.nn.Linear`` does, and keep this rank's."""
        bound = linear_bound(self.in_features)
        self._draw("weight", lambda t: t.uniform_(-bound, bound))
        if self.bias is not None and self.bias.device.type != "meta":
            limit = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
            drawn = torch.empty(self.out_features, dtype=self.bias.dtype).uniform_(-limit, limit)
            with torch.no_grad():
                self.bias.copy_(drawn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the whole outputs, (..., out_features), the same on all ranks.

        Args:
            x: (..., inputs of this rank).

        Raises:
            ShapeError: another last axis.

        Collectives: one all-reduce of the outputs; none in the backward pass.
        """
        self._check_input(x, self.parts.size(self.rank), "this rank's in_features")
        out = all_reduce(
            F.linear(x, self.weight), name=self.wire_name, process_set=self.process_set, replicated=True
        )
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        """Return what the layer is."""
        mine = self.parts.range(self.rank)
        return (
            f"in_features={self.in_features}, here {mine.start} to {mine.stop - 1}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )


class VocabParallelEmbedding(SplitModule):
    """A ``torch.nn.Embedding`` of which each rank holds the rows of some indices.

    It is made, saved and loaded as the ordinary layer (:class:`~hvdloss.torch.split.base.SplitModule`). As
    the head of the same model, ``F.linear(copy_to_ranks(x), embedding.weight)`` are this rank's columns of
    the logits, for ``sharded_cross_entropy(logits, target, embedding.shards)``.

    Args:
        num_embeddings, embedding_dim: of the whole layer.
        padding_idx: of an embedding that is 0 at first and gets no gradient.
        process_set: the ranks that share the layer; None for all.
        sizes: how many embeddings each of them holds; None for even parts.
        device, dtype: of the weight.

    Attributes:
        weight: (embeddings of this rank, embedding_dim).
        shards: which rank holds which.

    Raises:
        ConfigError: an argument that cannot be used.
        UsageError: this rank is not in the process set.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        process_set: Any = None,
        sizes: Sequence[int] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(process_set)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.shards = ClassShards(num_embeddings, self.size, sizes)
        self.padding_idx = None
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ConfigError(
                    f"padding_idx={padding_idx!r} is not one of the num_embeddings={num_embeddings}"
                )
            mine, at = self.shards.range(self.rank), padding_idx % num_embeddings
            self.padding_idx = at - mine.start if at in mine else None
        self._split_parameter("weight", Cut(self.shards), (embedding_dim,), device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew, as ``torch.nn.Embedding`` does, and keep this rank's."""
        self._draw("weight", lambda t: t.normal_())
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx] = 0

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """Return the embeddings, (..., embedding_dim), the same on all ranks.

        Args:
            index: (...) integers from 0 to ``num_embeddings - 1``, the same on all ranks of the process set.

        Raises:
            ShapeError: an index of no embedding; on a device, PyTorch's assertion instead.

        Collectives: one all-reduce of the embeddings; none in the backward pass.
        """
        outside = (index < 0) | (index >= self.num_embeddings)
        if not on_host(outside):
            torch._assert_async(~outside.any())
        elif bool(outside.any()):
            raise ShapeError(
                f"VocabParallelEmbedding: index {int(index[outside][0])} is not one of 0 to "
                f"{self.num_embeddings - 1} (rank {self.rank})"
            )
        mine = self.shards.range(self.rank)
        here = (index >= mine.start) & (index < mine.stop)
        own = F.embedding(torch.where(here, index - mine.start, 0), self.weight, padding_idx=self.padding_idx)
        own = own.masked_fill(~here.unsqueeze(-1), 0)
        return all_reduce(own, name=self.wire_name, process_set=self.process_set, replicated=True)

    def extra_repr(self) -> str:
        """Return what the layer is."""
        mine = self.shards.range(self.rank)
        return f"{self.num_embeddings}, {self.embedding_dim}, here {mine.start} to {mine.stop - 1}"
