"""Self-attention split by heads, and a transformer block of split layers (Shoeybi et al. 2019, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hvdloss.errors import ConfigError, ShapeError
from hvdloss.split.parts import Cut, Parts
from hvdloss.torch.collectives import copy_to_ranks
from hvdloss.torch.split.base import SplitModule
from hvdloss.torch.split.layers import ColumnParallelLinear, RowParallelLinear

__all__ = ["ParallelSelfAttention", "ParallelTransformerLayer"]

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class ParallelSelfAttention(SplitModule):
    """Self-attention as ``torch.nn.MultiheadAttention(..., batch_first=True)``, each rank with some heads.

    It is made, saved and loaded as that (:class:`~hvdloss.torch.split.base.SplitModule`). There is no
    dropout, whose numbers would depend on the ranks.

    Args:
        embed_dim: of each token.
        num_heads: of all ranks together; divides `embed_dim`.
        bias: whether projections have one.
        process_set: the ranks that share the heads; None for all.
        sizes: how many heads each of them has; None for even parts.
        device, dtype: of the parameters.

    Attributes:
        in_proj_weight, in_proj_bias: the rows of this rank's heads, of queries, keys, and values.
        out_proj: a :class:`RowParallelLinear`.
        heads: which rank has which heads.

    Raises:
        ConfigError: an argument that cannot be used.
        UsageError: this rank is not in the process set.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        bias: bool = True,
        process_set: Any = None,
        sizes: Sequence[int] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(process_set)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.heads = Parts(num_heads, self.size, sizes, "num_heads")
        if embed_dim % num_heads:
            raise ConfigError(f"num_heads={num_heads} does not divide embed_dim={embed_dim}")
        self.head_dim = embed_dim // num_heads
        cut = Cut(self.heads, unit=self.head_dim, blocks=3)
        self._split_parameter("in_proj_weight", cut, (embed_dim,), device, dtype)
        if bias:
            self._split_parameter("in_proj_bias", cut, (), device, dtype)
        else:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = RowParallelLinear(
            embed_dim,
            embed_dim,
            bias=bias,
            process_set=process_set,
            sizes=[n * self.head_dim for n in self.heads.sizes],
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projections into heads anew, as ``torch.nn.MultiheadAttention`` does, and clear biases."""
        std = math.sqrt(2.0 / float(self.embed_dim + 3 * self.embed_dim))
        bound = math.sqrt(3.0) * std  # as xavier_uniform_, to the last bit
        self._draw("in_proj_weight", lambda t: t.uniform_(-bound, bound))
        with torch.no_grad():
            for bias in (self.in_proj_bias, self.out_proj.bias):
                if bias is not None:
                    bias.zero_()

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Return what tokens make of each other, (N, T, embed_dim), the same on all ranks.

        Args:
            x: (N, T, embed_dim), the same on all ranks of the process set.
            attn_mask: (T, T), as in ``torch.nn.MultiheadAttention``: True where a token does not see
                another, or what is added to the scores.
            key_padding_mask: (N, T), True for tokens that nobody sees, or what is added.
            is_causal: whether tokens see those before them only, without an `attn_mask`.

        Raises:
            ShapeError: what does not fit.

        Collectives: one all-reduce of the outputs; one of the gradient of `x` in the backward pass.
        """
        self._check_input(x, self.embed_dim, "embed_dim")
        if x.dim() != 3:
            raise ShapeError(
                f"ParallelSelfAttention: x must be (N, T, embed_dim), not {tuple(x.shape)} (rank {self.rank})"
            )
        n, length, _ = x.shape
        mask = self._mask(x, attn_mask, key_padding_mask, is_causal)
        x = copy_to_ranks(x, name=self.wire_name, process_set=self.process_set)
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        heads = (
            part.view(n, length, -1, self.head_dim).transpose(1, 2) for part in projected.chunk(3, dim=-1)
        )
        seen = F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=is_causal and mask is None)
        out: torch.Tensor = self.out_proj(seen.transpose(1, 2).flatten(2))
        return out

    def _mask(self, x: torch.Tensor, attn: Any, padding: Any, causal: bool) -> torch.Tensor | None:
        """Return what is added to the scores, (N or 1, 1, T, T) or (N or 1, 1, 1, T); None for nothing."""
        n, length, _ = x.shape
        if causal and attn is None and padding is not None:
            attn = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        out = None
        for name, given, shape in (
            ("attn_mask", attn, (length, length)),
            ("key_padding_mask", padding, (n, length)),
        ):
            if given is None:
                continue
            if tuple(given.shape) != shape:
                raise ShapeError(
                    f"ParallelSelfAttention: {name} of shape {tuple(given.shape)} must be {shape} "
                    f"(rank {self.rank})"
                )
            if given.dtype == torch.bool:
                given = torch.zeros(shape, dtype=x.dtype, device=x.device).masked_fill(given, -math.inf)
            given = given[None, None] if name == "attn_mask" else given[:, None, None]
            out = given if out is None else out + given
        return out

    def extra_repr(self) -> str:
        """Return what the layer is."""
        mine = self.heads.range(self.rank)
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, here {mine.start} to {mine.stop - 1}"


