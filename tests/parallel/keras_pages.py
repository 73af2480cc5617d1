"""Pages of the documentation under several ranks, in Keras: those that say ``<!-- ranks: 2 -->``."""

from __future__ import annotations

import hvdloss.keras as hvd  # the runner takes it from here
from tests.docs import pages
from tests.ranks import needs

NEEDS = needs(more="gloo-2")


def case_from_keras():
    ran = pages.run("docs/howto/from-keras.md")
    assert ran.examples > 0
    assert hvd.size() > 1
