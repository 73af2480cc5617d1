"""Data positions as part of Horovod's elastic state."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

from hvdloss.data.uneven import Uneven
from hvdloss.hearing import hear
from hvdloss.torch._backend import hvd
from hvdloss.torch.data import ShardedLoader
from hvdloss.torch.ops import communicator_of
from hvdloss.torch.stream import StreamLoader

__all__ = ["register"]


def register() -> None:
    """Let ``hvd.elastic.TorchState(model, optimizer, data=loader)`` know loaders' positions; once.

    ``commit`` keeps where the loader is, ``restore`` goes back there, and after ranks have come or gone
    ``sync`` has all go on from rank 0's position, with what is left of the epoch shared out anew: relative
    to the last commit every sample is used exactly once. One process without Horovod does so anyway.
    """
    if importlib.util.find_spec("horovod") is None:
        return
    from horovod.torch.elastic import state

    kinds = [kind for kind, _ in state.get_handler_registry()]
    if ShardedLoader in kinds:
        return

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
            told = communicator_of(hvd.global_process_set).gather(
                json.dumps(self.saved).encode(), "hvdloss.elastic"
            )
            (self.saved,) = hear(told[:1], "position")
            self.value.load_state_dict(self.saved)

    ours = [(kind, Position) for kind in (ShardedLoader, StreamLoader, Uneven)]
    state.set_handler_registry([*ours, *state.get_handler_registry()])
