"""A small transformer on Python's own source files, cut into stages on different ranks, in PyTorch.

Of four ranks, 0 and 2 are the two stages of one model, and 1 and 3 those of another that sees other lines.
With --model 2 the layers of a stage are split over two ranks instead. A step's lines pass through the stages
in micro-batches; they are of different lengths, and one replica has fewer of them. Trains with hvdloss and in
one process with ordinary layers; compares every step's loss, and what was learned.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import hvdloss.torch as hvd
from _common import EXACT, ONE, Shards, at_least, options, recorder, relative, split, told_by_all
from hvdloss.torch.ops import communicator_of

SEED = 0
LENGTH, WIDTH, HEADS, BLOCKS = 48, 32, 4, 4
MODULES = ("json.decoder", "textwrap", "string", "heapq", "bisect", "fnmatch", "glob", "shlex")
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Embedding(nn.Module):
    """Bytes and their places as vectors."""

    def __init__(self, groups: hvd.Grid | None) -> None:
        super().__init__()
        self.bytes = (
            nn.Embedding(256, WIDTH)
            if groups is None
            else hvd.VocabParallelEmbedding(256, WIDTH, process_set=groups.model)
        )
        self.places = nn.Embedding(LENGTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bytes(x) + self.places(torch.arange(x.shape[1]))


class Block(nn.Module):
    """A transformer's block, in which a byte sees those before it."""

    def __init__(self, groups: hvd.Grid | None) -> None:
        super().__init__()
        kind: dict[str, Any] = {"activation": "gelu", "norm_first": True}
        if groups is None:
            self.layer = nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, **kind
            )
        else:
            self.layer = hvd.ParallelTransformerLayer(
                WIDTH, HEADS, 4 * WIDTH, process_set=groups.model, **kind
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.layer(x, src_mask=later)


def layers(groups: hvd.Grid | None = None) -> list[Callable[[], nn.Module]]:
    """Return what makes each layer: an ordinary one, or this rank's part of it; one seed, one model."""
    return [
        lambda: Embedding(groups),
        *[lambda: Block(groups)] * BLOCKS,
        lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)),
    ]


