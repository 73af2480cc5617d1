"""Inflicts the faults, judges what the ranks recorded, and writes results and the page's table.

    python tests/reliability/inflict.py --repeats 20 --slow-repeats 3     # all of it: `make reliability`
    python tests/reliability/inflict.py --loop torch --fault sigkill      # a part, nothing is written to docs
    python tests/reliability/inflict.py --page                            # the page's table from its JSON

Exit status 1 if any infliction did not go as the table of faults says.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from fault_job import Item  # noqa: E402
from fault_launch import Launch, Nursery, launch  # noqa: E402
from fault_page import JSON_PATH, write_page  # noqa: E402
from faults import BY_NAME, FAULTS, LOOPS, Fault  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Verdict:
    """How one infliction went.

    Attributes:
        seconds: until every rank knew, or ended; None if some rank never did.
        errors: classes that were raised, by rank; "" where the rank was gone.
        texts: what they said.
        problems: what was not as it should be; empty if it was.
        stacks: of ranks that were left, by rank.
    """

    fault: str
    loop: str
    repeat: int
    victim: int
    step: int
    seconds: float | None = None
    errors: dict[int, str] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    stacks: dict[int, str] = field(default_factory=dict)


def judge(item: Item, number: int, loop: str, size: int, done: Launch) -> Verdict:
    """Return how one infliction of a launch went."""
    fault = BY_NAME[item.fault]
    caught = loop in fault.caught
    out = Verdict(item.fault, loop, item.repeat, item.victim, item.step)
    if done.hung:
        out.stacks = done.stacks
    records = {rank: [r for r in done.records[rank] if r["number"] == number] for rank in range(size)}

    def first(rank: int, event: str) -> dict[str, Any] | None:
        return next((r for r in records[rank] if r["event"] == event), None)

    starts = [r["time"] for rank in records for r in records[rank] if r["event"] == "inflicted"]
    if not fault.everywhere:
        starts = [r["time"] for r in records[item.victim] if r["event"] == "inflicted"]
    if fault.how == "signal" and done.inflicted is not None:
        starts = [done.inflicted]
    if not starts:
        out.problems.append(f"was not inflicted; {done.hung or 'the job ended'}{_failure(records)}")
        return out
    began = min(starts)

    knew = []
    for rank in range(size):
        told = first(rank, "knew")
        gone = rank == item.victim and not fault.victim
        if told is None:
            if gone:
                out.errors[rank] = ""
            elif first(rank, "unnoticed") or first(rank, "ended"):
                out.problems.append(f"{_who(rank, item)} noticed nothing")
            else:
                out.problems.append(
                    f"{_who(rank, item)} did not know ({done.hung or 'ended without a word'})"
                )
            continue
        out.errors[rank], out.texts[rank] = told["kinds"][0], told["text"]
        if gone:
            continue  # it may know: a stuck rank that woke up
        knew.append(told["at"])
        _check_error(out, fault, rank, item, told)
        if not told["unchanged"]:
            out.problems.append(f"{_who(rank, item)}: parameters were changed")
    if knew and not any("did not know" in p or "noticed nothing" in p for p in out.problems):
        out.seconds = max(knew) - began
        if out.seconds > fault.seconds:
            out.problems.append(f"all knew after {out.seconds:.1f} s only")
    _check_end(out, fault, item, caught, size, done, records)
    out.problems = list(dict.fromkeys(out.problems))
    return out


def _failure(records: dict[int, list[dict[str, Any]]]) -> str:
    """Return what went wrong before the fault, if anything was said."""
    for rank in records.values():
        for record in rank:
            if record["event"] == "knew":
                return f": {record['kinds'][0]}: {record['text'][:200]}"
    return ""


def _who(rank: int, item: Item) -> str:
    return "the rank at fault" if rank == item.victim else "another rank"


def _check_error(out: Verdict, fault: Fault, rank: int, item: Item, told: dict[str, Any]) -> None:
    """Check class and words of what a rank raised."""
    other = rank != item.victim
    wanted = fault.others if other and fault.others else fault.errors
    who, kinds, text = _who(rank, item), told["kinds"], told["text"]
    if wanted and not set(wanted) & set(kinds):
        out.problems.append(f"{who} raised {kinds[0]}, not {' or '.join(wanted)}: {text[:150]}")
        return
    if not other and fault.others:
        return  # its own error, as it was
    if fault.names and not re.search(rf"\brank(?:s|\(s\))?[\d ,and]*\b{item.victim}\b", text):
        out.problems.append(f"{who}: the error does not name the rank: {text[:150]}")
    if fault.step == "exact" and not re.search(rf"\bstep {told['expected']}\b", text):
        out.problems.append(f"{who}: the error does not name step {told['expected']}: {text[:150]}")
    if fault.step == "some" and not re.search(r"\bsteps? \d+", text):
        out.problems.append(f"{who}: the error names no step: {text[:150]}")
    if fault.way and not any(word.lower() in text.lower() for word in fault.way):
        out.problems.append(f"{who}: the error names no way out: {text[:150]}")


def _check_end(
    out: Verdict,
    fault: Fault,
    item: Item,
    caught: bool,
    size: int,
    done: Launch,
    records: dict[int, list[dict[str, Any]]],
) -> None:
    """Check that the job went on, or ended, as it should."""
    if caught:
        if fault.how == "build":
            return
        after = {r["checksum"] for rank in records.values() for r in rank if r["event"] == "went on"}
        failed = [r["text"] for rank in records.values() for r in rank if r["event"] == "did not go on"]
        if failed:
            out.problems.append(f"training did not go on: {failed[0][:150]}")
        elif len(after) != 1:
            out.problems.append("ranks did not go on alike")
        return
    if done.hung:
        stacks = "; ".join(f"rank {rank}" for rank in done.stacks)
        out.problems.append(f"did not end by itself ({stacks} left)")
    for rank, status in done.status.items():
        if rank == -1:
            if status == 0:
                out.problems.append("horovodrun's exit status was 0")
        elif rank != item.victim:
            if status == 0:
                out.problems.append("another rank's exit status was 0")
        elif fault.status is None and status == 0:
            out.problems.append("the exit status of the rank at fault was 0")
        elif fault.status is not None and status != fault.status:
            out.problems.append(f"the exit status of the rank at fault was {status}")


# -- plans --------------------------------------------------------------------------------------------


def items(fault: Fault, repeats: int, size: int) -> list[Item]:
    """Return the inflictions of one fault: on every rank in turn, in different steps."""
    out = []
    for repeat in range(repeats):
        # What differs is told as a difference from rank 0.
        victim = 1 + repeat % (size - 1) if fault.how == "build" else (size - 1 - repeat) % size
        # Keras looks at the first two batches before it trains.
        first = 4 if fault.name == "raise-loader" else 2
        out.append(Item(fault.name, repeat, victim, 1 if fault.at_first else first + repeat % 3))
    return out


def run(
    loop: str,
    faults: Iterable[Fault],
    *,
    size: int,
    repeats: int,
    deadly: int,
    slow: int,
    say: Any = print,
    keep: Callable[[Verdict], object] = lambda verdict: None,
    horovodrun: int = 0,
    give_up: int = 2,
) -> list[Verdict]:
    """Inflict faults in one loop and return the verdicts.

    Args:
        loop: of :data:`faults.LOOPS`.
        faults: those of them that are not for this loop are left out.
        size: ranks.
        repeats: of faults that the job survives: many in one launch.
        deadly: repeats of the others, a launch each.
        slow: repeats of those that take long.
        say: is given a line per launch.
        keep: is given every verdict as soon as there is one.
        horovodrun: how many more of the deadly ones, except where something is done from outside or a rank is
            stuck, are started through horovodrun.
        give_up: after so many repeats of a fault that hung, no more.
    """
    with Nursery(loop) as nursery:
        return _run(loop, faults, nursery, size, repeats, deadly, slow, say, keep, horovodrun, give_up)


def _run(
    loop: str,
    faults: Iterable[Fault],
    nursery: Nursery,
    size: int,
    repeats: int,
    deadly: int,
    slow: int,
    say: Any,
    keep: Callable[[Verdict], object],
    horovodrun: int,
    give_up: int,
) -> list[Verdict]:
    chosen = [fault for fault in faults if loop in fault.loops]
    together = [item for f in chosen if loop in f.caught for item in items(f, repeats, size)]
    out: list[Verdict] = []
    hung: dict[str, int] = {}
    while together:
        done = _launch(loop, together, size, nursery)
        numbers = [r["number"] for records in done.records.values() for r in records]
        reached = min(max(numbers, default=-1), len(together) - 1)
        ended = not done.hung and any(r["event"] == "finished" for r in done.records[0])
        upto = len(together) if ended else reached + 1
        verdicts = [judge(item, n, loop, size, done) for n, item in enumerate(together[:upto])]
        out += verdicts
        for verdict in verdicts:
            keep(verdict)
        say(f"{loop}: {upto} of {len(together)} in one launch{'' if ended else ', then: ' + _why(done)}")
        if not ended:
            name = together[max(reached, 0)].fault
            hung[name] = hung.get(name, 0) + 1
        together = [item for item in together[max(upto, 1) :] if hung.get(item.fault, 0) < give_up]
    for fault in chosen:
        if loop in fault.caught:
            continue
        failed = 0
        for item in items(fault, slow if fault.slow else deadly, size):
            done = _launch(loop, [item], size, nursery, dict(fault.environment))
            verdict = judge(item, 0, loop, size, done)
            out.append(verdict)
            keep(verdict)
            took = "" if verdict.seconds is None else f" {verdict.seconds:.2f} s"
            say(f"{loop}: {fault.name} #{item.repeat}:{took} {'; '.join(verdict.problems) or 'ok'}")
            failed += bool(verdict.problems)
            if failed >= give_up:
                break
        if fault.stuck or fault.how == "signal":
            continue
        for item in items(fault, horovodrun, size):
            done = _launch(loop, [item], size, None, dict(fault.environment))
            verdict = Verdict(fault.name, loop, -1, item.victim, item.step)
            # horovodrun ends the others when one ends; what counts is how it ends itself. A rank that ends in
            # peace is no failure to it, so the others must have failed.
            if done.hung or done.status.get(-1) in (None, 0):
                verdict.problems.append(f"horovodrun: {done.hung or 'its exit status was 0'}")
            out.append(verdict)
            keep(verdict)
            say(f"{loop}: {fault.name} under horovodrun: {'; '.join(verdict.problems) or 'ok'}")
    return out


def _why(done: Launch) -> str:
    return done.hung or f"ranks ended with {done.status}: {done.output[-600:]}"


def _launch(
    loop: str,
    plan: Sequence[Item],
    size: int,
    nursery: Nursery | None,
    variables: dict[str, str] | None = None,
) -> Launch:
    with tempfile.TemporaryDirectory(prefix="hvdloss-faults-") as folder:
        return launch(loop, plan, Path(folder), size, nursery=nursery, variables=variables)


# -- results ------------------------------------------------------------------------------------------


def summary(verdicts: Sequence[Verdict], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what the page shows, as JSON."""
    rows = []
    for fault in FAULTS:
        for loop in LOOPS:
            ours = [v for v in verdicts if v.fault == fault.name and v.loop == loop and v.repeat >= 0]
            if not ours:
                continue
            seconds = [v.seconds for v in ours if v.seconds is not None]
            failed = [v for v in ours if v.problems]
            problems: dict[str, list[str]] = {}  # by kind, the texts
            for v in failed:
                for problem in v.problems:
                    problems.setdefault(problem.partition(": ")[0], []).append(problem)
            rows.append(
                {
                    "fault": fault.name,
                    "loop": loop,
                    "inflicted": len(ours),
                    "failed": len(failed),
                    "median": round(statistics.median(seconds), 3) if seconds else None,
                    "worst": round(max(seconds), 3) if seconds else None,
                    "allowed": fault.seconds,
                    "errors": sorted({e for v in ours for e in v.errors.values() if e}),
                    "problems": {texts[0]: len(texts) for texts in list(problems.values())[:4]},
                }
            )
    through = [v for v in verdicts if v.repeat < 0]
    return {
        "settings": settings,
        "rows": rows,
        "horovodrun": {"launches": len(through), "failed": sum(bool(v.problems) for v in through)},
    }


