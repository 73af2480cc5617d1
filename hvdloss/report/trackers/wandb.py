"""Steps in a Weights & Biases run."""

from __future__ import annotations

from typing import Any

from hvdloss.report.trackers.base import Tracker

__all__ = ["WandB"]


class WandB(Tracker):
    """Logs steps to a Weights & Biases run: the active one if there is one, or one of its own.

    The numbers have an axis of their own, ``hvdloss/step``, so that a script's own ``wandb.log`` calls and
    these do not get in each other's way.

    Args:
        project: of a new run.
        init: further arguments of ``wandb.init``: ``{"mode": "offline", "dir": "runs"}``, ...
        options: of :class:`Tracker`.

    Raises:
        ConfigError: an argument that cannot be used, or ``hvdloss[wandb]`` is not installed.

    Collectives: none.
    """

    library = "wandb"
    extra = "wandb"
    title = "Weights & Biases"

    def __init__(
        self, project: str = "hvdloss", *, init: dict[str, Any] | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.project, self.init = project, dict(init or {})
        self.run: Any = None
        self._own = False

    def _begin(self, module: Any) -> None:
        """Find or make the run, and give the numbers their axis."""
        self._own = module.run is None
        self.run = module.init(project=self.project, **self.init) if self._own else module.run
        self.run.define_metric(f"{self.prefix}*", step_metric=f"{self.prefix}step")

    def _log(self, step: int, numbers: dict[str, float]) -> None:
        """Hand the numbers to W&B's own process."""
        self.run.log({f"{self.prefix}step": step, **numbers})

    def _end(self, failed: bool) -> None:
        """End the run if it is this tracker's own."""
        if self._own:
            self.run.finish(exit_code=int(failed))
