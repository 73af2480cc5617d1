"""Tests under real ranks: `horovodrun` starts them once, many small cases run in lock-step inside.

`tests/README.md` says how to add a case. `cases` reads what a case needs and makes pytest's tests of it,
`launch` starts ranks and learns what became of each case, `inner` is what runs in a rank, `summary` is
printed at the end.
"""

from __future__ import annotations

from .cases import Case, case_names, more, needs, parallel_cases
from .launch import HERE, MODULES, environment, missing_controller, run_launch

__all__ = [
    "HERE",
    "MODULES",
    "Case",
    "case_names",
    "environment",
    "missing_controller",
    "more",
    "needs",
    "parallel_cases",
    "run_launch",
]
