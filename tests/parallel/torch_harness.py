"""The harness itself: values come back, failures are told by rank (see tests/torch/test_torch_ranks.py)."""

from __future__ import annotations

import os
import signal
import unittest

import torch

import hvdloss.torch as hvd
from hvdloss import watch


def case_ranks_meet():
    total = hvd.allreduce(torch.ones(1), op=hvd.Sum, name="meet").item()
    assert total == hvd.size()
    return {"ranks": total}


def case_skips():
    raise unittest.SkipTest("on purpose")


def case_fails_on_one_rank():
    assert hvd.rank() != 1, "rank one has a problem"


def case_after_one_rank():
    hvd.allreduce(torch.ones(1), name="after")


def case_fails_on_all_ranks():
    hvd.allreduce_async(torch.ones(hvd.rank() + 1), name="after")  # left behind, and not of one shape
    raise AssertionError("all ranks have a problem")


def case_after_all_ranks():
    hvd.allreduce(torch.ones(1), name="after")


def case_hangs_on_one_rank():
    if hvd.rank() == 0:
        raise ValueError("rank zero gave up")
    hvd.allreduce(torch.ones(1), name="alone")


def case_after_a_hang():
    hvd.allreduce(torch.ones(1), name="after")


def case_dies_on_one_rank():
    if hvd.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    hvd.allreduce(torch.ones(1), name="alone")


def case_after_a_death():
    hvd.allreduce(torch.ones(1), name="after")


def case_tells_the_watch():
    """Passes as far as it knows; the watch has told all ranks that they cannot go on."""
    if hvd.rank() == 1:
        watch.report_error(ValueError("rank one tells of this"))


def case_after_the_watch():
    hvd.allreduce(torch.ones(1), name="after")
