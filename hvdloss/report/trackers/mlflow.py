"""Steps as the metrics of an MLflow run."""

from __future__ import annotations

import time
from typing import Any

from hvdloss.report.trackers.base import Tracker

__all__ = ["MLflow"]

_MOST = 1000  # metrics that MLflow takes in one call


class MLflow(Tracker):
    """Logs steps to an MLflow run: the active one if there is one, or one of its own.

    One call to the tracking store per logged step, which waits for it: with a server far away, raise `every`.

    Args:
        experiment: whose run it makes; made if it is not there.
        tracking_uri: of the store, such as ``"sqlite:///runs/mlflow.db"``; None for MLflow's own choice.
        run_id: of a run to resume; None for the active one, or a new one.
        run_name: of a new run.
        options: of :class:`Tracker`.

    Raises:
        ConfigError: an argument that cannot be used, or ``hvdloss[mlflow]`` is not installed.

    Collectives: none.
    """

    library = "mlflow"
    extra = "mlflow"
    title = "MLflow"

    def __init__(
        self,
        experiment: str = "hvdloss",
        *,
        tracking_uri: str | None = None,
        run_id: str | None = None,
        run_name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.experiment, self.tracking_uri, self.run_name = experiment, tracking_uri, run_name
        self.run_id = run_id
        self._client: Any = None
        self._module: Any = None
        self._own = False

    def _begin(self, module: Any) -> None:
        """Find or make the run."""
        self._module = module
        self._client = module.MlflowClient(self.tracking_uri)
        # The active run lies in MLflow's own store, which need not be the one named here.
        active = module.active_run() if self.tracking_uri is None else None
        if self.run_id is None and active is not None:
            self.run_id = active.info.run_id
        if self.run_id is None:
            known = self._client.get_experiment_by_name(self.experiment)
            of = self._client.create_experiment(self.experiment) if known is None else known.experiment_id
            self.run_id = self._client.create_run(of, run_name=self.run_name).info.run_id
            self._own = True

    def _log(self, step: int, numbers: dict[str, float]) -> None:
        """Log all numbers of the step at once."""
        now = int(time.time() * 1000)
        metrics = [self._module.entities.Metric(name, value, now, step) for name, value in numbers.items()]
        for first in range(0, len(metrics), _MOST):
            self._client.log_batch(self.run_id, metrics=metrics[first : first + _MOST])

    def _end(self, failed: bool) -> None:
        """End the run if it is this tracker's own."""
        if self._own:
            self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")
