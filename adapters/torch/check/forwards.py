"""What the models of a script are called with, and what in them makes samples depend on each other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hvdloss.torch.check.parameters import Parameters
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["LOW", "Forwards", "depends_on_many"]

LOW = (torch.bfloat16, torch.float16)


def _tensors(given: Any) -> Iterator[torch.Tensor]:
    """Give the tensors of nested arguments or results."""
    if isinstance(given, torch.Tensor):
        yield given
    elif isinstance(given, dict):
        for one in given.values():
            yield from _tensors(one)
    elif isinstance(given, list | tuple):
        for one in given:
            yield from _tensors(one)


def _rows(tensors: list[torch.Tensor]) -> list[str]:
    """Return a hash of each row of a batch: of the tensors that have as many as the first."""
    count = next((t.shape[0] for t in tensors if t.dim()), 0)
    if not count:
        return []
    hashes = [hashlib.blake2b(digest_size=8) for _ in range(count)]
    for tensor in tensors:
        if tensor.dim() and tensor.shape[0] == count and tensor.numel():
            rows = tensor.detach().reshape(count, -1).contiguous().cpu().view(torch.uint8).numpy()
            for hashed, row in zip(hashes, rows, strict=True):
                hashed.update(row.tobytes())
    return [hashed.hexdigest() for hashed in hashes]


def depends_on_many(gradient: torch.Tensor) -> bool:
    """Return whether the gradient of one element is not 0 in more than one row of a batch.

    Rows lie along the first axis, or, of sequences, along the second.
    """
    marked = gradient.detach() != 0
    for axis in (0, 1) if marked.dim() >= 3 and marked.shape[1] > 1 else (0,):
        others = [a for a in range(marked.dim()) if a != axis]
        if int((marked.sum(others) if others else marked).count_nonzero()) <= 1:
            return False
    return True


class Forwards:
    """The training calls of outermost modules since :meth:`clear`.

    Attributes:
        rows: a hash of each sample.
        outputs: the nodes of what modules returned.
        inputs, results: tensors with a batch axis that modules got (or embeddings of such) and gave: an
            element of the loss should depend on one row of them.
        batch_norms: layers that normalise by this rank's batch.
        synchronized: whether a layer normalises by that of all ranks.
        wrapper: what averages gradients of such a module: DDP, FSDP, or nothing.
        low: whether models compute in 16 bits.
        dropout: whether a layer draws numbers; `random` is a hash of what they are drawn from.
    """

    def __init__(self, parameters: Parameters, began: Callable[[], None]) -> None:
        self._parameters, self._began = parameters, began
        self._depth, self._indices = 0, set[tuple[int, tuple[int, ...]]]()
        self.looking = True
        self.batch_norms: list[str] = []
        self.synchronized = self.dropout = False
        self.wrapper, self.low = "", False
        self.clear()

    def clear(self) -> None:
        """Forget the calls."""
        self.rows: list[str] = []
        self.outputs: set[Any] = set()
        self.inputs: list[torch.Tensor] = []
        self.results: list[torch.Tensor] = []
        self.random = ""

    def embedded(self, out: torch.Tensor, indices: Any) -> None:
        """Take the output of an embedding of what a module was called with for a probe."""
        if self._depth and isinstance(indices, torch.Tensor) and _identity(indices) in self._indices:
            self.inputs.append(out)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """See the calls of modules."""
        plain = torch.nn.Module.__call__

        def call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._depth or not self.looking or not _learns(module):
                return plain(module, *args, **kwargs)
            self._began()
            if not torch.is_grad_enabled():
                return plain(module, *args, **kwargs)
            args, kwargs = self._enter(module, args, kwargs)
            self._depth += 1
            try:
                out = plain(module, *args, **kwargs)
            finally:
                self._depth -= 1
            for tensor in _tensors(out):
                self.low |= tensor.dtype in LOW or torch.is_autocast_enabled(tensor.device.type)
                if tensor.grad_fn is not None:
                    self.outputs.add(tensor.grad_fn)
                    self.results.append(tensor)
            return out

        torch.nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.nn.Module.__call__ = plain  # type: ignore[method-assign]

    def _enter(self, module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Note what a module is called with; its first floating-point argument comes to have a gradient."""
        self._parameters.learn(module)
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if "DistributedDataParallel" in kinds:
            self.wrapper = "DDP"
        elif kinds & {"FSDPModule", "FullyShardedDataParallel"}:
            self.wrapper = "FSDP"
        given = list(_tensors([args, kwargs]))
        self.rows += _rows(given)
        self._indices = {_identity(t) for t in given if not t.is_floating_point()}
        self._look_into(module)
        args = list(args)
        for where in (args, kwargs):
            for key, value in enumerate(args) if where is args else list(kwargs.items()):
                if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim():
                    if not value.requires_grad:
                        probe = value.detach().requires_grad_()
                        self.inputs.append(probe)
                        where[key] = probe.clone()  # a script may change in place what it is given
                    return args, kwargs
        return args, kwargs

    def _look_into(self, module: torch.nn.Module) -> None:
        for name, layer in module.named_modules():
            if not layer.training:
                continue
            if isinstance(layer, _BatchNorm):
                if "Sync" in type(layer).__name__:
                    self.synchronized = True
                elif (name := name.removeprefix("module.")) not in self.batch_norms:
                    self.batch_norms.append(name)
            self.dropout |= isinstance(layer, _DropoutNd) and layer.p > 0
        self.random = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=8).hexdigest()


def _learns(module: torch.nn.Module) -> bool:
    """Return whether a module is a model, and no loss, metric or transform of data."""
    return any(p.requires_grad for p in module.parameters())


def _identity(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)
