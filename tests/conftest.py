"""What all tests share: how hard hypothesis looks."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# No deadline: a shared machine may stall any single example. HYPOTHESIS_PROFILE=thorough looks harder.
settings.register_profile(
    "default", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
