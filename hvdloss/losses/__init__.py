"""Losses that need every rank: functions of sums, contrast over the global batch, split classes."""

from hvdloss.losses.base import GlobalLoss, Group

__all__ = ["GlobalLoss", "Group"]