def gathered(paths: Iterable[Path]) -> list[Verdict]:
    """Return what several runs found; of a fault in a loop, launched in one way, the last run counts."""
    found: dict[tuple[str, str, bool], list[Verdict]] = {}
    for path in paths:
        verdicts = [Verdict(**json.loads(line)) for line in path.read_text().splitlines()]
        keys = [(v.fault, v.loop, v.repeat >= 0) for v in verdicts]
        for key in set(keys):
            found[key] = [v for v, one in zip(verdicts, keys, strict=True) if one == key]
    return [v for verdicts in found.values() for v in verdicts]


def main() -> int:
    parser = argparse.ArgumentParser(description="Inflict faults on real jobs, and write what came of it.")
    add = parser.add_argument
    add("--loop", action="append", choices=sorted(LOOPS), help="only this one (may be repeated)")
    add("--fault", action="append", choices=sorted(BY_NAME), help="only this one (may be repeated)")
    add("--ranks", type=int, default=3, help="of a PyTorch job (%(default)s); others have one less")
    add("--repeats", type=int, default=20, help="of faults that a job survives (%(default)s)")
    add("--deadly-repeats", type=int, default=5, help="of those that end it (%(default)s)")
    add("--slow-repeats", type=int, default=2, help="of those that take long (%(default)s)")
    add("--horovodrun", type=int, default=1, help="how many more of the deadly ones through it (%(default)s)")
    add("--out", type=Path, default=ROOT / "runs" / "reliability", help="folder of the results (%(default)s)")
    add("--docs", action="store_true", help="write docs/explanation/reliability.json and the table")
    add(
        "--gather",
        type=Path,
        nargs="+",
        help="write the docs from inflictions.jsonl of earlier runs; the last of a fault counts",
    )
    add("--page", action="store_true", help="only write the table from reliability.json")
    args = parser.parse_args()
    if args.page:
        write_page()
        return 0
    faults = [BY_NAME[name] for name in args.fault] if args.fault else list(FAULTS)
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    verdicts: list[Verdict] = []
    if args.gather:
        _write(gathered(args.gather), args, docs=True)
        return 0
    with (args.out / "inflictions.jsonl").open("w") as log:
        for loop in args.loop or LOOPS:
            verdicts += run(
                loop,
                faults,
                size=args.ranks if loop == "torch" else max(2, args.ranks - 1),
                repeats=args.repeats,
                # The two tapes do the same where a rank ends.
                deadly=args.deadly_repeats if loop != "function" else min(1, args.deadly_repeats),
                slow=args.slow_repeats if loop != "function" else 0,
                horovodrun=args.horovodrun if loop in ("torch", "fit") else 0,
                say=lambda line: print(f"{time.time() - began:6.0f} s  {line}", flush=True),
                keep=lambda verdict: print(json.dumps(asdict(verdict)), file=log, flush=True),
            )
    _write(verdicts, args, docs=args.docs, minutes=round((time.time() - began) / 60, 1))
    bad = [v for v in verdicts if v.problems]
    print(f"{len(verdicts)} inflictions, {len(bad)} not as they should be; results in {args.out}")
    return 1 if bad else 0


def _write(
    verdicts: Sequence[Verdict], args: argparse.Namespace, *, docs: bool, minutes: float | None = None
) -> None:
    """Write the results, and the page if `docs`."""
    settings = {
        "ranks": {loop: args.ranks if loop == "torch" else max(2, args.ranks - 1) for loop in LOOPS},
        "minutes": minutes,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "keras", "horovod")},
        "tensorflow": _tensorflow(),
    }
    text = json.dumps(summary(verdicts, settings), indent=1) + "\n"
    (args.out / "reliability.json").write_text(text)
    if docs:
        JSON_PATH.write_text(text)
        write_page()


def _tensorflow() -> str:
    for name in ("tensorflow-cpu", "tensorflow"):
        try:
            return version(name)
        except ImportError:
            continue
    return "unknown"


if __name__ == "__main__":
    sys.exit(main())
