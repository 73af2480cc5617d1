"""Compression where the fitted link says that bytes, not messages, take the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvdloss.errors import ConfigError
from hvdloss.terms.term import Decision, Policy, StepStats

__all__ = ["AdaptiveCompression"]


class AdaptiveCompression(Policy):
    """Compresses to float16 on the wire where the link is slow enough for that to pay.

    Switches on where, by the fit t = alpha messages + bytes / beta, bytes take longer than messages and
    half the bytes would shorten a step by at least `gain`; off again where they would not save half of that.

    Args:
        gain: least predicted saving, as a share of the time of a step.
        every: exchanges between two decisions.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    needs_link = True

    state_attrs = ("on", "_seen")

    def __init__(self, gain: float = 0.1, *, every: int = 5) -> None:
        if not 0 < gain < 1:
            raise ConfigError(f"gain={gain!r} of AdaptiveCompression must lie between 0 and 1")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"every={every!r} of AdaptiveCompression must be an integer of at least 1")
        self.gain, self.every = gain, every
        self.reset(0, 1)

    def reset(self, rank: int, size: int) -> None:
        """Start without compression."""
        self.on = False
        self._seen = 0

    def on_step_end(self, term: Any, step: StepStats) -> Sequence[Decision]:
        """Decide, if it is due."""
        self._seen += 1
        fit, comm_stats = term.link.fit(), term.comm_stats
        if self._seen % self.every or fit is None or not comm_stats.full_bytes:
            return ()
        moving = comm_stats.full_bytes / fit.beta
        latency = fit.alpha * comm_stats.messages
        saved = moving / 2
        if not comm_stats.parameters and not self.on:
            saved = min(saved, term.moving)  # what overlaps computation is not there to be saved
        whole = float((term.computation + term.exposed).max()) + (saved if self.on else 0.0)
        least = self.gain * whole * (0.5 if self.on else 1.0)
        wanted = moving > latency and saved >= least
        if wanted == self.on:
            return ()
        self.on = wanted
        return [
            Decision(
                step.step,
                "compression",
                "none" if wanted else "fp16",
                "fp16" if wanted else "none",
                f"{comm_stats.full_bytes} bytes take {moving:.3g} s, {comm_stats.messages} messages "
                f"{latency:.3g} s; half the bytes would save {saved:.3g} s of {whole:.3g} s",
            )
        ]
