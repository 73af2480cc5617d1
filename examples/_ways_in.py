"""What the examples of other libraries share: scikit-learn's digits, and one process to compare with."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

import numpy as np
import torch

import hvdloss.torch as hvd
from hvdloss.data import Epoch, Sharding
from hvdloss.torch.ops import communicator_of

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


def arguments(text: str, *, epochs: int = 3, batch: int = 32) -> argparse.Namespace:
    """Return the options that these examples have."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=epochs, help="passes over the data (%(default)s)")
    parser.add_argument("--batch", type=int, default=batch, help="samples of a rank in a step (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--output", default="runs/ways-in", help="folder of what is written (%(default)s)")
    return parser.parse_args()


def digits(count: int = 600) -> torch.utils.data.TensorDataset:
    """Return images of handwritten digits, 64 numbers each, and what they show."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.utils.data.TensorDataset(torch.tensor(x[:count] / 16), torch.tensor(y[:count]))


def source_lines(count: int = 240, most: int = 40) -> list[torch.Tensor]:
    """Return lines of Python's own library as numbers of bytes, each of its own length."""
    import inspect
    import json.decoder
    import textwrap

    text = inspect.getsource(json.decoder) + inspect.getsource(textwrap)
    lines = [line.strip().encode()[:most] for line in text.splitlines()]
    return [torch.tensor(list(line)) for line in lines if len(line) >= 4][:count]


def padded(lines: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return lines as a batch for a language model; what fills them up has the label -100."""
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(lines, batch_first=True, padding_value=0),
        "labels": pad(lines, batch_first=True, padding_value=-100),
    }


def shares() -> list[float]:
    """Return uneven parts of the data: the last rank has the least, so that it is through early."""
    parts = 1.0 / (1.0 + np.arange(hvd.size()))
    return list(parts / parts.sum())


def all_batches(sharding: Sharding, epochs: int, batch: int) -> Iterator[torch.Tensor]:
    """Yield the samples of all ranks in each step: what one process has to take at once."""
    for number in range(epochs):
        epoch = Epoch(sharding, hvd.size(), number)
        for parts in zip(*(epoch.batches(rank, batch) for rank in range(hvd.size())), strict=True):
            yield torch.tensor(np.concatenate(parts).astype(np.int64))


def flat(model: torch.nn.Module) -> torch.Tensor:
    """Return all parameters as one row of numbers."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def difference(model: torch.nn.Module, other: torch.nn.Module) -> float:
    """Return how far two models' parameters are apart, relative to their length."""
    a, b = flat(model), flat(other)
    return float((a - b).norm() / b.norm())


def conclude(
    args: argparse.Namespace, name: str, error: float, dtype: str = "float64", **more: object
) -> int:
    """Print how far this rank's model is from one process's, and return every rank's exit status."""
    communicator = communicator_of(hvd.global_process_set)
    errors = [
        json.loads(told)
        for told in communicator.all_gather_bytes(json.dumps(error).encode(), "example.errors")
    ]
    good = all(one <= TOLERANCE[dtype] for one in errors)
    if hvd.rank() == 0:
        numbers = {"name": name, "ranks": hvd.size(), "errors": errors, "exact": good, **more}
        if args.json:
            print(json.dumps(numbers), flush=True)
        else:
            print(
                f"{name} on {hvd.size()} rank(s): parameters differ from one process's by {max(errors):.1e}"
            )
        if not good:
            print(f"error: that is more than {TOLERANCE[dtype]:.0e}", file=sys.stderr)
    return 0 if good else 1