class ParallelTransformerLayer(torch.nn.Module):
    """A block as ``torch.nn.TransformerEncoderLayer(..., dropout=0, batch_first=True)``, split over ranks.

    It is made, saved and loaded as that. Attention is split by heads and the feed-forward layers by
    features; the normalisations are whole on every rank, where their gradients are equal.

    Args:
        d_model, nhead, dim_feedforward, activation, layer_norm_eps, norm_first, bias: as in
            ``torch.nn.TransformerEncoderLayer``; `activation` is ``"relu"``, ``"gelu"``, or a function that
            treats features one by one.
        process_set: the ranks that share the block; None for all.
        head_sizes: how many heads each of them has; None for even parts.
        feature_sizes: how many of `dim_feedforward` features each has; None for even parts.
        device, dtype: of the parameters.

    Raises:
        ConfigError: an argument that cannot be used.
        UsageError: this rank is not in the process set.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        *,
        activation: str | Callable[[torch.Tensor], torch.Tensor] = "relu",
        layer_norm_eps: float = 1e-5,
        norm_first: bool = False,
        bias: bool = True,
        process_set: Any = None,
        head_sizes: Sequence[int] | None = None,
        feature_sizes: Sequence[int] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(activation, str):
            if activation not in _ACTIVATIONS:
                raise ConfigError(
                    f"activation={activation!r} is not known; choose one of "
                    f"{', '.join(map(repr, _ACTIVATIONS))}, or pass a function"
                )
            activation = _ACTIVATIONS[activation]
        self.activation, self.norm_first = activation, norm_first
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        among: dict[str, Any] = {"bias": bias, "process_set": process_set, **place}
        # In the order in which the ordinary block draws them.
        self.self_attn = ParallelSelfAttention(d_model, nhead, sizes=head_sizes, **among)
        self.linear1 = ColumnParallelLinear(d_model, dim_feedforward, sizes=feature_sizes, **among)
        self.linear2 = RowParallelLinear(dim_feedforward, d_model, sizes=feature_sizes, **among)
        self.norm1 = torch.nn.LayerNorm(d_model, layer_norm_eps, bias=bias, **place)
        self.norm2 = torch.nn.LayerNorm(d_model, layer_norm_eps, bias=bias, **place)

    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Return the block's outputs, (N, T, d_model), the same on all ranks.

        Args:
            src: (N, T, d_model), the same on all ranks of the process set.
            src_mask, src_key_padding_mask, is_causal: see :meth:`ParallelSelfAttention.forward`.

        Raises:
            ShapeError: what does not fit.

        Collectives: two all-reduces of N x T x d_model numbers; two in the backward pass.
        """

        def attend(x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.self_attn(x, src_mask, src_key_padding_mask, is_causal)
            return out

        def feed(x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.linear2(self.activation(self.linear1(x)))
            return out

        x = src
        if self.norm_first:
            x = x + attend(self.norm1(x))
            return x + feed(self.norm2(x))
        x = self.norm1(x + attend(x))
        out: torch.Tensor = self.norm2(x + feed(x))
        return out
