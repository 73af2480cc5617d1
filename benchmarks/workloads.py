"""The models that step times are measured on, for PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn

__all__ = ["WORKLOADS"]

Made = tuple[nn.Module, torch.Tensor, torch.Tensor]


def many_small() -> Made:
    """200 x Linear(64, 64) with ReLU, batch 32"""
    layers: list[nn.Module] = []
    for _ in range(200):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers), torch.randn(32, 64), torch.randn(32, 64)


def transformer() -> Made:
    """6 encoder layers, d 256, 4 heads, ff 1024, batch 4 x 64"""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 6), torch.randn(4, 64, 256), torch.randn(4, 64, 256)


def mlp() -> Made:
    """1024-4096-4096-2048-1024 with ReLU, 30 M parameters, batch 8"""
    sizes = [1024, 4096, 4096, 2048, 1024]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), torch.randn(8, 1024), torch.randn(8, 1024)


def convolution() -> Made:
    """3 convolutions (32, 64, 128), pooling, linear; batch 32 of 3 x 32 x 32"""
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    return net, torch.randn(32, 3, 32, 32), torch.randn(32, 10)


WORKLOADS: dict[str, Callable[[], Made]] = {
    "small": many_small,
    "transformer": transformer,
    "mlp": mlp,
    "conv": convolution,
}
