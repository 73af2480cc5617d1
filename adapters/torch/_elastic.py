"""Horovod's elastic state, for exact optimizers and data positions."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import torch
from hvdloss import watch
from hvdloss.comm.launch import init_checked
from hvdloss.comm.messages import decode_all
from hvdloss.torch._backend import engine, hvd
from hvdloss.torch.checkpoint import from_array, to_array
from hvdloss.torch.functions import Source, state_from
from hvdloss.torch.integrations.data import ShardedLoader
from hvdloss.torch.integrations.stream import StreamLoader
from hvdloss.torch.integrations.uneven import Uneven
from hvdloss.torch.ops import communicator_of
from hvdloss.train.checkpoint import state_from_bytes, state_to_bytes
from hvdloss.train.elastic import runner

__all__ = ["elastic", "watched"]


def _others() -> int:
    """Return how many ranks a default process group has that this engine may not know of."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


#: ``init`` and ``shutdown``, with which the watch begins and ends.
watched = watch.wrap_init(hvd, communicator_of)
watched["init"] = init_checked(hvd, **watched, others=_others)


def _from_first(data: bytes, name: str) -> bytes:
    """Return rank 0's bytes, on every rank. Collectives: one gather."""
    communicator = communicator_of(hvd.global_process_set)
    return communicator.all_gather_bytes(data if communicator.rank == 0 else b"", name)[0]


def elastic() -> Any:
    """Return what ``hvd.elastic`` shows: Horovod's, with a state and a ``run`` that know hvdloss.

    ``hvd.elastic.TorchState(model, optimizer, data=loader, step=0)`` holds the model, the optimizer with
    what its objective's terms decided, where loaders are, and plain values. ``commit`` keeps them,
    ``restore`` goes back there, and after ranks have come or gone ``sync`` has all go on from rank 0's last
    commit, with what is left of the epoch shared out anew: relative to the last commit every sample is used
    exactly once.
    """
    if engine != "horovod":
        return hvd.elastic
    import horovod.torch.elastic as theirs
    from horovod.common.elastic import run_fn
    from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt
    from horovod.torch.elastic import state

    vars(theirs).update(watched)  # for those who use Horovod's own loop

    class Position(state.StateHandler):
        """Where a loader is; the twin of Horovod's handlers for models and optimizers."""

        def __init__(self, value: Any) -> None:
            super().__init__(value)
            # Not state_dict(), which may ask all ranks: one that has just come is alone in being here.
            self.saved = value.start_state()

        def save(self) -> None:
            """Keep the position: all ranks commit together."""
            self.saved = self.value.state_dict()

        def restore(self) -> None:
            """Go back to the last commit; alone, as the other ranks may be gone."""
            self.value.load_state_dict(self.saved)

        def sync(self) -> None:
            """Go on from where rank 0 was at its last commit. Collectives: one gather of JSON."""
            data = _from_first(json.dumps(self.saved).encode(), "hvdloss.elastic")
            (self.saved,) = decode_all([data], "position")
            self.value.load_state_dict(self.saved)

    class Model(state.ModelStateHandler):
        """Horovod's; what came from rank 0 is kept as well, should rank 0 be lost before a commit."""

        def sync(self) -> None:
            super().sync()
            self.save()

    class Optimizer(state.OptimizerStateHandler):
        """An optimizer's state as it is on rank 0, and what an exact one's objective decided.

        Horovod makes a fresh optimizer's state by a step with gradients of zero, in which weight decay moves
        the parameters that were just made equal.
        """

        def __init__(self, optimizer: Any) -> None:
            super().__init__(optimizer)
            self.memory = self._snapshot()

        def _snapshot(self) -> Any:
            engine = getattr(self.value, "_hvdloss", None)
            return None if engine is None else copy.deepcopy(engine.state_dict())

        def save(self) -> None:
            super().save()
            self.memory = self._snapshot()

        def restore(self) -> None:
            super().restore()
            if self.memory is not None:
                self.value._hvdloss.load_state_dict(copy.deepcopy(self.memory), same_ranks=True)

        def sync(self) -> None:
            """Collectives: five gathers, and one broadcast per 64 MiB."""
            memory = b"" if self.memory is None else state_to_bytes(self.memory, to_array)
            source = Source(0, None, "elastic optimizer state")
            data = source.broadcast_bytes(memory, "hvdloss.elastic.memory")
            self.value.load_state_dict(
                state_from(self._saved_optimizer_state, source, "hvdloss.elastic.optimizer")
            )
            if data and hasattr(self.value, "_hvdloss"):
                memory = state_from_bytes(data, from_array)
                # Ranks have come or gone, or this is the beginning.
                self.value._hvdloss.load_state_dict(memory, same_ranks=False)
            self.save()

    class TorchState(theirs.TorchState):
        """Horovod's; after local steps parameters are exchanged before they are kept."""

        def save(self) -> None:
            for handler in self._handlers.values():
                if hasattr(handler.value, "_hvdloss"):
                    handler.value.exchange()
            super().save()

    ours = [(kind, Position) for kind in (ShardedLoader, StreamLoader, Uneven)]
    ours += [(torch.nn.Module, Model), (torch.optim.Optimizer, Optimizer)]
    kinds = {kind for kind, _ in ours}
    rest = [(kind, handler) for kind, handler in state.get_handler_registry() if kind not in kinds]
    state.set_handler_registry([*ours, *rest])
    names = {name: value for name, value in vars(theirs).items() if not name.startswith("_")}
    run = runner(
        run_fn=run_fn,
        changed=HostsUpdatedInterrupt,
        failed=HorovodInternalError,
        shutdown=watched["shutdown"],
        init=watched["init"],
    )
    return SimpleNamespace(**{**names, "TorchState": TorchState, "run": run})
