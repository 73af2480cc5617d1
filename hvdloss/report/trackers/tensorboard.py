"""Steps as TensorBoard's event files."""

from __future__ import annotations

import os
import sys
import types
from typing import Any

from hvdloss._util.private import make_folder
from hvdloss.report.trackers.base import Tracker

__all__ = ["TensorBoard"]

_WITHOUT = "tensorboard.compat.notf"


class TensorBoard(Tracker):
    """Writes steps into a folder for ``tensorboard --logdir``, through TensorBoard's own writer.

    No framework is loaded for it.

    Args:
        folder: of the run; made if it is not there, for its owner alone.
        options: of :class:`Tracker`.

    Raises:
        ConfigError: an argument that cannot be used, or ``hvdloss[tensorboard]`` is not installed.

    Collectives: none.
    """

    library = "tensorboard.summary"
    extra = "tensorboard"
    title = "TensorBoard"

    def __init__(self, folder: str | os.PathLike[str], **options: Any) -> None:
        if "tensorflow" not in sys.modules:
            # The sign, to TensorBoard, of a build without TensorFlow; else it loads what is installed of it.
            sys.modules.setdefault(_WITHOUT, types.ModuleType(_WITHOUT))
        super().__init__(**options)
        self.folder = os.fspath(folder)
        self._writer: Any = None

    def _begin(self, module: Any) -> None:
        """Make the folder and the file."""
        self._writer = module.Writer(str(make_folder(self.folder)))

    def _log(self, step: int, numbers: dict[str, float]) -> None:
        """Write; TensorBoard's writer does so in a thread of its own."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def _end(self, failed: bool) -> None:
        """Write what is left, and close the file."""
        self._writer.close()
