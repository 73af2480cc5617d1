"""The terms that are measured per rank and priced: C(k), D(k), and what your own term builds on."""

from __future__ import annotations

from hvdloss.terms.communication import CommunicationCost
from hvdloss.terms.skew import DataSkew
from hvdloss.terms.term import Batch, CommStats, Decision, Policy, StepStats, Term

__all__ = ["Batch", "CommStats", "CommunicationCost", "DataSkew", "Decision", "Policy", "StepStats", "Term"]
