"""Pages of the documentation under several ranks, in PyTorch: those that say ``<!-- ranks: 2 -->``."""

from __future__ import annotations

import os
import tempfile

from torch_support import before_case  # noqa: F401 - called before every case

import hvdloss.torch as hvd  # the runner takes it from here
from hvdloss.split import grid
from tests.docs import pages
from tests.ranks import needs

NEEDS = needs("gloo-2")


def run(name: str) -> None:
    """Run a page on this rank; what it asserts, and what it raises, decides."""
    here = os.getcwd()
    os.chdir(tempfile.mkdtemp())
    try:
        ran = pages.run(f"docs/howto/{name}.md")
    finally:
        os.chdir(here)
    assert ran.examples > 0
    assert ran.skipped == []
    assert hvd.size() > 1


def case_masked_tokens():
    run("masked-tokens")


def case_packed_sequences():
    run("packed-sequences")


def case_several_losses():
    run("several-losses")


def case_class_imbalance():
    run("class-imbalance")


def case_slow_ranks():
    run("slow-ranks")


def case_slow_networks():
    run("slow-networks")


def case_split_models():
    run("split-models")
    for process_set in list(grid._sets.values()):  # which the page's grid keeps, as a script's does
        hvd.remove_process_set(process_set)


def case_resuming():
    run("resuming")
