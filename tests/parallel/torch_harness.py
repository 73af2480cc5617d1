"""The harness itself: values come back, failures are told by rank (see tests/torch/test_torch_ranks.py)."""

from __future__ import annotations

import unittest

import torch

import hvdloss.torch as hvd


def case_ranks_meet():
    total = hvd.allreduce(torch.ones(1), op=hvd.Sum, name="meet").item()
    assert total == hvd.size()
    return {"ranks": total}


def case_skips():
    raise unittest.SkipTest("on purpose")


def case_fails_on_one_rank():
    assert hvd.rank() != 1, "rank one has a problem"


def case_after_a_failure():
    hvd.allreduce(torch.ones(1), name="after")


def case_hangs_on_one_rank():
    if hvd.rank() == 0:
        raise ValueError("rank zero gave up")
    hvd.allreduce(torch.ones(1), name="alone")


def case_after_a_hang():
    hvd.allreduce(torch.ones(1), name="after")
