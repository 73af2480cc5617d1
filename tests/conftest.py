"""What all tests share: how hard hypothesis looks."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# No deadline: a shared machine may stall any single example. The same examples every time, so that what
# passed passes; HYPOTHESIS_PROFILE=thorough looks harder, and elsewhere every time.
settings.register_profile(
    "default",
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
