"""The log of a controller: what was measured and decided, enough to decide the same again.

One JSON object per line. The first tells the format and the settings; ``"step"`` lines hold what every
rank told of a step (the table of ledgers, which is what decisions rest on), ``"link"`` lines what was
measured of the link before the first step, ``"decision"`` lines what was decided and why. Floats are
written so that reading gives the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, astuple
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from hvdloss.controller import Controller
from hvdloss.errors import ConfigError
from hvdloss.hearing import parsed
from hvdloss.ledger import COLUMN, WIDTH
from hvdloss.private import open_private
from hvdloss.term import Decision, Travel

__all__ = ["FORMAT", "decide_again", "follow", "read", "record"]

FORMAT = "hvdloss control log 1"
Array = npt.NDArray[np.float64]
# What clocks told: the only columns that differ when the same training is done again.
_TIMES = [COLUMN["communication"], COLUMN["computation"]]


class _Writer:
    def __init__(self, file: IO[str], controller: Controller) -> None:
        self._file = file
        self._controller = controller
        self._begun = False

    def line(self, **what: Any) -> None:
        if not self._begun:
            self._begun = True
            self.line(format=FORMAT, ranks=self._controller.size, settings=self._controller.settings())
        self._file.write(json.dumps(what, allow_nan=True) + "\n")
        self._file.flush()

    def step(self, number: int, table: Array, travel: Travel) -> None:
        self.line(kind="step", step=number, table=table.tolist(), travel=asdict(travel))

    def decision(self, decision: Decision) -> None:
        self.line(kind="decision", **asdict(decision))

    def prepared(self, states: list[Any]) -> None:
        if any(state is not None for state in states):
            self.line(kind="link", states=states)


def record(controller: Controller, path: str | Path) -> None:
    """Write everything that `controller` sees and decides from now on to a new file.

    Call it on one rank before the first step: all ranks would write the same. Every line is flushed, so
    the file can be read while it grows and after a crash.

    Args:
        controller: of an objective (``objective.controller``).
        path: of the file; it must not exist.

    Raises:
        ConfigError: the file exists, or cannot be written.
    """
    try:
        file = open_private(path, "x", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"path={str(path)!r}: cannot make the control log: {error}") from error
    writer = _Writer(file, controller)
    controller.on_step.append(writer.step)
    controller.on_decision.append(writer.decision)
    controller.on_prepare.append(writer.prepared)


def read(path: str | Path) -> Iterator[dict[str, Any]]:
    """Give the lines of a log as dicts, the first being its head; a half-written last line is left out.

    Raises:
        ConfigError: not such a log, naming the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"path={str(path)!r}: cannot read the control log: {error}") from error
    for number, line in enumerate(lines, start=1):
        if number == len(lines):  # what follows the last line's end: nothing, or half a line
            break
        try:
            found = parsed(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(found, dict) or (number == 1 and found.get("format") != FORMAT):
            raise ConfigError(f"{path}, line {number} is not of a control log ({FORMAT!r})")
        yield found


def _of(controller: Controller, path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the head and the other lines of a log of such a controller, with arrays and travels in them.

    Raises:
        ConfigError: it is none, naming the line.
    """
    lines = list(read(path))
    if not lines:
        raise ConfigError(f"path={str(path)!r}: the control log is empty")
    head, *rest = lines
    if head.get("settings") != json.loads(json.dumps(controller.settings())):
        raise ConfigError(f"{path} was written with other terms: {str(head.get('settings'))[:200]}")
    ranks = head.get("ranks")
    if type(ranks) is not int or ranks < 1:
        raise ConfigError(f"{path}, line 1: ranks={ranks!r} is no number of ranks")
    width = WIDTH + controller.width
    for number, one in enumerate(rest, start=2):
        try:
            if one["kind"] == "step":
                one["table"], one["travel"] = np.array(one["table"], np.float64), Travel(**one["travel"])
                # Of whatever controller, a table is finite: a step in which it is not is refused.
                good = one["table"].shape == (ranks, width) and np.isfinite(one["table"]).all()
                good = good and type(one["step"]) is int and all(map(_is_count, astuple(one["travel"])))
            elif one["kind"] == "link":
                good = isinstance(one["states"], list) and len(one["states"]) == len(controller.terms)
            else:
                good = one["kind"] == "decision"
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"{path}, line {number} is not of a control log: {error!r}") from error
        if not good:
            raise ConfigError(f"{path}, line {number} is not of a control log of {ranks} ranks: {one!s:.200}")
    return head, rest


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 63


def follow(controller: Controller, path: str | Path) -> None:
    """Let `controller` decide by the times in a log rather than by what is measured.

    Training that is deterministic but for its clocks then takes the same decisions at the same steps and
    gives the same parameters. All ranks must call it, before the first step, with the same log.

    Raises:
        ConfigError: not a log of such a controller; at a step the log does not have, naming it.
    """
    head, rest = _of(controller, path)
    tables = {one["step"]: one["table"] for one in rest if one["kind"] == "step"}
    states = next((one["states"] for one in rest if one["kind"] == "link"), None)

    def logged(step: int, table: Array) -> Array:
        if step not in tables or tables[step].shape != table.shape:
            raise ConfigError(
                f"step {step} of {len(table)} ranks is not in {path}, which has {len(tables)} steps of "
                f"{head['ranks']} ranks"
            )
        out = table.copy()
        out[:, _TIMES] = tables[step][:, _TIMES]
        return out

    controller.measured_instead = logged
    controller.prepared_instead = states


def decide_again(controller: Controller, path: str | Path) -> list[Decision]:
    """Feed a log to a fresh controller with the same terms; return the decisions it takes.

    They are those of the log if nothing but the log decided (the tests check that it is so).

    Raises:
        ConfigError: not a log of such a controller.
    """
    head, rest = _of(controller, path)
    controller.begin(0, head["ranks"])
    for one in rest:
        if one["kind"] == "link":
            controller.restore_prepared(one["states"])
        elif one["kind"] == "step":
            controller.close(one["step"], one["table"], one["travel"])
    return controller.decisions
