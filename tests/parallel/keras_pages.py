"""Pages of the documentation under several ranks, in Keras: those that say ``<!-- ranks: 2 -->``."""

from __future__ import annotations

import sys
from pathlib import Path

import hvdloss.keras as hvd  # the runner takes it from here

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))

import pages


def case_from_keras():
    ran = pages.run("docs/howto/from-keras.md")
    assert ran.examples > 0
    assert hvd.size() > 1
