"""A rank of the watch's tests: a process with a member and no framework. It does what its stdin says.

    python watch_member.py RANK NAME      NAME: of the agent's socket

Commands, a line each: ``wait WHAT [members]``, ``step NAME`` (wait in it), ``stepped NAME``, ``free``,
``fail TEXT``, ``finalizer SECONDS`` (in a wait, as a garbage collector may), ``hold SECONDS`` (native code
with Python's lock), ``files N``, ``bye``, ``exit``. What the watch says goes to stdout, a JSON object a line.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import queue
import sys
import threading
import time

from hvdloss.watch.activity import Activity, blocking
from hvdloss.watch.member import Member
from hvdloss.watch.verdict import Fault, error_text

KEY = bytes(range(32))
commands: queue.Queue[list[str]] = queue.Queue()


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


class Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(log=record.getMessage())


@blocking
def block(member: Member) -> None:
    while member.fault is None and commands.empty():
        time.sleep(0.01)


def finalize(seconds: float) -> None:
    time.sleep(seconds)


def main() -> None:
    rank, name = int(sys.argv[1]), sys.argv[2]
    logging.getLogger("hvdloss.watch").addHandler(Said())
    activity = Activity()
    member = Member(rank, name, KEY, activity, lambda: say(aborted=True))
    say(up=os.getpid())

    def read() -> None:
        for line in sys.stdin:
            commands.put(line.split())
        commands.put(["exit"])

    threading.Thread(target=read, daemon=True).start()
    told = False
    while True:
        if member.fault is not None and not told:
            told = True
            fault = member.take_fault()
            say(fault=fault.as_message(), excluded=member.excluded)
        try:
            command, *words = commands.get(timeout=0.02)
        except queue.Empty:
            continue
        if command == "wait":
            members = tuple(map(int, words[1].split(","))) if len(words) > 1 else ()
            with activity.waiting(words[0], members):
                block(member)
        elif command == "step":
            with activity.waiting_in_step(words[0]):
                block(member)
        elif command == "stepped":
            activity.on_step(words[0])
        elif command == "finalizer":
            with activity.waiting("x"):
                finalize(float(words[0]))
        elif command == "hold":
            ctypes.PyDLL(None).usleep(int(1e6 * float(words[0])))
        elif command == "files":
            say(files=max(os.dup(0) for _ in range(int(words[0]))))
        elif command == "fail":
            step = activity.state(rank).step
            found = member.report_fault(
                Fault("error", (rank,), error_text(rank, step, ValueError(words[0]), ""))
            )
            say(told=None if found is None else found.as_message())
        elif command == "bye":
            member.close(bye=True)
            say(left=True)
        elif command == "exit":
            os._exit(0)


main()
