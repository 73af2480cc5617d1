"""The record of a run: one file of JSON lines, written by rank 0 beside the training, of bounded size.

Steps go through a bounded queue to a thread that writes them; a full queue loses steps (and counts them)
rather than holding training up. When there are too many lines of steps, every 2^k-th is kept, with all of the
last ones, and the file is replaced as a whole, so whoever reads it always sees a record.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import logging
import math
import os
import platform
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from hvdloss._util.checks import check_int
from hvdloss._util.private import make_folder, open_private
from hvdloss._version import __version__
from hvdloss.comm.tuning import launched
from hvdloss.errors import ConfigError, UsageError
from hvdloss.report.schema import FORMAT, TEXT_MOST, checked, encoded, plain, scrubbed
from hvdloss.report.subscription import Subscription, check_reporting_rank
from hvdloss.step.report import RankReport, StepReport
from hvdloss.terms.term import Decision

__all__ = ["MOST_EVENTS", "Recorder", "run_metadata"]

_log = logging.getLogger("hvdloss.report")
MOST_EVENTS = 10_000  # lines of decisions, of faults, of epochs, ... each
MOST_CLASSES = 50_000  # counts in one line: ranks times classes
QUEUE = 10_000  # steps that wait to be written
PAUSE = 0.2  # seconds that the writer lets steps gather, so that it wakes up seldom
_PACKAGES = {
    "numpy": ("numpy",),
    "horovod": ("horovod",),
    "torch": ("torch",),
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
    "keras": ("keras",),
}


def run_metadata(
    hvd: Any, framework: str, settings: Mapping[str, Any], controller: Any, ranks: int
) -> dict[str, Any]:
    """Return the metadata of a run for sinks: plain values, without secrets, paths or host names.

    Args:
        hvd: a Horovod module, or its one-process stand-in.
        framework: "torch", "tensorflow" or "keras".
        settings: of the objective, from its ``settings()``.
        controller: of its terms.
        ranks: their number.
    """
    terms = {} if controller is None else {term.name: term for term in controller.terms}
    environment = {
        "hvdloss": __version__,
        "python": platform.python_version(),
        **_versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
    }
    with contextlib.suppress(Exception):  # what is not known is left out
        environment["hosts"] = int(hvd.cross_size())
    with contextlib.suppress(Exception):
        environment["controller"] = launched(hvd)["controller"]["value"]
    out = {
        "framework": framework,
        "ranks": ranks,
        "objective": {k: v for k, v in settings.items() if not k.startswith("terms.")},
        "terms": {
            name: {"unit": term.unit, "price": term.price, **term.settings()} for name, term in terms.items()
        },
        "environment": environment,
    }
    metadata: dict[str, Any] = plain(out)
    return metadata


def _versions() -> dict[str, str]:
    """Return the versions of what was imported of the frameworks and what they stand on."""
    found = {}
    for module, names in _PACKAGES.items():
        if module in sys.modules:
            for name in names:
                with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                    found[module] = importlib.metadata.version(name)
                    break
    return found


class Recorder:
    """Writes the record of a run; a sink (:class:`hvdloss.report.Sink`). The adapters' have ``follow``.

    ::

        with hvd.Recorder("runs/digits.jsonl", settings=vars(args)) as recorder:
            recorder.follow(optimizer)
            train()

    Only one rank writes; on others everything here does nothing. The file can be read at any time
    (:func:`hvdloss.report.read`, ``hvdloss report``), after a crash as well, and only its owner can. Without
    ``with`` it is closed when the process ends. An error of the file is a warning, once; training goes on.

    Args:
        path: of the file; folders are made.
        name: of the run, for the page; the file's name if empty.
        settings: of the run, for the page: anything plain. Values named like a secret (password, token, key)
            are left out, and of paths only the last name is kept.
        classes: names of the classes, if a term counts classes (``DataSkew``).
        max_steps: approximate bound on the lines of steps. With more, every second, fourth, eighth... is
            kept.
        recent: number of the last steps that are always kept.
        max_bytes: the same bound in bytes, for many ranks.
        exists: what to do if the file exists: ``"raise"``, ``"append"`` (to resume a run), or ``"replace"``.
            When the ranks of an elastic job change, the writing rank appends to the file.
        rank: the writing rank, counted among all ranks. A process set without it is not recorded: where sets
            train their own models, name a rank of each.

    Raises:
        ConfigError: an argument that cannot be used. ``follow`` raises it on that rank where the file exists
            or cannot be made.

    Collectives: none.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str = "",
        settings: Mapping[str, Any] | None = None,
        classes: Sequence[Any] | None = None,
        max_steps: int = 4000,
        recent: int = 200,
        max_bytes: int = 32 << 20,
        exists: str = "raise",
        rank: int = 0,
    ) -> None:
        self.path = Path(path)
        for word, value, least in (
            ("max_steps", max_steps, 8),
            ("recent", recent, 1),
            ("max_bytes", max_bytes, 1),
        ):
            check_int(word, value, least)
        if recent > max_steps // 2:
            raise ConfigError(f"recent={recent} must be at most half of max_steps={max_steps}")
        if exists not in ("raise", "append", "replace"):
            raise ConfigError(f"exists={exists!r} is not known; choose 'raise', 'append' or 'replace'")
        if settings is not None and not isinstance(settings, Mapping):
            raise ConfigError(f"settings={settings!r} must be a dict")
        self.name, self.settings = name, dict(settings or {})
        self.classes = None if classes is None else [str(one) for one in classes]
        self.max_steps, self.recent, self.max_bytes, self.exists = max_steps, recent, max_bytes, exists
        check_reporting_rank(rank)
        self.rank = rank
        #: Steps that were not written, since the queue was full; and events, of which there were too many.
        self.left_out = 0
        self._subscription: Subscription | None = None
        self._file: IO[bytes] | None = None
        self._queue: queue.SimpleQueue[tuple[str, float, Any] | None] = queue.SimpleQueue()
        self._hurry = threading.Event()
        self._writer: threading.Thread | None = None
        self._pid = 0
        self._begun = self._closed = self._broken = False
        self._again = False  # whether an elastic job's ranks have changed, so that the file is this job's
        self._head: dict[str, Any] = {}
        self._step, self._status = 0, "finished"
        self._epochs: list[tuple[int, int]] = []  # after which step, and which one
        # Of the writer:
        self._samples = 0.0
        # Those before the run's own count began: of a run that was taken up without its count, in the file
        # (None without steps), and of the one that is written (None before its first step).
        self._found_before: float | None = None
        self._before: float | None = None
        self._size = 0
        self._lines: list[tuple[str, int, int]] = []  # kind, offset, length, of every line
        self._ordinal: list[int] = []  # of the lines that are steps: the how many-th it is
        self._steps, self._stride = 0, 1
        self._events: dict[str, int] = {}
        self._comm_plan: Any = None
        self._counts: dict[str, Any] | None = None  # what was counted of classes, and is not written yet

    # -- the file ---------------------------------------------------------------------------------

    def open(self) -> None:
        """Create the file, or open it to append; calling it again does nothing.

        Raises:
            ConfigError: it exists (``exists="raise"``), is not a record (``"append"``), or cannot be created.
        """
        if self._file is not None or self._closed:
            return
        try:
            make_folder(self.path.parent)
            self._reset_file_state()
            if self.exists == "append" and self.path.exists():
                self._restore_from_file()
                self._file = open_private(self.path, "r+b")
                self._file.truncate(self._size)  # half a line of a writer that was killed
                self._file.seek(self._size)
            else:
                if self.exists == "replace":
                    self.path.unlink(missing_ok=True)
                self._file = open_private(self.path, "xb")
        except FileExistsError as error:
            raise ConfigError(
                f"path={str(self.path)!r}: there is a record already; pass exists='append' to append to it, "
                f"'replace' to replace it, or another path"
            ) from error
        except OSError as error:
            raise ConfigError(f"path={str(self.path)!r}: cannot write the record: {error}") from error
        self._pid = os.getpid()
        self._hurry.clear()
        self._writer = threading.Thread(target=self._work, name="hvdloss-recorder", daemon=True)
        self._writer.start()
        atexit.register(self._at_exit)

    def _reset_file_state(self) -> None:
        """Reset the state of the file."""
        self._size, self._lines, self._ordinal, self._steps, self._stride = 0, [], [], 0, 1
        self._samples, self._found_before, self._before = 0.0, None, None
        self._step, self._epochs = 0, []

    def _restore_from_file(self) -> None:
        """Restore the state from an existing file."""
        with open(self.path, "rb") as file:
            for number, text in enumerate(file, start=1):
                if not text.endswith(b"\n"):
                    break
                line = checked(text, f"{self.path}, line {number}", first=number == 1)
                kind = "" if line is None else str(line["kind"])
                if line is not None and kind == "step":
                    self._step, self._samples = int(line["step"]), float(line["samples"])
                    self._found_before = float(line.get("before", 0.0))
                elif line is not None and kind == "epoch":
                    self._epochs.append((int(line["step"]), int(line["epoch"])))
                elif line is not None and kind == "undone":
                    self._go_back(int(line["step"]))
                self._note(kind, len(text))
        self._written_step = self._step

    def _go_back(self, step: int) -> None:
        """Undo what came after a step."""
        self._step = step
        while self._epochs and self._epochs[-1][0] > step:
            self._epochs.pop()

    def before_reset(self) -> None:
        """Release the file: another rank may write it after an elastic job's ranks change.

        Nothing more is written, not even an end, until :meth:`ranks` is called on this rank.
        """
        self._again, self.exists = True, "append"
        if self._file is not None and not self._closed and os.getpid() == self._pid:
            self._stop()
            self._file = None

    def _stop(self) -> None:
        """Let the writer flush and end."""
        assert self._writer is not None
        self._queue.put(None)
        self._hurry.set()
        self._writer.join(timeout=60)
        self._broken = self._broken or self._writer.is_alive()
        atexit.unregister(self._at_exit)

    def _note(self, kind: str, length: int) -> None:
        self._lines.append((kind, self._size, length))
        self._size += length
        if kind == "step":
            self._ordinal.append(self._steps)
            self._steps += 1

    # -- events, in the training thread -----------------------------------------------------------

    def begin(self, metadata: Mapping[str, Any]) -> None:
        """Write the header, from :func:`run_metadata`."""
        self.open()
        if self._file is None or self._begun:
            return
        self._begun = True
        self._head = {"format": FORMAT, "name": self.name, **metadata, "settings": self.settings}
        self._put("run", self._head)

    def step(self, report: StepReport) -> None:
        """Record a finished step; another thread writes it later."""
        if not self._begun:
            self.begin({"ranks": len(report.ranks)})
        # A run resumed without its step count begins with 1, and nothing is undone.
        if report.step <= self._step and (report.step > 1 or self._again):
            self._put("undone", {"step": report.step - 1, "until": self._step})
            self._go_back(report.step - 1)
        self._step = report.step
        if self._queue.qsize() < QUEUE:
            self._put("step", report)
        else:
            self.left_out += 1

    def decision(self, decision: Decision) -> None:
        """Write a decision of a policy."""
        self._put("decision", decision)

    def ranks(self, number: int) -> None:
        """Write the number of ranks from here on, and reopen the file if it was released."""
        if self._begun and self._file is None and not self._broken:
            self.open()
            if not self._size:  # somebody removed the file
                self._put("run", self._head)
        self._put("ranks", {"ranks": number})

    def lost(self, error: BaseException) -> None:
        """Write why ranks were lost; the elastic job goes on without them."""
        self._put("fault", _error_record(error))

    def epoch(self, number: int | None = None, metrics: Mapping[str, Any] | None = None, **more: Any) -> None:
        """Write that an epoch is over, with its metrics.

        Args:
            number: counted from 1; None for the next one.
            metrics, more: by name: numbers, one number per class (``Recall(average="none")``), or a confusion
                matrix; the page shows which classes are hardest.
        """
        if self._begun and self._file is not None:
            if number is None:
                number = self._epochs[-1][1] + 1 if self._epochs else 1
            self._epochs.append((self._step, int(number)))
            self._put("epoch", {"epoch": int(number), "metrics": {**(metrics or {}), **more}})

    def hardest(
        self, parts: Any, *, what: str = "class", measure: str = "loss", lowest: bool = False
    ) -> None:
        """Write which classes (ranks, groups, samples) are hardest.

        Args:
            parts: the report of a :class:`hvd.LossAttribution`, of which `what` ("class", "rank", or a
                grouping's name) is taken; or a number for every label.
            what: the parts are.
            measure: the numbers are.
            lowest: whether low numbers are the hard ones, as of accuracy.
        """
        if not self._begun:
            return
        if hasattr(parts, "classes") and hasattr(parts, "hardest"):
            found = {"class": parts.classes, "rank": parts.ranks, **parts.groups}
            if what not in found:
                raise ConfigError(f"what={what!r} is no grouping of this report; it has {', '.join(found)}")
            items = [
                {"label": str(p.label), "value": p.loss, "weight": p.weight, "share": p.share}
                for p in found[what]
            ]
        elif isinstance(parts, Mapping):
            items = [{"label": str(label), "value": float(value)} for label, value in parts.items()]
        else:
            raise ConfigError(
                f"parts={parts!r:.100} must be a report of LossAttribution, or a dict of numbers"
            )
        items.sort(key=lambda item: item["value"] if lowest else -item["value"])
        line = {"what": what, "measure": measure, "lowest": lowest, "items": items[:50]}
        self._put("hardest", line)

    def fault(self, error: BaseException) -> None:
        """Write what ended training."""
        if not self._begun or self._closed:
            return
        ended = isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit)
        self._status = "interrupted" if ended else "failed"
        if isinstance(error, SystemExit) and error.code in (None, 0):
            self._status = "finished"
            return
        self._put("fault", _error_record(error))

    def _put(self, kind: str, what: Any) -> None:
        writes = self._file is not None and not self._closed and not self._broken
        if self._begun and writes and os.getpid() == self._pid:
            self._queue.put((kind, time.time(), what))

    # -- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Write the end, wait until all is on its way to the disk, and close; again does nothing."""
        if self._subscription is not None:
            subscription, self._subscription = self._subscription, None
            subscription.close()
        if self._closed:
            return
        if self._begun and self._file is not None and os.getpid() == self._pid:
            self._put("end", {"status": self._status, "left_out": self.left_out})
            self._stop()
        self._closed = True

    def _at_exit(self) -> None:
        error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        if error is not None and self._status == "finished":
            self.fault(error)
        self.close()

    def _subscribe(
        self, is_reporting_rank: Callable[[], bool], subscribe: Callable[[], Subscription]
    ) -> None:
        """Subscribe; the reporting rank creates the file first."""
        if self._subscription is not None or self._closed:
            raise UsageError(
                f"the recorder of {self.path.name} follows an optimizer already, or was closed; make "
                f"another one, with a file of its own"
            )
        if is_reporting_rank():
            self.open()
        self._subscription = subscribe()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self.fault(error)
        self.close()

    # -- what the writer does ---------------------------------------------------------------------

    def _work(self) -> None:
        try:
            more = True
            while more:
                items = [self._queue.get()]
                with contextlib.suppress(queue.Empty):
                    while len(items) < 1000:
                        items.append(self._queue.get_nowait())
                for item in items:
                    if item is None:
                        more = False
                        self._write_counts()
                        continue
                    self._take(*item)
                assert self._file is not None
                self._file.flush()
                if len(self._ordinal) >= self.max_steps or self._size > self.max_bytes:
                    self._thin()
                if more:
                    self._hurry.wait(PAUSE)
        except Exception as error:  # training must not end for it
            self._broken = True
            _log.warning(
                "hvdloss: the record %s is not written any more (%s: %s); training goes on",
                self.path,
                type(error).__name__,
                error,
            )
        finally:
            with contextlib.suppress(Exception):
                assert self._file is not None
                self._file.close()

    def _take(self, kind: str, at: float, what: Any) -> None:
        if kind == "step":
            for line in self._of_step(what, at):
                self._write(line)
            return
        if kind == "end":
            self._write_counts()
        elif kind != "run":
            self._events[kind] = count = self._events.get(kind, 0) + 1
            if count > MOST_EVENTS:
                self.left_out += 1
                return
        line = {"kind": kind, "time": round(at, 3)}
        if kind == "decision":
            line |= {name: getattr(what, name) for name in ("step", "what", "before", "after", "reason")}
        else:
            line |= {**({} if kind == "run" else {"step": self._written_step}), **what}
        record = plain(line)
        if kind == "epoch":  # the accuracy of tokens is no secret
            record["metrics"] = {str(name)[:200]: plain(value) for name, value in what["metrics"].items()}
        self._write(record)

    _written_step = 0

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        data = encoded(line)
        self._file.write(data)
        self._note(str(line["kind"]), len(data))

    def _of_step(self, report: StepReport, at: float) -> list[dict[str, Any]]:
        """Return the lines of a step: a changed communication plan, the step, and errors."""
        self._count(report)
        self._written_step = report.step
        head = {"time": round(at, 3), "step": report.step}
        lines: list[dict[str, Any]] = []
        choices = dict(report.choices)
        comm_plan = choices.pop("comm_plan", None)
        if (choices or comm_plan) and (
            plan := plain({"choices": choices, "comm_plan": comm_plan})
        ) != self._comm_plan:
            self._comm_plan = plan
            if self._room("comm_plan"):
                lines.append({"kind": "comm_plan", **head, **plan})
        size = len(report.ranks)
        columns = report.ranks.columns()
        # Numbers are plain but for those that are not finite, which plain() would look for one by one.
        ranks: dict[str, Any] = {
            name: _finite(columns[name])
            for name in ("loss", "weight", "elements", "micro_batches", "communication", "computation")
        }
        if any(skew is not None for skew in columns["skew"]):
            ranks["skew"] = plain(columns["skew"])
        wrong = [report.ranks[rank] for rank, kind in enumerate(columns["nonfinite"]) if kind]
        if wrong:
            ranks["nonfinite"] = columns["nonfinite"]
        if any(columns["dropped"]):
            ranks["dropped"] = columns["dropped"]
        terms = {}
        for name, term in report.terms.items():
            terms[name] = entry = {
                "values": plain(term.values),
                "total": plain(term.total),
                "priced": plain(term.priced),
            }
            for key, value in term.details.items():
                if key in entry or isinstance(value, bool | str):
                    continue
                if (
                    value is None
                    or isinstance(value, int | float)
                    or (isinstance(value, list) and len(value) == size and _numbers(value))
                ):
                    entry[key] = plain(value)
            lines += self._classes(name, term, head, size)
        losses = {name: plain(asdict(one)) for name, one in report.losses.items()}
        lines.append(
            {
                "kind": "step",
                **head,
                "samples": self._samples,
                **({"before": self._before} if self._before else {}),
                "loss": plain(report.loss),
                **({} if (averaged := report.averaged_loss) is None else {"averaged_loss": plain(averaged)}),
                "weight": plain(report.weight),
                "elements": report.elements,
                "objective_value": plain(report.objective_value),
                "skipped": report.skipped,
                "ranks": ranks,
                "terms": terms,
                **({"losses": losses} if losses else {}),
            }
        )
        if wrong and self._room("fault"):
            lines.append({"kind": "fault", **head, **_nonfinite(report, wrong)})
        return lines

    def _count(self, report: StepReport) -> None:
        """Bring the number of samples up to this step."""
        if report.samples is None:
            self._samples += report.elements
            return
        if self._before is None:
            begins = report.samples == report.elements and not self._again
            self._before = self._samples if begins else self._found_before or 0.0
        self._samples = self._before + report.samples

    def _room(self, kind: str) -> bool:
        self._events[kind] = count = self._events.get(kind, 0) + 1
        if count > MOST_EVENTS:
            self.left_out += 1
        return count <= MOST_EVENTS

    def _classes(self, name: str, term: Any, head: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
        """Return the line of what a term counted of classes, at steps 1, 2, 4, 8, ..."""
        counts = term.details.get("counts")
        if (
            not isinstance(counts, list)
            or len(counts) != size
            or not counts
            or not isinstance(counts[0], list)
        ):
            return []
        width = len(counts[0])
        if size * width > MOST_CLASSES:
            return []
        names = self.classes if self.classes is not None and len(self.classes) == width else None
        line = {"kind": "classes", **head, "term": name, "unit": term.unit, "names": names}
        line |= {"edges": term.details.get("edges"), "counts": counts}
        if self._steps & (self._steps + 1):  # `_steps` were before this one
            self._counts = line
            return []
        self._counts = None
        record: dict[str, Any] = plain(line)
        return [record]

    def _write_counts(self) -> None:
        """Write the last counts, if they are not."""
        if self._counts is not None:
            line, self._counts = self._counts, None
            self._write(plain(line))

    def _thin(self) -> None:
        """Keep every 2^k-th step and the last ones, and all else, in a new file in place of the old."""
        steps = [line for line in self._lines if line[0] == "step"]
        old = list(zip(self._ordinal, steps, strict=True))[: -self.recent]
        most = max(1, (self.max_steps - self.recent) // 2)
        recent = sum(length for _, _, length in steps[-self.recent :])
        stride = self._stride  # never smaller than before, so that what is left is even
        while True:
            kept = [(number, line) for number, line in old if number % stride == 0]
            small = recent + sum(length for _, (_, _, length) in kept) <= self.max_bytes // 2
            if len(kept) <= min(most, 1) or (len(kept) <= most and small):
                break
            stride *= 2
        self._stride = stride
        gone = {line[1] for number, line in old if number % stride}
        if not gone:
            return
        ordinals = [number for number, _ in kept] + self._ordinal[-self.recent :]
        new = self.path.with_name(f".{self.path.name}.{os.getpid()}.new")
        assert self._file is not None
        lines, size = [], 0
        try:
            with open(self.path, "rb") as source, open_private(new, "wb") as target:
                os.fchmod(target.fileno(), os.fstat(source.fileno()).st_mode & 0o777)
                for kind, offset, length in self._lines:
                    if offset in gone:
                        continue
                    source.seek(offset)
                    target.write(source.read(length))
                    lines.append((kind, size, length))
                    size += length
            os.replace(new, self.path)
        finally:
            new.unlink(missing_ok=True)
        self._file.close()
        self._file = open_private(self.path, "ab")
        self._lines, self._ordinal, self._size = lines, ordinals, size


def _error_record(error: BaseException) -> dict[str, Any]:
    """Return the fault of an exception."""
    ranks = [int(rank) for rank in getattr(error, "ranks", ())]
    text = scrubbed(str(error).partition("\n")[0])
    return {"error": type(error).__name__, "ranks": ranks, "text": text}


def _numbers(values: list[Any]) -> bool:
    return all(
        value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values
    )


def _finite(values: list[Any]) -> list[Any]:
    """Return numbers, with None for those that are not finite."""
    if math.isfinite(sum(values)):
        return values
    return [value if math.isfinite(value) else None for value in values]


def _nonfinite(report: StepReport, wrong: Sequence[RankReport]) -> dict[str, Any]:
    """Return the fault of a step in which something was NaN or infinite, and training went on."""
    kinds = sorted({one.nonfinite for one in wrong}, reverse=True)  # "loss" before "gradient"
    ranks = ", ".join(str(one.rank) for one in wrong)
    done = (
        "the rank added nothing to the step" if any(one.dropped for one in wrong) else "nothing was updated"
    )
    text = f"step {report.step}: {' and '.join(kinds)} NaN or infinite on rank(s) {ranks}; {done}"
    error = "NonFiniteLossError" if kinds[0] == "loss" else "NonFiniteGradientError"
    return {"error": error, "ranks": [one.rank for one in wrong], "text": text[:TEXT_MOST]}
