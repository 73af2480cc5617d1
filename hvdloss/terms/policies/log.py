"""The log of a controller: measurements and decisions, enough to replay the decisions.

One JSON object per line. The first has the format and the settings; ``"step"`` lines hold the table of all
ranks' ledgers, from which everything is decided; ``"link"`` lines what was measured of the link before the
first step, ``"decision"`` lines the decisions and their reasons. Floats are written so that they read back
bitwise equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, astuple
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from hvdloss._util.private import open_private
from hvdloss.comm.messages import parse_json
from hvdloss.errors import ConfigError
from hvdloss.losses.ledger import COLUMN, LEDGER_WIDTH
from hvdloss.terms.controller import Controller
from hvdloss.terms.term import CommStats, Decision

__all__ = ["FORMAT", "read", "record", "replay", "use_logged_times"]

FORMAT = "hvdloss control log 1"
Array = npt.NDArray[np.float64]
# Measured by clocks: the only columns that differ between two runs of the same training.
_TIMES = [COLUMN["communication"], COLUMN["computation"]]


class _Writer:
    def __init__(self, file: IO[str], controller: Controller) -> None:
        self._file = file
        self._controller = controller
        self._header_written = False

    def line(self, **what: Any) -> None:
        if not self._header_written:
            self._header_written = True
            self.line(format=FORMAT, ranks=self._controller.size, settings=self._controller.settings())
        self._file.write(json.dumps(what, allow_nan=True) + "\n")
        self._file.flush()

    def step(self, number: int, table: Array, comm_stats: CommStats) -> None:
        self.line(kind="step", step=number, table=table.tolist(), comm_stats=asdict(comm_stats))

    def decision(self, decision: Decision) -> None:
        self.line(kind="decision", **asdict(decision))

    def prepared(self, states: list[Any]) -> None:
        if any(state is not None for state in states):
            self.line(kind="link", states=states)


def record(controller: Controller, path: str | Path) -> None:
    """Write all that `controller` measures and decides from now on to a new file.

    Call it on one rank before the first step: all ranks would write the same. Every line is flushed, so
    the file can be read while it is written and after a crash.

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
    """Yield the lines of a log as dicts, the header first; a half-written last line is left out.

    Raises:
        ConfigError: not such a log, naming the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"path={str(path)!r}: cannot read the control log: {error}") from error
    for number, line in enumerate(lines, start=1):
        if number == len(lines):  # after the last newline: nothing, or half a line
            break
        try:
            found = parse_json(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(found, dict) or (number == 1 and found.get("format") != FORMAT):
            raise ConfigError(f"{path}, line {number} is not of a control log ({FORMAT!r})")
        yield found


def _of(controller: Controller, path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the header and the other lines of a log of such a controller, decoded.

    Raises:
        ConfigError: not such a log, naming the line.
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
    width = LEDGER_WIDTH + controller.width
    for number, one in enumerate(rest, start=2):
        try:
            if one["kind"] == "step":
                one["table"], one["comm_stats"] = (
                    np.array(one["table"], np.float64),
                    CommStats(**one["comm_stats"]),
                )
                # A table is finite for any controller: a step in which it is not is refused.
                good = one["table"].shape == (ranks, width) and np.isfinite(one["table"]).all()
                good = good and type(one["step"]) is int and all(map(_is_count, astuple(one["comm_stats"])))
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


def use_logged_times(controller: Controller, path: str | Path) -> None:
    """Let `controller` decide by the times in a log instead of those measured.

    Training that is deterministic but for its clocks then takes the same decisions at the same steps and
    ends with the same parameters. All ranks must call it, before the first step, with the same log.

    Raises:
        ConfigError: not a log of such a controller; at a step that the log lacks, naming it.
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

    controller.table_override = logged
    controller.prepared_override = states


def replay(controller: Controller, path: str | Path) -> list[Decision]:
    """Feed a log to a new controller with the same terms; return its decisions.

    They equal those of the log, since decisions depend on nothing else (the tests check it).

    Raises:
        ConfigError: not a log of such a controller.
    """
    head, rest = _of(controller, path)
    controller.reset(0, head["ranks"])
    for one in rest:
        if one["kind"] == "link":
            controller.load_prepared_state(one["states"])
        elif one["kind"] == "step":
            controller.on_step_end(one["step"], one["table"], one["comm_stats"])
    return controller.decisions
