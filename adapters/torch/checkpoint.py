"""Checkpoints of a training run in PyTorch: the tensors' side of :mod:`hvdloss.train.checkpoint`."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

import torch
from hvdloss.comm.communicator import communicator_for
from hvdloss.errors import CheckpointError, ConfigError
from hvdloss.torch._backend import hvd
from hvdloss.torch.ops import communicator_of
from hvdloss.torch.sharded import ShardedLinear
from hvdloss.train import checkpoint as core
from hvdloss.train.checkpoint import StateDict

__all__ = ["Checkpoint", "from_array", "to_array"]

_KNOWN = (
    *(torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool),
)


def to_array(value: Any) -> tuple[str, np.ndarray] | None:
    """Return a dense tensor's dtype and its values; as bytes where NumPy does not know the dtype."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    tensor = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.dtype in _KNOWN:
        return kind, tensor.numpy()
    # The last axis is of each number's bytes.
    return kind, tensor.unsqueeze(-1).view(torch.uint8).numpy()


def from_array(kind: str, array: np.ndarray) -> torch.Tensor:
    """Return the tensor of :func:`to_array`, on the CPU.

    Raises:
        CheckpointError: an array of another framework.
    """
    dtype = getattr(torch, kind, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"an array of kind {kind!r:.100} is no tensor of PyTorch")
    try:
        tensor = torch.from_numpy(np.array(array))
        if tensor.dtype is dtype:
            return tensor
        return tensor.view(dtype).squeeze(-1)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"an array of kind {kind!r:.100} has {array.dtype}: {error!s:.100}") from error


class _Module(StateDict):
    """A model; its parameters must be whole on every rank."""

    def __init__(self, value: torch.nn.Module, name: str) -> None:
        for place, module in value.named_modules():
            if isinstance(module, ShardedLinear) and module.shards.ranks > 1:
                raise ConfigError(
                    f"{name}.{place} lies on {module.shards.ranks} ranks, and so does what its optimizer "
                    f"remembers; save hvd.full_state_dict({name}) with BestCheckpoint instead"
                )
        super().__init__(value)

    def load(self, state: Any) -> None:
        self.value.load_state_dict(state)


class _Optimizer(StateDict):
    """An optimizer, with what its engine remembers."""

    def before_save(self) -> None:
        """Make parameters equal, after local steps."""
        self.value.exchange()

    def state(self) -> Any:
        return {"optimizer": self.value.state_dict(), "engine": self.value._hvdloss.state_dict()}

    def load(self, state: Any) -> None:
        if not isinstance(state, dict) or set(state) != {"optimizer", "engine"}:
            raise CheckpointError(
                "the optimizer that was saved was no DistributedOptimizer with an objective"
            )
        self.value.load_state_dict(state["optimizer"])
        self.value._hvdloss.load_state_dict(state["engine"], same_ranks=True)


def _part(name: str, value: Any) -> Any:
    if isinstance(value, torch.nn.Module):
        return _Module(value, name)
    if hasattr(value, "_hvdloss"):
        return _Optimizer(value)
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        return StateDict(value)
    raise ConfigError(
        f"{name}={type(value).__name__} has no state_dict() and load_state_dict(); give plain values to "
        f"checkpoint.save(step, {name}=...)"
    )


class Checkpoint(core.Checkpoint):
    """Checkpoints of a whole training run in a folder: one rank writes, whole or not at all.

    ::

        checkpoint = hvd.Checkpoint("run/checkpoints", model=model, optimizer=optimizer, data=loader)
        before = checkpoint.load()  # the newest intact one, on every rank; None if there is none
        step = before.step if before else 0
        for x, y in loader:  # what is left of the epoch
            ...
            step += 1
            if step % 100 == 0:
                checkpoint.save(step, epoch=epoch)

    A model and an optimizer (from :func:`DistributedOptimizer`: with what its objective's terms measured and
    decided, and its number of steps), loaders, learning-rate schedulers, a ``GradScaler``,
    :class:`EarlyStopping`, :class:`Metrics`: whatever has ``state_dict()`` and ``load_state_dict(state)``. A
    run that goes on from a checkpoint is, with as many ranks or others, the run that was not interrupted.

    Tensors are files of safetensors, all else is JSON; every file's SHA-256 is compared when it is loaded.
    Nothing is pickled.

    Args:
        path: the folder; it need only be there for the rank that writes and reads.
        keep: how many checkpoints are kept: those written last.
        root: the rank that writes and reads.
        random_numbers: save each rank's random numbers (Python's, NumPy's, PyTorch's on the CPU); they go on
            where they were if as many ranks load them.
        mode, folder_mode: of the files, and of the folder if it is made.
        process_set: the ranks; None for all.
        parts: what is saved, by name.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    def __init__(
        self,
        path: Any,
        *,
        keep: int = 3,
        root: int = 0,
        random_numbers: bool = True,
        mode: int = 0o600,
        folder_mode: int = 0o700,
        process_set: Any = None,
        **parts: Any,
    ) -> None:
        super().__init__(
            path,
            {name: _part(name, value) for name, value in parts.items()},
            keep=keep,
            root=root,
            random_numbers=random_numbers,
            mode=mode,
            folder_mode=folder_mode,
            communicator=functools.partial(communicator_for, hvd, communicator_of, process_set),
        )

    def to_array(self, value: Any) -> Any:
        """Return a tensor's dtype and values."""
        return to_array(value)

    def from_array(self, kind: str, array: Any) -> Any:
        """Return a tensor."""
        return from_array(kind, array)

    def random_state(self) -> Any:
        """Return where random numbers are."""
        return {**core.random_state(), "torch": torch.get_rng_state()}

    def set_random_state(self, state: Any) -> None:
        """Go on from there."""
        core.set_random_state(state)
        torch.set_rng_state(state["torch"])
