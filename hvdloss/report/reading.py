"""Reading a record: all of it, or what is new of one that grows. Every line is checked."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss.errors import ConfigError
from hvdloss.report.schema import checked

__all__ = ["MOST_BYTES", "Record", "Tail", "read"]

Array = npt.NDArray[np.float64]
MOST_BYTES = 1 << 30
_BY_KIND = {
    **{kind: kind + "s" for kind in ("run", "step", "comm_plan", "epoch", "decision", "fault", "end")},
    **{kind: kind for kind in ("ranks", "classes", "hardest", "undone")},
}
_UNDONE = ("steps", "epochs", "decisions", "classes", "hardest")  # faults have happened


@dataclass
class Record:
    """What a record holds: the lines of each kind, in their order, as dicts (docs/reference/record.md).

    Attributes:
        path: of the file.
        runs: heads; more than one where a run was taken up again.
        steps: those that were kept, in order of time; those that were undone are not among them.
        ranks: changes of the number of ranks.
        classes: weighted counts of classes by rank.
        comm_plans: how gradients were sent, whenever it changed.
        epochs: with their metrics.
        decisions: of the terms' policies.
        faults: what went wrong.
        hardest: the hardest classes or samples.
        undone: which steps were undone (an elastic job went back to its last commit, or a run that was taken
            up again to its checkpoint): after `step`, up to `until`. Their lines are in no list.
        ends: how it ended; fewer than `runs` while it runs, and after a crash.
        unknown: lines of kinds that this version does not know.
        half: whether a half-written last line was passed over.
    """

    path: Path
    runs: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    classes: list[dict[str, Any]] = field(default_factory=list)
    comm_plans: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    hardest: list[dict[str, Any]] = field(default_factory=list)
    undone: list[dict[str, Any]] = field(default_factory=list)
    ends: list[dict[str, Any]] = field(default_factory=list)
    unknown: int = 0
    half: bool = False
    last: str = ""  # kind of the last line

    def add(self, line: dict[str, Any] | None) -> None:
        """Add a checked line; None for one of an unknown kind."""
        if line is None:
            self.unknown += 1
            return
        if line["kind"] == "undone":
            for name in _UNDONE:
                lines = getattr(self, name)
                while lines and lines[-1]["step"] > line["step"]:
                    lines.pop()
        getattr(self, _BY_KIND[line["kind"]]).append(line)
        self.last = line["kind"]

    @property
    def name(self) -> str:
        """What the run was called; else the file's name."""
        return str((self.runs and self.runs[-1].get("name")) or self.path.stem)

    @property
    def size(self) -> int:
        """How many ranks there were at the end."""
        if self.steps:
            return len(self.steps[-1]["ranks"]["loss"])
        return int(self.runs[-1]["ranks"])

    @property
    def status(self) -> str:
        """``"finished"``, ``"failed"``, ``"interrupted"``; ``"running"`` where no end was written.

        After a crash that left no time to write one (SIGKILL, a power cut) that is ``"running"``, too.
        """
        return str(self.ends[-1]["status"]) if self.last == "end" else "running"

    def column(self, name: str) -> Array:
        """Return one number of every step, float64 ``(steps,)``; NaN for null."""
        return np.array([_float(step.get(name)) for step in self.steps])

    @property
    def seconds(self) -> Array:
        """Seconds since the run's beginning, of every step. A pause before it was taken up again counts."""
        return self.column("time") - float(self.runs[0]["time"])

    def by_rank(self, name: str) -> Array:
        """Return one number of every rank in every step, float64 ``(steps, ranks)``; NaN for null.

        Where the number of ranks changed, there are as many columns as there were ranks at most.
        """
        width = max((len(step["ranks"]["loss"]) for step in self.steps), default=0)
        out = np.full((len(self.steps), width), np.nan)
        for row, step in zip(out, self.steps, strict=True):
            values = step["ranks"].get(name)
            if values is not None:
                row[: len(values)] = [_float(value) for value in values]
        return out


def _float(value: Any) -> float:
    return float("nan") if value is None else float(value)


class Tail:
    """A record that may be growing: :meth:`more` takes in what was written since.

    The writer replaces the file now and then by one with fewer steps; then all of it is read again.

    Args:
        path: of the record.

    Raises:
        ConfigError: no such file, or no record; by :meth:`more` as well.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._forget()
        self.more()

    def _forget(self) -> None:
        self.record = Record(self.path)
        self._at, self._lines, self._last = 0, 0, b""

    def more(self) -> bool:
        """Read what is new; return whether there was anything."""
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > MOST_BYTES:
                    raise ConfigError(f"{self.path} has {size} bytes; no record has more than {MOST_BYTES}")
                # Unless the file was replaced, the last line that was read is where it was. (Its inode tells
                # nothing: the second file after this one may have the same again.)
                file.seek(self._at - len(self._last))
                if file.read(len(self._last)) != self._last:
                    self._forget()
                    file.seek(0)
                new = file.read(MOST_BYTES + 1 - self._at)
        except OSError as error:
            raise ConfigError(f"path={str(self.path)!r}: cannot read the record: {error}") from error
        *lines, rest = new.split(b"\n")
        for text in lines:
            self._lines += 1
            where = f"{self.path}, line {self._lines}"
            self.record.add(checked(text, where, first=self._lines == 1))
            self._at += len(text) + 1
            self._last = text + b"\n"
        # Half a line is one that is being written, or whose writer was killed.
        self.record.half = bool(rest)
        return bool(lines)


def read(path: str | os.PathLike[str]) -> Record:
    """Read the record of a run, whole or growing; a half-written last line is passed over.

    ``pandas.read_json(path, lines=True)`` reads it as well, without checking.

    Args:
        path: of the file that :class:`hvdloss.report.Recorder` wrote.

    Raises:
        ConfigError: it cannot be read, is no record, or is damaged; names the line and the field.

    Collectives: none.
    """
    record = Tail(path).record
    if not record.runs:
        raise ConfigError(f"path={str(path)!r}: the record is empty; has the run written anything yet?")
    return record
