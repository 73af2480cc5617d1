"""Hand a run's steps to TensorBoard, MLflow or Weights & Biases, through their own libraries.

::

    with TensorBoard("runs/digits") as tracker:
        for x, y in loader:
            ...
            optimizer.step()
            tracker.step(optimizer.last_step)

Each library is an extra (``pip install 'hvdloss[tensorboard]'``), imported with the first step logged. Every
tracker has the same two methods: ``step(report)``, after each step on every rank, and ``close()``, or a
``with`` block. Only rank 0 logs. :func:`scalars` says what is logged.
"""

from __future__ import annotations

from hvdloss.report.trackers.base import Tracker
from hvdloss.report.trackers.mlflow import MLflow
from hvdloss.report.trackers.scalars import scalars
from hvdloss.report.trackers.tensorboard import TensorBoard
from hvdloss.report.trackers.wandb import WandB

__all__ = ["MLflow", "TensorBoard", "Tracker", "WandB", "scalars"]
