"""``python -m hvdloss.torch.check FOLDER STEPS SCRIPT [ARGUMENT...]``: one rank of ``hvdloss check``."""

from __future__ import annotations

import contextlib
import runpy
import sys
from pathlib import Path

import torch
from hvdloss.comm.world import launcher_rank
from hvdloss.torch.check.recorder import Enough, Recorder


def main() -> None:
    """Run the script until it ends or has trained for long enough."""
    folder, steps, script, *_ = sys.argv[1:]
    recorder = Recorder(Path(folder), int(launcher_rank() or 0), int(steps))
    sys.argv = sys.argv[3:]
    sys.path[0] = str(Path(script).resolve().parent)  # as when it is started by itself
    with contextlib.suppress(Enough), recorder.watching():
        runpy.run_path(script, run_name="__main__")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
