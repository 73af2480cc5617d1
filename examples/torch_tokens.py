"""A language model on lines of different lengths: masked tokens and gradient accumulation, in PyTorch.

Data: lines of Python's own library, byte by byte. A batch is padded to its longest line, and padding has the
label -100, which no loss counts. Rank 0 holds the longer half of the lines and rank 1 the shorter half, as
with a loader that groups by length; a step has several micro-batches. Averaging their means counts a token of
a short line for more than a token of a long one. Trains with hvdloss, with plain averaging, and in one
process, and compares.

Needs no Horovod: torchrun --nproc-per-node 2 examples/torch_tokens.py
"""

from __future__ import annotations

import inspect
import json.decoder
import sys
import textwrap
from typing import Any

import numpy as np
import torch
from torch import nn

import hvdloss.torch as hvd
from _common import Shards, at_least, compare, options, recorder, split
from _torch import Samples, TorchJob, mean
from hvdloss.torch.ops import communicator_of

CONTEXT, LONGEST = 3, 80  # bytes that a prediction sees; of a line


class Tokens(TorchJob):
    def train(self, model: nn.Module, watch: Any) -> None:
        """Train on this rank's lines. But for `watch`, this is all one has to write."""
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        objective = hvd.Objective("cross_entropy")  # labels of -100 do not count
        micro = self.args.micro
        optimizer = hvd.DistributedOptimizer(
            self.make_optimizer(model),
            model.named_parameters(),
            objective,
            backward_passes_per_step=self.most_micro_batches(micro),
        )
        record = recorder(hvd, self.args).follow(optimizer)
        for micro_batches in self.micro_batches(hvd.rank(), micro):
            optimizer.zero_grad()
            for x, y in micro_batches:
                objective(model(x), y).backward()
            optimizer.step()
            watch(optimizer.last_step.loss)  # of all ranks' tokens
        record.close()

    def train_plainly(self, model: nn.Module, watch: Any) -> None:
        """Train as usual: each micro-batch's mean over their number, and gradients averaged over ranks."""
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        micro = self.args.micro
        optimizer = hvd.DistributedOptimizer(
            self.make_optimizer(model),
            model.named_parameters(),
            backward_passes_per_step=self.most_micro_batches(micro),
        )
        for micro_batches in self.micro_batches(hvd.rank(), micro):
            optimizer.zero_grad()
            for batch in micro_batches:
                loss = mean(model, batch) / len(micro_batches)
                loss.backward()
            optimizer.step()
            watch(loss.item())

    def make_model(self) -> nn.Module:
        features = nn.Sequential(nn.Embedding(128, 12), nn.Flatten(-2))
        return nn.Sequential(features, nn.Linear(12 * CONTEXT, 64), nn.Tanh(), nn.Linear(64, 128))

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=0.05)

    def samples(self, index: np.ndarray) -> Samples:
        """Return the bytes before each byte, and the bytes; as one row each, padding among them."""
        (lines,) = super().samples(index)
        lines = lines[:, : int((lines >= 0).sum(1).max())]
        before = nn.functional.pad(lines.clamp(min=0), (CONTEXT, -1)).unfold(1, CONTEXT, 1)
        return before.flatten(0, 1), lines.flatten()

    def measure(self, model: nn.Module) -> dict[str, float]:
        x, y = self.samples(self.held_out)
        with torch.no_grad():  # of tokens alone: padding takes time
            return {"loss a token": mean(model, (x[y >= 0], y[y >= 0])).item()}


def source_lines() -> np.ndarray:
    """Return lines of Python's library, padded with -100."""
    import argparse

    text = "\n".join(inspect.getsource(module) for module in (textwrap, argparse, json.decoder))
    lines = [line.strip().encode("ascii", "ignore")[:LONGEST] for line in text.splitlines()]
    lines = [np.frombuffer(line, np.uint8) for line in lines if len(line) > 1]
    return np.array(
        [np.pad(line.astype(int), (0, LONGEST - len(line)), constant_values=-100) for line in lines]
    )


def make_job(args: Any, seed: int) -> Tokens:
    lines = source_lines()
    chosen, _ = split(len(lines), seed)
    training, held_out = chosen[: args.lines], chosen[args.lines : args.lines + 150]
    by_length = training[np.argsort(-(lines[training] >= 0).sum(1), kind="stable")]
    shares = args.shares or [1 / hvd.size()] * hvd.size()
    shards = Shards(by_length, shares, hvd.size(), args.batch, seed)
    return Tokens(args, seed, (lines,), shards, held_out)


if __name__ == "__main__":
    parser = options("torch_tokens", __doc__, epochs=16, batch=80, seeds=3)
    parser.add_argument("--micro", type=at_least(1), default=10, help="lines in a micro-batch (%(default)s)")
    parser.add_argument("--lines", type=at_least(1), default=480, help="to train on (%(default)s)")
    arguments = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)  # ranks share the cores
    status = compare(
        arguments,
        lambda seed: make_job(arguments, seed),
        hvd,
        communicator_of(hvd.global_process_set),
        title="Masked tokens, accumulation: Python's library, byte by byte",
        remark="Rank 0 holds the longer lines, rank 1 the shorter ones; what pads them does not count.",
    )
    sys.exit(status)