def losses(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the loss of each byte."""
    return F.cross_entropy(logits.transpose(1, 2), target, reduction="none")


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def train(args: argparse.Namespace, groups: hvd.Grid, data: Data, each: Callable[..., None]) -> nn.Module:
    """Train this rank's stage on its replica's lines. But for `each`, this is all one has to write."""
    torch.manual_seed(SEED)  # on all ranks alike: nothing needs to be broadcast
    stage = hvd.pipeline_stage(layers(groups), groups).to(getattr(torch, args.dtype))
    objective = hvd.Objective(losses)
    pipeline = hvd.Pipeline(stage, objective, groups, schedule=args.schedule)
    optimizer = hvd.DistributedOptimizer(
        make_optimizer(stage),
        stage.named_parameters(),
        objective=objective,
        process_set=groups.data,  # the same stage of other replicas
        backward_passes_per_step=data.most_micro_batches(),
    )
    record = recorder(hvd, args).follow(optimizer)
    for epoch in range(args.epochs):
        for step in range(data.shards.steps):
            optimizer.zero_grad()
            pipeline.run(data.micro_batches(groups.data.rank(), epoch, step))
            optimizer.step()
            each(optimizer.last_step, pipeline.last_run)
    record.close()
    return stage


def train_alone(args: argparse.Namespace, data: Data, each: Callable[[float], None]) -> nn.Module:
    """Train an ordinary model in this process, on all replicas' lines of each step."""
    torch.manual_seed(SEED)
    model = nn.Sequential(*(make() for make in layers())).to(getattr(torch, args.dtype))
    optimizer = make_optimizer(model)
    for epoch in range(args.epochs):
        for step in range(data.shards.steps):
            optimizer.zero_grad()
            loss = data.mean(model, data.shards.union(epoch, step))
            loss.backward()
            optimizer.step()
            each(loss.item())
    return model


def flat(model: nn.Module) -> np.ndarray:
    """Return a model's parameters side by side."""
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().double().numpy()


class Data:
    """Lines of Python's library, and which replica brings which of them to a step."""

    def __init__(self, args: argparse.Namespace, replicas: int) -> None:
        text = "\n".join(inspect.getsource(importlib.import_module(name)) for name in MODULES)
        lines = [line.encode()[: LENGTH + 1] for line in text.splitlines() if len(line.strip()) >= 8]
        self.lines = [torch.tensor(list(line)) for line in lines]
        training, self.held_out = split(len(self.lines), SEED)
        self.shards = Shards(training, args.shares, replicas, args.batch, SEED)
        self.micro, self.dtype = args.micro, getattr(torch, args.dtype)

    def batch(self, index: Any) -> Batch:
        """Return lines as one batch: each byte, the next one, and weight 0 for what fills up short lines."""
        whole = nn.utils.rnn.pad_sequence([self.lines[i] for i in index], batch_first=True, padding_value=-1)
        present = (whole[:, 1:] >= 0).to(self.dtype)
        return whole[:, :-1].clamp(min=0), whole[:, 1:].clamp(min=0), present

    def micro_batches(self, replica: int, epoch: int, step: int) -> list[Batch]:
        index = self.shards.batch(replica, epoch, step)
        return [self.batch(index[i : i + self.micro]) for i in range(0, len(index), self.micro)]

    def most_micro_batches(self) -> int:
        most = max(-(-len(shard) // self.shards.steps) for shard in self.shards.shards)
        return -(-most // self.micro)

    def mean(self, model: nn.Module, index: Any) -> torch.Tensor:
        x, y, weight = self.batch(index)
        return (losses(model(x), y) * weight).sum() / weight.sum()


def compare(args: argparse.Namespace) -> int:
    """Train over ranks and alone, compare, and report."""
    stages = args.stages or 2 - hvd.size() % 2
    groups = hvd.grid(args.model, stages)
    data = Data(args, hvd.size() // (args.model * stages))
    first = hvd.rank() == 0
    ours: list[float] = []
    runs: list[hvd.PipelineStats] = []
    alone: list[float] = []

    def each(report: hvd.StepReport, run: hvd.PipelineStats) -> None:
        ours.append(report.loss)
        runs.append(run)

    began = time.perf_counter()
    stage = train(args, groups, data, each)
    seconds = time.perf_counter() - began
    whole = hvd.full_state_dict(stage, pipe=groups.pipe)
    one = train_alone(args, data, alone.append) if first else None
    told = told_by_all(
        communicator_of(hvd.global_process_set),
        {
            "stage": 0 if groups.pipe is None else groups.pipe.rank(),
            "idle": float(np.median([run.bubble for run in runs])),
            "theory": float(np.median([run.expected_bubble for run in runs])),
            "messages": runs[-1].messages,
            "bytes": runs[-1].bytes,
            "parameters": sum(p.numel() for p in stage.parameters()),
        },
    )
    status = 0
    if one is not None:
        trained = nn.Sequential(*(make() for make in layers())).to(getattr(torch, args.dtype))
        with torch.no_grad():
            untrained = data.mean(trained, data.held_out).item()
            trained.load_state_dict(whole)  # an ordinary model's
            held_out = [data.mean(model, data.held_out).item() for model in (trained, one)]
        found = {
            "replicas": data.shards.size,
            "model": args.model,
            "stages": stages,
            "steps": len(ours),
            "seconds": seconds,
            "loss_error": max(abs(a / b - 1) for a, b in zip(ours, alone, strict=True)),
            "parameter_error": relative(flat(trained), flat(one)),
            "held_out": {"untrained": untrained, EXACT: held_out[0], ONE: held_out[1]},
            "parameters": sum(p.numel() for p in one.parameters()),
            "ranks": told,
        }
        tolerance = {"float64": 1e-9, "float32": 1e-2}[args.dtype]  # of steps on end, in which errors grow
        found["exact"] = max(found["loss_error"], found["parameter_error"]) <= tolerance
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "numbers.json").write_text(json.dumps(found, indent=1) + "\n")
        torch.save(whole, args.output / "model.pt")
        show(found)
        status = 0 if found["exact"] else 1
    return int(told_by_all(communicator_of(hvd.global_process_set), status)[0])


def show(found: dict[str, Any]) -> None:
    held_out = found["held_out"]
    print(
        f"A transformer of {found['parameters']} parameters on Python's source files: {found['stages']} "
        f"stage(s), {found['replicas']} replica(s), layers split over {found['model']} rank(s)\n"
        f"held-out lines: {held_out['untrained']:.3f} nats a byte untrained, {held_out[EXACT]:.3f} after "
        f"{found['steps']} steps; {held_out[ONE]:.3f} in one process\n"
        f"relative difference to one process: {found['loss_error']:.1e} of the loss (the worst step), "
        f"{found['parameter_error']:.1e} of the parameters at the end"
    )
    for rank, one in enumerate(found["ranks"]):
        print(
            f"rank {rank}, stage {one['stage']}: {one['parameters']} parameters, idle {one['idle']:.0%} "
            f"of a run (the bubble of equal stages: {one['theory']:.0%}), {one['messages']} messages "
            f"of {one['bytes'] / 1e3:.0f} kB in the last step"
        )
    if not found["exact"]:
        print("error: this is not what one process learned", file=sys.stderr)


if __name__ == "__main__":
    parser = options("torch_split_transformer", __doc__, epochs=2, batch=32, seeds=1)
    parser.add_argument("--stages", type=at_least(1), help="stages of a model (2, if ranks are even)")
    parser.add_argument("--model", type=at_least(1), default=1, help="ranks that share a layer (%(default)s)")
    parser.add_argument("--micro", type=at_least(1), default=4, help="lines in a micro-batch (%(default)s)")
    parser.add_argument("--schedule", choices=("1f1b", "gpipe"), default="1f1b", help="(%(default)s)")
    arguments = parser.parse_args()
    hvd.init(process_sets="dynamic")
    torch.set_num_threads(1)  # ranks share the cores
    sys.exit(compare(arguments))
