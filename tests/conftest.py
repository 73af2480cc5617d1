"""What all tests share: how hard hypothesis looks, and how Horovod runs in this process itself."""

from __future__ import annotations

import functools
import os
import time
from typing import Any

import pytest
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

# Milliseconds. Horovod's background threads exchange a thousand times a second by themselves, which takes up
# to a quarter of a core in each rank, and in this process as long as it lives.
os.environ.setdefault("HOROVOD_CYCLE_TIME", "5")

_END = float(os.environ.get("HVDLOSS_TESTS_END") or "inf")  # seconds since 1970
_late: list[str] = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what would begin after the time that there is, loudly: a run that is cut off says nothing."""
    if time.time() > _END:
        _late.append(item.nodeid)
        pytest.skip("NOT RUN: the time of HVDLOSS_TESTS_END was over before it")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _late:
        terminalreporter.section("OUT OF TIME", red=True)
        terminalreporter.line(f"{len(_late)} tests were not run, the first of them {_late[0]}")


@pytest.fixture(autouse=True, scope="session")
def _alone_without_mpi() -> Any:
    """Have `hvd.init()` in this process, which no launcher started, use Gloo.

    By itself it would choose MPI. Where tests initialise Horovod for both frameworks, one of them ends MPI
    at exit while the other still uses it, and the process dies with all tests passed. Ranks are started
    with an environment of their own.
    """
    try:
        from horovod.common.basics import HorovodBasics
    except ImportError:
        yield
        return
    plain = HorovodBasics.init

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOROVOD_CONTROLLER", "gloo")
            patch.setenv("HOROVOD_CPU_OPERATIONS", "gloo")
            return plain(self, *args, **kwargs)

    HorovodBasics.init = init
    yield
    HorovodBasics.init = plain
